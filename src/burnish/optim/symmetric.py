"""Symmetric matrices [count, size, size] kept as their lower triangles [count, size (size + 1) / 2], row after row."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Rows of triangles that are updated at once, in numbers: what is gathered for them stays in the cache.
PIECE = 2**17


def triangle(size: int) -> int:
    """How many numbers a symmetric matrix has."""
    return size * (size + 1) // 2


def fold(matrices: Tensor) -> Tensor:
    """Lower triangles [count, size (size + 1) / 2] of matrices [count, size, size]."""
    rows, columns = _places(matrices.shape[-1], matrices.device)
    return matrices.flatten(1).index_select(1, rows * matrices.shape[-1] + columns)


def unfold(triangles: Tensor, size: int) -> Tensor:
    """The matrices [count, size, size] whose triangles these are: the inverse of `fold`."""
    places = torch.arange(size, device=triangles.device)
    high, low = torch.maximum(places, places.unsqueeze(1)), torch.minimum(places, places.unsqueeze(1))
    return triangles.index_select(1, (high * (high + 1) // 2 + low).flatten()).view(-1, size, size)


def diagonals(triangles: Tensor, size: int) -> Tensor:
    """The diagonals [count, size] of matrices, from their triangles."""
    places = torch.arange(size, device=triangles.device)
    return triangles.index_select(1, places * (places + 3) // 2)


def add_outer_products(triangles: Tensor, vectors: Tensor, *, kept: float, taken: float) -> None:
    """V = kept V + taken v v' for the triangles of matrices V and vectors [count, size], in place."""
    rows, columns = _places(vectors.shape[1], vectors.device)
    limit = max(1, PIECE // max(1, len(rows)))
    for some, each in zip(torch.split(triangles, limit), torch.split(vectors, limit), strict=True):
        if kept != 1:
            some.mul_(kept)
        some.addcmul_(each.index_select(1, rows), each.index_select(1, columns), value=taken)


@functools.lru_cache(maxsize=256)
def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows, columns
