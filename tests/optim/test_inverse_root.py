"""Inverse roots against closed forms and against matrices whose spectrum is known; and where they would go wrong."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.optim.inverse_root import inverse_root, reciprocal, root_by_newton_schulz, spectrum

DOUBLE, SINGLE = torch.float64, torch.float32
SIZES = (1, 2, 3, 9, 10, 25, 32, 64)


def rotations(count: int, size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(count, size, size, dtype=DOUBLE, generator=draw))[0]


def known(count: int, size: int, condition: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices Q diag(s) Q' with eigenvalues from 1 down to 1 / condition; Q and s."""
    q = rotations(count, size, seed)
    s = torch.logspace(0, -math.log10(condition), size, dtype=DOUBLE).expand(count, size)
    return (q * s.unsqueeze(-2)) @ q.mT, q, s


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_two_by_two_closed_form() -> None:
    """A^(1/2) = (A + sqrt(det A) I) / sqrt(tr A + 2 sqrt(det A))."""
    x = torch.randn(500, 2, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    a = x @ x.mT
    identity = torch.eye(2, dtype=DOUBLE)
    determinant = torch.linalg.det(a).sqrt()[:, None, None]
    root = (a + determinant * identity) / (a.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] + 2 * determinant).sqrt()
    for scale, eps in ((1.0, 0.0), (1.0, 0.3), (2.5, 0.1)):
        expected = torch.linalg.inv(scale * root + eps * identity)
        assert relative(inverse_root(a, scale=scale, eps=eps)[0], expected) < 1e-11
    q, r, failed = spectrum(a)
    assert failed == 0 and relative((q * r.unsqueeze(-2)) @ q.mT, root) < 1e-13


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "condition", "bound"), [(DOUBLE, 1e6, 1e-9), (SINGLE, 10.0, 1e-4)])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e25])
def test_a_known_spectrum_at_any_scale(
    size: int, dtype: torch.dtype, condition: float, bound: float, magnitude: float
) -> None:
    matrices, q, s = known(20, size, condition)
    root = (s * magnitude).sqrt()
    eps = 0.01 * math.sqrt(magnitude)
    expected = (q * (1 / (3 * root + eps)).unsqueeze(-2)) @ q.mT
    found, failed = inverse_root((matrices * magnitude).to(dtype), scale=3.0, eps=eps)
    assert failed == 0 and found.dtype == DOUBLE
    assert relative(found, expected) < bound


@pytest.mark.parametrize("size", [2, 9, 25])
@pytest.mark.parametrize("condition", [10.0, 1e4, 1e7])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3])
def test_products_give_what_eigenvectors_give(size: int, condition: float, eps: float) -> None:
    moments = known(30, size, condition)[0].float()
    found, failed = inverse_root(moments, scale=2.0, eps=eps, method="newton-schulz")
    assert failed == 0
    assert relative(found, inverse_root(moments, scale=2.0, eps=eps)[0]) < 1e-4


def test_products_are_not_trusted_where_they_cannot_reach() -> None:
    """Float64 is known to more digits than products find, zero has no root to find: eigenvectors take over."""
    for moments in (known(5, 6, 1e14)[0], torch.zeros(5, 6, 6), torch.diag(torch.tensor([1.0, 0, 0])).expand(3, 3, 3)):
        found = inverse_root(moments, scale=1.0, eps=1e-9, method="newton-schulz")[0]
        assert relative(found, inverse_root(moments, scale=1.0, eps=1e-9)[0]) < 1e-3
    # Wrong rows alone are replaced.
    mixed = torch.stack([torch.zeros(4, 4), 2 * torch.eye(4)])
    found = inverse_root(mixed, scale=1.0, eps=0.5, method="newton-schulz")[0]
    expected = torch.tensor([2.0, 1 / (math.sqrt(2 * (1 + 4 * torch.finfo(SINGLE).eps)) + 0.5)], dtype=DOUBLE)
    torch.testing.assert_close(found, expected[:, None, None] * torch.eye(4, dtype=DOUBLE), rtol=1e-9, atol=1e-12)


def test_iterations_reach_the_floor() -> None:
    """Relative error of the root, for condition numbers up to that of a rank-deficient float32 matrix."""
    for condition, bound in ((1e2, 1e-13), (1e4, 1e-11), (1e7, 1e-8)):
        matrices, q, s = known(50, 9, condition)
        total = s.sum(-1)[:, None, None]
        root = root_by_newton_schulz(matrices / total) * total.sqrt()
        assert relative(root, (q * s.sqrt().unsqueeze(-2)) @ q.mT) < bound


def test_a_block_of_rank_one_has_the_smallest_root_that_means_anything_elsewhere() -> None:
    """sqrt(unit * trace), in every direction that has had no gradient, whatever signs rounding left there."""
    g = torch.randn(200, 9, generator=torch.Generator().manual_seed(1))
    moments = 0.001 * g.unsqueeze(-1) * g.unsqueeze(-2)
    q, r, failed = spectrum(moments)
    trace = moments.double().diagonal(dim1=1, dim2=2).sum(-1)
    floor = (torch.finfo(SINGLE).eps * trace).sqrt()
    assert failed == 0
    # Rounding of the block moves an eigenvalue by up to half a unit of its trace.
    assert (r[:, 0] >= 0.5 * floor).all() and (r[:, :-1] <= 2 * floor.unsqueeze(-1)).all()
    torch.testing.assert_close(r[:, -1], trace.sqrt(), rtol=1e-6, atol=0)
    along = (q[:, :, -1] * g.double()).sum(-1).abs() / g.double().norm(dim=-1)
    torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=1e-10)


def dead_inputs() -> Tensor:
    """16 x 16 of scale 1e-11 with ten zero rows, where float32 decompositions were seen to be NaN without an error."""
    draw = torch.Generator().manual_seed(2)
    moments = torch.zeros(500, 16, 16)
    x = torch.randn(500, 6, 40, generator=draw) * 3e-6
    moments[:, 10:, 10:] = x @ x.mT
    return moments


ADVERSARIES: dict[str, Callable[[], Tensor]] = {
    "zero": lambda: torch.zeros(3, 7, 7),
    "dead inputs": dead_inputs,
    "denormal": lambda: torch.full((2, 3, 3), 1e-44),
    "smallest double": lambda: torch.full((2, 3, 3), 5e-324, dtype=DOUBLE),
    "largest": lambda: torch.full((2, 3, 3), 3e38),
    "largest double": lambda: torch.full((2, 3, 3), 1e308, dtype=DOUBLE),
    "condition 1e30": lambda: torch.diag(torch.logspace(0, -30, 6)).expand(2, 6, 6),
    "equal eigenvalues": lambda: torch.eye(8).expand(4, 8, 8),
    "negative by rounding": lambda: torch.ones(2, 5, 5) - 1e-7 * torch.eye(5),
    "one": lambda: torch.full((5, 1, 1), 4.0),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("method", ["eigh", "newton-schulz"])
def test_no_wrong_answer(name: str, method: str) -> None:
    """Finite, symmetric, positive, and an inverse of the root: P (V + shift)^(1/2) has no eigenvalue but 1."""
    moments = ADVERSARIES[name]()
    found, failed = inverse_root(moments, scale=1.0, eps=0.0, method=method)
    assert found.isfinite().all()
    assert relative(found, found.mT) < 1e-9 or name == "zero"
    assert failed == 0
    doubled = moments.double()
    largest = doubled.abs().amax((1, 2), keepdim=True)
    values, vectors = torch.linalg.eigh(doubled / largest.clamp(min=5e-324))
    trace = values.sum(-1, keepdim=True)
    roots = (values.clamp(min=0) + torch.finfo(moments.dtype).eps * trace).sqrt() * largest.squeeze(-1).sqrt()
    product = found @ ((vectors * roots.unsqueeze(-2)) @ vectors.mT)
    expected = torch.eye(moments.shape[-1], dtype=DOUBLE) * (largest > 0)
    # Eigenvalues of a unit are known to a part of themselves: LAPACK rounds by as much in float64, and where one is
    # negative, products shift it and eigenvectors set it to zero first.
    open_to_rounding = name in ("smallest double", "largest double", "negative by rounding")
    assert (product - expected).abs().max() < (0.3 if open_to_rounding else 1e-3)


def test_halves_that_differ_by_rounding_are_averaged() -> None:
    moments = known(4, 5, 100.0)[0]
    skewed = moments + torch.triu(torch.full((5, 5), 1e-6, dtype=DOUBLE), 1)
    mean = (skewed + skewed.mT) / 2
    assert relative(inverse_root(skewed, scale=1.0, eps=0.0)[0], inverse_root(mean, scale=1.0, eps=0.0)[0]) < 1e-12


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("method", ["eigh", "newton-schulz"])
def test_a_block_that_overflowed_is_diagonal_and_its_lost_coordinates_rest(bad: float, method: str) -> None:
    moments = known(3, 4, 10.0)[0].float()
    moments[1, 2, :] = moments[1, :, 2] = bad
    found, failed = inverse_root(moments, scale=1.0, eps=0.0, method=method)
    assert failed == 1
    expected = moments[1].diagonal().double().rsqrt().nan_to_num(nan=0.0, posinf=0.0)
    torch.testing.assert_close(found[1], torch.diag(expected), rtol=1e-12, atol=0)
    assert expected[2] == 0 and expected[0] > 0
    clean = inverse_root(moments[::2], scale=1.0, eps=0.0, method=method)[0]
    torch.testing.assert_close(found[::2], clean, rtol=1e-12, atol=1e-12)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """LAPACK that goes wrong for matrices whose first number is the largest."""
    plain = torch.linalg.eigh

    def install(how: str) -> None:
        def eigh(matrices: Tensor) -> Any:
            bad = matrices[:, 0, 0] >= matrices.diagonal(dim1=-2, dim2=-1).max(-1).values
            if how == "raises" and bad.any():
                raise torch.linalg.LinAlgError("failed to converge")
            values, vectors = plain(matrices)
            if how == "NaN":
                values[bad] = vectors[bad] = math.nan
            if how == "NaN in one vector":
                vectors[bad, :, -1] = math.nan
            if how == "wrong values":
                values[bad] *= 1.01
            if how == "wrong vectors":
                vectors[bad] = torch.eye(matrices.shape[-1], dtype=DOUBLE)
            if how == "not orthogonal":
                vectors[bad] *= 1.001
            return values, vectors

        monkeypatch.setattr(torch.linalg, "eigh", eigh)

    yield install
    monkeypatch.undo()


@pytest.mark.parametrize(
    "how", ["NaN", "NaN in one vector", "wrong values", "wrong vectors", "not orthogonal", "raises"]
)
def test_a_decomposition_that_went_wrong_is_found_and_its_block_diagonal(
    how: str, broken: Callable[[str], None]
) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(40, 6, 12, dtype=DOUBLE, generator=draw)
    moments = x @ x.mT
    right = inverse_root(moments, scale=1.0, eps=0.1)[0]
    bad = moments[:, 0, 0] >= moments.diagonal(dim1=1, dim2=2).max(-1).values
    assert 2 < int(bad.sum()) < 20
    broken(how)
    found, failed = inverse_root(moments, scale=1.0, eps=0.1)
    assert failed == int(bad.sum())
    torch.testing.assert_close(found[~bad], right[~bad], rtol=1e-12, atol=1e-12)
    diagonal = torch.diag_embed(1 / (moments.diagonal(dim1=1, dim2=2).sqrt() + 0.1))
    torch.testing.assert_close(found[bad], diagonal[bad], rtol=1e-12, atol=1e-12)


def test_permuted_coordinates_give_the_permuted_root() -> None:
    moments = known(10, 7, 1e3)[0]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    found = inverse_root(moments, scale=1.0, eps=0.01)[0]
    permuted = inverse_root(moments[:, order][:, :, order], scale=1.0, eps=0.01)[0]
    assert relative(permuted, found[:, order][:, :, order]) < 1e-11


def test_threads_share_the_blocks_and_stay_as_they_were() -> None:
    """Bit for bit what one thread gives; neither this thread nor a new one has another number of threads afterwards."""
    moments = known(999, 5, 1e3)[0].float()
    before, alone = torch.get_num_threads(), spectrum(moments)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            shared = spectrum(moments)
            seen: list[int] = []
            later = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert (torch.get_num_threads(), seen) == (threads, [threads])
            assert torch.equal(shared.vectors, alone.vectors) and torch.equal(shared.roots, alone.roots)
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_divided_by_is_zero() -> None:
    values = torch.tensor([0.0, 2.0, math.inf, math.nan, -1.0])
    assert reciprocal(values).tolist() == [0.0, 0.5, 0.0, 0.0, 0.0]


def test_no_blocks_at_all() -> None:
    assert inverse_root(torch.zeros(0, 3, 3), scale=1.0, eps=0.1)[0].shape == (0, 3, 3)
