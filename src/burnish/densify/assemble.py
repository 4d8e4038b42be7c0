"""Act: concatenate the planned experts of a layer into one dense feed-forward, tensor by tensor.

`dense(x) = W_d [sigma(W_g x) * (W_u x)] = sum_r s_r f_r(x)` exactly, for any element-wise sigma: only the router's
token-dependent weights became the constants s_r. Source: arXiv 2605.28207, Eq. 2 and appendix A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from burnish.checkpoint import Checkpoint, PlannedTensor
from burnish.checkpoint.tensors import has_values, torch_dtype
from burnish.densify.plan import DensifyPlan, LayerPlan
from burnish.errors import OutputError
from burnish.families import Separate, Student


def assemble(
    student: Student, plan: DensifyPlan | None, teacher: Checkpoint, *, seed: int = 0
) -> Callable[[PlannedTensor], Tensor]:
    """The function that computes each tensor of the student that is not a plain copy.

    Arithmetic is float32 and cast once; an expert that is neither merged nor scaled keeps its exact values. Layers
    narrower than the common width are padded with neurons whose gate and up rows are small random numbers and whose
    down column is zero: the function is exact, and the neurons can still be trained (all zeros could not).

    Args:
        student: its structure.
        plan: the decision for each MoE layer; None for a control, which asks for no feed-forward.
        teacher: where experts are read from.
        seed: of the padding.
    """
    plans = {layer.layer: layer for layer in plan.layers} if plan else {}
    one_expert = student.twin.kind == "one-expert"
    behind_router = student.family.router(student.config).single_expert_weight if one_expert else 1.0

    def compute(planned: PlannedTensor) -> Tensor:
        dtype = torch_dtype(planned.dtype)
        if planned.name in student.casts:
            return teacher.read(student.casts[planned.name]).to(dtype)
        if planned.name in student.zeros:
            return torch.zeros(planned.shape, dtype=dtype)
        target = student.feed_forward[planned.name]

        def part(name: str) -> Tensor:
            return _part(student, plans.get(target.layer), teacher, target.layer, name, dtype, seed, behind_router)

        tensor = student.twin.storage.compose(target.parts, part)
        if not has_values(tensor) and any("bias" not in name for name in target.parts):
            raise OutputError(f"tensor {planned.name}: all zeros: the scales or experts of layer {target.layer} vanish")
        return tensor.unsqueeze(0) if len(planned.shape) > tensor.dim() else tensor  # a fused layout's only expert

    return compute


def _part(
    student: Student,
    plan: LayerPlan | None,
    teacher: Checkpoint,
    layer: int,
    part: str,
    dtype: torch.dtype,
    seed: int,
    behind_router: float,
) -> Tensor:
    hidden, width = student.shape.hidden_size, student.width
    blocks = _dense_block(student, teacher, layer, part) if plan is None else _blocks(student, plan, teacher, part)
    if part == "down_bias":
        total = torch.zeros(hidden)
        for block, scale in blocks:
            total += block.float() * (scale / behind_router)
        return total.to(dtype)
    out = torch.empty((hidden, width) if part == "down" else (width, hidden)[: 1 if "bias" in part else 2], dtype=dtype)
    dim = 1 if part == "down" else 0
    position = 0
    for block, scale in blocks:
        scale /= behind_router
        view = out.narrow(dim, position, block.shape[dim])
        if part == "down" and scale != 1.0:
            block = block.float().mul_(scale)  # `block` was read for this call alone
        view.copy_(block)
        position += block.shape[dim]
    _pad(out.narrow(dim, position, width - position), part, layer, seed, student.config)
    return out


def _blocks(student: Student, plan: LayerPlan, teacher: Checkpoint, part: str) -> Iterator[tuple[Tensor, float]]:
    """The shared experts and the merged groups of a layer, each with its scale."""
    if isinstance(student.storage, Separate):
        kept = [expert for group in plan.groups for expert in group]
        teacher.expect(student.storage.name(part, plan.layer, expert) for expert in kept)
    shared = student.family.shared
    if shared is not None and student.shape.shared_width:
        yield shared.storage.read(teacher, plan.layer, 0, part), plan.shared_scale
    for group, weights, scale in zip(plan.groups, plan.weights, plan.scales, strict=True):
        yield _merge(student, teacher, plan.layer, part, group, weights), scale


def _merge(
    student: Student, teacher: Checkpoint, layer: int, part: str, group: list[int], weights: list[float]
) -> Tensor:
    """The weighted average of a group's weights; a group of one is not touched.

    Averaging weights is not averaging functions: for different experts the result is only a starting point.
    """
    if len(group) == 1:
        return student.storage.read(teacher, layer, group[0], part)
    total = sum(weights)
    merged: Tensor | None = None
    for expert, weight in zip(group, weights, strict=True):
        share = student.storage.read(teacher, layer, expert, part).float() * (weight / total)
        merged = share if merged is None else merged.add_(share)
    assert merged is not None
    return merged


def _dense_block(student: Student, teacher: Checkpoint, layer: int, part: str) -> Iterator[tuple[Tensor, float]]:
    assert student.family.dense_ffn is not None
    yield student.family.dense_ffn.read(teacher, layer, 0, part), 1.0


def _pad(view: Tensor, part: str, layer: int, seed: int, config: dict[str, object]) -> None:
    if not view.numel() or part == "down" or "bias" in part:
        view.zero_()
        return
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 2 + (part == "up"))
    std = float(str(config.get("initializer_range", 0.02)))
    view.copy_(torch.randn(view.shape, generator=generator) * std)
