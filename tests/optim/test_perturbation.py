"""Directions: their moments, their subspaces, and that walking again gives the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from burnish.optim import perturbation as module
from burnish.optim.perturbation import (
    Direction,
    Gaussian,
    LowRank,
    Perturbation,
    Rademacher,
    Row,
    Sparse,
    Subspace,
    perturbation,
    row,
)

ALL = [Gaussian(), Rademacher(), LowRank(2), Subspace(2), Sparse(0.5), Sparse(0.5, by="random")]
SHAPES = [(4, 6), (5,), (3, 2, 2), ()]


def rows_of(kind: Perturbation, tensors: list[Tensor], notes: list[dict[str, Tensor]] | None = None) -> list[Row]:
    notes = notes or [kind.prepare(tensor) for tensor in tensors]
    return [
        row(i, (t, t), note, split=kind.elementwise) for i, (t, note) in enumerate(zip(tensors, notes, strict=True))
    ]


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def drawn(kind: Perturbation, tensors: list[Tensor], seed: int, slow: int = 0) -> list[Tensor]:
    noise = iter(Direction(kind, seed, slow).walk(rows_of(kind, tensors)))
    return [next(noise).view(tensor.shape) for tensor in tensors]


@pytest.mark.parametrize("kind", ALL, ids=repr)
def test_walked_again_a_direction_is_the_same(kind: Perturbation) -> None:
    for keep in (False, True):
        direction = Direction(kind, 5, keep=keep)
        rows = rows_of(kind, weights())
        first = [noise.clone() for noise in direction.walk(rows)]
        assert all(torch.equal(*pair) for pair in zip(first, direction.walk(rows), strict=True))
        assert (next(iter(direction.walk(rows))) is next(iter(direction.walk(rows)))) == keep
        other = list(Direction(kind, 6).walk(rows))
        assert not any(torch.equal(*pair) for pair in zip(first, other, strict=True) if pair[0].numel() > 4)


def test_the_numbers_of_a_seed_are_those_of_torch() -> None:
    """Small tensors, one after the other, as a seeded generator gives them."""
    generator = torch.Generator().manual_seed(9)
    expected = [torch.randn(shape, generator=generator) for shape in SHAPES]
    assert all(torch.equal(*pair) for pair in zip(drawn(Gaussian(), weights(), 9), expected, strict=True))


def test_large_tensors_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.NOISE_PIECE, "cpu", 10)
    big = torch.zeros(4, 8)
    rows = rows_of(Gaussian(), [big])
    noise = list(Direction(Gaussian(), 1).walk(rows))
    assert [len(part) for part in noise] == [10, 10, 10, 2]
    generator = torch.Generator().manual_seed(1)
    assert all(torch.equal(part, torch.randn(len(part), generator=generator)) for part in noise)
    assert all(views[0].data_ptr() == big.data_ptr() + 40 * i for i, views in enumerate(rows[0].pieces))
    assert len(rows_of(Gaussian(), [big.T])[0].pieces) == 1
    assert len(rows_of(LowRank(), [big])[0].pieces) == 1


@dataclass
class Moments:
    """Monte Carlo estimates for e = (z.g) z with their standard errors."""

    alpha: float
    alpha_error: float
    square: float
    square_error: float


def moments(kind: Perturbation, shape: tuple[int, ...], count: int) -> Moments:
    """E[e.g] / |g|^2 and E|e|^2 / |g|^2, both over U, V and all else that is drawn."""
    generator = torch.Generator().manual_seed(0)
    g, base = torch.randn(shape, generator=generator), torch.zeros(shape)
    notes = kind.prepare(torch.arange(float(base.numel())).view(shape))
    at = torch.arange(float(base.numel())).view(shape)
    alphas, squares = [], []
    for seed in range(count):
        z = next(iter(Direction(kind, seed + 1, seed).walk([row(0, (at, at), notes, split=True)]))).view(shape)
        slope = (z * g).sum()
        alphas.append(slope**2 / g.square().sum())
        squares.append(slope**2 * z.square().sum() / g.square().sum())
    a, s = torch.stack(alphas), torch.stack(squares)
    error = math.sqrt(count)
    return Moments(float(a.mean()), float(a.std()) / error, float(s.mean()), float(s.std()) / error)


@pytest.mark.parametrize(
    ("kind", "alpha", "square"),
    [
        (Gaussian(), 1.0, 26.0),  # d + 2
        (Rademacher(), 1.0, 24.0),  # d
        (LowRank(1), 1.0, 48.0),  # (m + 2)(n + 2)
        (LowRank(2, normalize=False), 2.0, 148.0),
        (LowRank(3, normalize=False), 3.0, 301.0),
        (LowRank(2), 1.0, 148.0 / 4),
        (Subspace(2), 1.0, 24.0 / 4 * 6),  # (mn / r^2)(r^2 + 2)
        (Sparse(0.25, by="random"), 0.25, 0.25 * (3 + 23 * 0.25)),  # p (3 + (d - 1) p)
    ],
    ids=repr,
)
def test_moments_of_the_estimate(kind: Perturbation, alpha: float, square: float) -> None:
    """The table of section 4 of the card, within 4 standard errors and within 8%."""
    found = moments(kind, (4, 6), 20_000)
    assert abs(found.alpha - alpha) < min(4 * found.alpha_error, 0.08 * alpha)
    assert abs(found.square - square) < min(4 * found.square_error, 0.08 * square)


def test_low_rank_has_its_rank_and_keeps_its_right_side() -> None:
    tensors = [torch.zeros(7, 9), torch.zeros(4, 3, 5)]
    one, two, new = (drawn(LowRank(2), tensors, seed, slow) for seed, slow in ((1, 0), (2, 0), (3, 1)))
    for first, second, third in zip(one, two, new, strict=True):
        both = torch.cat([first.flatten(1), second.flatten(1)])
        assert torch.linalg.matrix_rank(both) == 2
        assert torch.linalg.matrix_rank(torch.cat([both, third.flatten(1)])) == 4


def test_subspace_stays_in_its_subspace() -> None:
    one, two, new = (drawn(Subspace(2), [torch.zeros(6, 5)], seed, slow)[0] for seed, slow in ((1, 0), (2, 0), (3, 1)))
    assert torch.linalg.matrix_rank(torch.cat([one, two])) == torch.linalg.matrix_rank(torch.cat([one, two], 1)) == 2
    assert torch.linalg.matrix_rank(torch.cat([one, new])) == 4
    assert drawn(Subspace(50), [torch.zeros(6, 5)], 1)[0].shape == (6, 5)


def test_sparse_by_magnitude_moves_small_weights_only() -> None:
    tensor = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    z = drawn(Sparse(0.25), [tensor], 3)[0]
    moved = z != 0
    assert moved.sum() == 500
    assert tensor[moved].abs().max() < tensor[~moved].abs().min()
    half = drawn(Sparse(0.3, by="random"), [tensor], 3)[0]
    assert abs((half != 0).float().mean() - 0.3) < 4 * math.sqrt(0.21 / 2000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_float32_for_half_precision(dtype: torch.dtype) -> None:
    for kind in ALL:
        found = {noise.dtype for noise in drawn(kind, weights(dtype), 1)}
        assert found == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize("kind", ALL, ids=repr)
def test_described_and_built_again(kind: Perturbation) -> None:
    assert perturbation(**kind.describe()) == kind


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: perturbation("gausian"), "perturbation='gausian': choose one of gaussian"),
        (lambda: LowRank(0), "rank=0: expected 1 or more"),
        (lambda: Subspace(2, interval=0), "interval=0: expected 1 or more"),
        (lambda: Sparse(0.0), r"keep=0.0: expected a share in \(0, 1\]"),
        (lambda: Sparse(0.5, by="size"), "by='size': choose magnitude or random"),
    ],
)
def test_bad_perturbation(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_names_of_the_command() -> None:
    assert perturbation("low-rank", rank=1) == LowRank(1) and perturbation("gaussian") == Gaussian()
