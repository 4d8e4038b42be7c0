"""Triangles of symmetric matrices: what goes in comes out, and outer products are added where they belong."""

from __future__ import annotations

import pytest
import torch

from burnish.optim import symmetric
from burnish.optim.symmetric import add_outer_products, diagonals, fold, triangle, unfold

SIZES = (1, 2, 3, 5, 10, 33)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_rows_of_the_lower_triangle_one_after_the_other() -> None:
    matrix = torch.tensor([[1, 2, 4], [2, 3, 5], [4, 5, 6]])
    assert fold(matrix.unsqueeze(0)).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert torch.equal(unfold(torch.tensor([[1, 2, 3, 4, 5, 6]]), 3)[0], matrix)
    assert diagonals(torch.tensor([[1, 2, 3, 4, 5, 6]]), 3).tolist() == [[1, 3, 6]]


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(size: int) -> None:
    x = draw(7, size, size)
    matrices = x + x.mT
    folded = fold(matrices)
    assert folded.shape == (7, triangle(size)) == (7, len(torch.tril_indices(size, size)[0]))
    assert torch.equal(unfold(folded, size), matrices)
    assert torch.equal(diagonals(folded, size), matrices.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kept", "taken"), [(1.0, 1.0), (0.9, 0.1)])
@pytest.mark.parametrize("piece", [1, 100, 2**17])
def test_outer_products_in_pieces_of_any_size(
    size: int, kept: float, taken: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "PIECE", piece)
    x, v = draw(7, size, size), draw(7, size)
    triangles = fold(x + x.mT)
    expected = kept * (x + x.mT) + taken * v.unsqueeze(2) * v.unsqueeze(1)
    add_outer_products(triangles, v, kept=kept, taken=taken)
    torch.testing.assert_close(unfold(triangles, size), expected, rtol=1e-14, atol=1e-14)


def test_none_at_all() -> None:
    triangles = torch.zeros(0, 6)
    add_outer_products(triangles, torch.zeros(0, 3), kept=0.9, taken=0.1)
    assert unfold(triangles, 3).shape == (0, 3, 3) and diagonals(triangles, 3).shape == (0, 3)
