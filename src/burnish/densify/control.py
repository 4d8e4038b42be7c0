"""Controls: the same student from random numbers, to know what the experts are worth after distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import xxhash
from torch import Tensor

from burnish.checkpoint import PlannedTensor
from burnish.checkpoint.tensors import torch_dtype
from burnish.families import Student

INITS = {
    "experts": "the chosen experts of the teacher",
    "random-ffn": "random feed-forwards, all else of the teacher",
    "random": "random numbers throughout",
}


def without_experts(student: Student, init: str) -> Student:
    """The structure of a control: tensors that would be computed from experts, or all, become random.

    Args:
        student: the structure of the converted student.
        init: "random-ffn" or "random".

    Source: baselines of arXiv 2605.28207, sections 4.1 and 4.4 (names confirmed; the distribution is ours: that of the
    class's own initialisation).
    """
    if init == "random-ffn":
        return replace(student, dropped=student.dropped | student.converted, converted=frozenset())
    tensors = tuple(PlannedTensor(tensor.name, tensor.dtype, tensor.shape) for tensor in student.tensors)
    dropped = student.dropped | student.converted | set(student.copied)
    return replace(student, tensors=tensors, casts={}, converted=frozenset(), dropped=frozenset(dropped))


def random_tensors(
    student: Student, compute: Callable[[PlannedTensor], Tensor], *, seed: int
) -> Callable[[PlannedTensor], Tensor]:
    """The function that computes each tensor of a control: matrices normal with the config's `initializer_range`, gains
    of norms 1, biases 0; each tensor draws from a generator of its own.

    Args:
        student: as `without_experts` gives it.
        compute: for tensors that are neither random nor copied (types that change, the router of a single expert).
        seed: of the draws.
    """
    std = float(str(student.config.get("initializer_range", 0.02)))

    def random(planned: PlannedTensor) -> Tensor:
        if planned.name in student.casts or planned.name in student.zeros:
            return compute(planned)
        dtype = torch_dtype(planned.dtype)
        if "norm" in planned.name:
            return torch.ones(planned.shape, dtype=dtype)
        if "bias" in planned.name:
            return torch.zeros(planned.shape, dtype=dtype)
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {planned.name}".encode()) >> 1)
        return (std * torch.randn(planned.shape, generator=generator)).to(dtype)

    return random
