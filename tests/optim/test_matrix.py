"""How tensors are read as matrices: stacks, kernels, transposed, split; each equals its matrices given one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.optim import AMUSE, Muon, NorMuon
from burnish.optim.matrix import block_shapes, blocks, momentum_update, row_shape
from tests.optim.reference import matrices, tensors

CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "muon": lambda groups, **options: Muon(groups, lr=0.05, **options),
    "normuon": lambda groups, **options: NorMuon(groups, lr=0.05, **options),
    "amuse": lambda groups, **options: AMUSE(groups, lr=0.05, warmup_steps=2, **options),
}
SCALES = ["original", "match_rms_adamw", "spectral"]


def train(kind: str, start: list[Tensor], gradients: Callable[[int], list[Tensor]], **group: Any) -> list[Tensor]:
    """Parameters after some steps with given gradients."""
    scale = group.pop("scale")
    parameters = [nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in start]
    optimizer = CLASSES[kind]([{"params": parameters, "use_muon": True, **group}], scale=scale)
    for t in range(4):
        for parameter, g in zip(parameters, gradients(t), strict=True):
            parameter.grad = g
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def noise(*shape: int, t: int) -> Tensor:
    return tensors(shape, seed=50 + t)[0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_stack_of_experts_equals_its_matrices(kind: str, scale: str) -> None:
    start = noise(5, 4, 3, t=-1)
    (stack,) = train(kind, [start], lambda t: [noise(5, 4, 3, t=t)], scale=scale)
    apart = train(kind, list(start), lambda t: list(noise(5, 4, 3, t=t)), scale=scale)
    torch.testing.assert_close(stack, torch.stack(apart), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (3, 2, 2, 2, 2)])
def test_a_kernel_equals_its_flattened_matrix(kind: str, scale: str, shape: tuple[int, ...]) -> None:
    start = noise(*shape, t=-1)
    (kernel,) = train(kind, [start], lambda t: [noise(*shape, t=t)], scale=scale)
    (flat,) = train(kind, [start.flatten(1)], lambda t: [noise(*shape, t=t).flatten(1)], scale=scale)
    torch.testing.assert_close(kernel.flatten(1), flat, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_layout_may_be_said(kind: str) -> None:
    """Three dimensions flattened (a one-dimensional convolution), and four as a stack of stacks."""
    start = noise(4, 3, 5, t=-1)
    (flat,) = train(kind, [start], lambda t: [noise(4, 3, 5, t=t)], scale="spectral", layout="flatten")
    (plain,) = train(kind, [start.flatten(1)], lambda t: [noise(4, 3, 5, t=t).flatten(1)], scale="spectral")
    torch.testing.assert_close(flat.flatten(1), plain, rtol=0, atol=1e-13)
    start = noise(2, 3, 4, 5, t=-1)
    (stack,) = train(kind, [start], lambda t: [noise(2, 3, 4, 5, t=t)], scale="spectral", layout="batch")
    (plain,) = train(kind, [start.flatten(0, 1)], lambda t: [noise(2, 3, 4, 5, t=t).flatten(0, 1)], scale="spectral")
    torch.testing.assert_close(stack.flatten(0, 1), plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (2, 3, 5)])
def test_a_transposed_tensor_equals_the_transpose(kind: str, scale: str, shape: tuple[int, ...]) -> None:
    start = noise(*shape, t=-1)
    (stored,) = train(kind, [start], lambda t: [noise(*shape, t=t)], scale=scale, transposed=True)
    (plain,) = train(kind, [start.mT.contiguous()], lambda t: [noise(*shape, t=t).mT.contiguous()], scale=scale)
    torch.testing.assert_close(stored.mT, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("way", [{"splits": (4, 1, 2)}, {"heads": 7}])
@pytest.mark.parametrize("transposed", [False, True])
def test_row_blocks_equal_tensors_of_their_own(kind: str, scale: str, way: dict[str, Any], transposed: bool) -> None:
    """Fused q, k, v and heads: each block has its own direction and its own scale factor."""
    start = noise(7, 3, t=-1)
    sizes = list(way.get("splits", [1] * 7))

    def stored(matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if transposed else matrix

    (fused,) = train(
        kind, [stored(start)], lambda t: [stored(noise(7, 3, t=t))], scale=scale, transposed=transposed, **way
    )
    apart = train(kind, list(start.split(sizes)), lambda t: list(noise(7, 3, t=t).split(sizes)), scale=scale)
    torch.testing.assert_close(fused, stored(torch.cat(apart)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("group", [
    {}, {"layout": "flatten"}, {"layout": "batch"}, {"transposed": True}, {"splits": (1, 3)}, {"heads": 2},
    {"transposed": True, "splits": "rest"}, {"transposed": True, "heads": 2}, {"layout": "flatten", "splits": (3, 1)},
    {"transposed": True, "heads": 4, "layout": "batch"}, {"layout": "flatten", "heads": 2, "transposed": True},
])  # fmt: skip
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (4, 2, 4, 4)])
def test_blocks_are_the_matrices_of_a_slow_reading(group: dict[str, Any], shape: tuple[int, ...]) -> None:
    """In some order; and there is one number for each of their rows, cut the same way."""
    full = {"layout": None, "transposed": False, "splits": (), "heads": 0} | group
    if full["splits"] == "rest":
        full["splits"] = (1, block_shapes(shape, full | {"splits": ()})[0][0] - 1)
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parts = blocks(tensor[None], full)
    read = [matrix.tolist() for part in parts for matrix in part.flatten(0, -3)]
    assert sorted(read) == sorted(part.tolist() for part in matrices(tensor, **full))
    assert [tuple(part.shape[-2:]) for part in parts] == block_shapes(shape, full)
    rows = blocks(torch.zeros(1, *row_shape(shape, full)), full)
    assert [row.shape for row in rows] == [(*part.shape[:-1], 1) for part in parts]


def test_rows_of_a_tensor_hold_the_numbers_of_its_own_rows() -> None:
    """A statistic written through the blocks lies beside the row it belongs to, in the stored order."""
    full = {"layout": None, "transposed": True, "splits": (), "heads": 0}
    kernel = torch.arange(24.0).view(1, 2, 3, 2, 2)  # [in, out, height, width]: 12 rows of 2
    rows = torch.zeros(1, *row_shape(kernel.shape[1:], full))
    blocks(rows, full)[0].copy_(blocks(kernel, full)[0].sum(-1, keepdim=True))
    assert torch.equal(rows, kernel.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("form", "nesterov", "targets", "buffer"),
    [
        ("ema", False, [1.0, 3.5], 3.5),  # M = 0 + 2 / 2, then 1 + (6 - 1) / 2
        ("ema", True, [1.5, 4.75], 3.5),  # g + (M - g) / 2
        ("accumulate", False, [2.0, 7.0], 7.0),  # M = g, then 2 / 2 + 6
        ("accumulate", True, [3.0, 9.5], 7.0),  # g + M / 2
    ],
)
def test_momentum_by_hand(form: str, nesterov: bool, targets: list[float], buffer: float) -> None:
    m, target = torch.zeros(1), torch.zeros(1)
    for g, expected in zip((2.0, 6.0), targets, strict=True):
        momentum_update([torch.tensor([g])], [m], [target], momentum=0.5, nesterov=nesterov, form=form)
        assert float(target) == expected
    assert float(m) == buffer
