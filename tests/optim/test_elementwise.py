"""Kernels see every element once, in pieces or whole; numbers that are none are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.optim import elementwise
from burnish.optim.elementwise import first_nonfinite, sweep


def axpy(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_add_(targets, sources, alpha=2.0)


SHAPES = [(3,), (0,), (40, 7), (), (5, 5), (100,), (2, 3, 50), (0, 4), (16,)]


@pytest.mark.parametrize("piece", [1, 7, 16, 64, 10**6])
def test_every_element_is_seen_once(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "PIECE", piece)
    torch.manual_seed(0)
    targets, sources = ([torch.randn(shape) for shape in SHAPES] for _ in range(2))
    expected = [target + 2 * source for target, source in zip(targets, sources, strict=True)]
    calls: list[int] = []

    def counted(ones: list[Tensor], others: list[Tensor]) -> None:
        calls.append(sum(tensor.numel() for tensor in ones))
        axpy(ones, others)

    sweep(counted, targets, sources)
    assert all(torch.equal(target, value) for target, value in zip(targets, expected, strict=True))
    assert sum(calls) == sum(value.numel() for value in expected)
    assert max(calls) < 2 * piece or piece == 1
    if piece == 10**6:
        assert len(calls) == 1


def test_tensors_that_are_not_contiguous_are_taken_whole_and_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "PIECE", 8)
    torch.manual_seed(0)
    base, source = torch.randn(6, 10), torch.randn(10, 6)
    expected = base.T + 2 * source
    target = base.T
    sweep(axpy, [target], [source])
    assert torch.equal(base.T, expected)
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    expected = image + 2 * torch.arange(96.0).view(2, 3, 4, 4)
    sweep(axpy, [image], [torch.arange(96.0).view(2, 3, 4, 4)])
    assert torch.equal(image, expected)


def test_no_tensors_no_call() -> None:
    sweep(lambda *lists: pytest.fail("called"), [], [])
    sweep(lambda *lists: pytest.fail("called"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_first_tensor_with_a_nan_or_an_infinity(dtype: torch.dtype) -> None:
    tensors = [torch.ones(3, dtype=dtype), torch.ones(0, dtype=dtype), torch.full((2, 2), 3e38, dtype=dtype)]
    assert first_nonfinite(tensors) is None
    assert first_nonfinite([]) is None and first_nonfinite([torch.ones(0)]) is None
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = [*tensors, torch.tensor([1.0, bad], dtype=dtype), torch.tensor(bad, dtype=dtype)]
        assert first_nonfinite(spoiled) == 3
