"""Parts of a gradient or an update inside and outside of the dominant subspace: pure functions of vectors.

P projects onto the span of the top k eigenvectors of the loss's Hessian (the walls of the valley), I - P onto the rest,
the bulk (the river). Vectors are laid out as the eigenvectors are: over the same tensors in the same order. The tensors
of a vector may be given one by one.

Source: Song, Ahn and Yun, "Does SGD really happen in tiny subspaces?", arXiv 2405.16002, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from burnish.diagnose.eigenpairs import Eigenpairs
from burnish.diagnose.hessian import flatten

Vector = Tensor | Sequence[Tensor]


def dominant(vector: Vector, subspace: Eigenpairs) -> Tensor:
    """P u: Tensor `[numel]`.

    Raises:
        ValueError: the vector is not of the size of the eigenvectors.
    """
    whole, vectors = laid_out(vector, subspace), subspace.vectors
    return vectors @ (vectors.mT @ whole)


def bulk(vector: Vector, subspace: Eigenpairs) -> Tensor:
    """(I - P) u: Tensor `[numel]`; with `dominant` it adds up to the vector."""
    return laid_out(vector, subspace) - dominant(vector, subspace)


def alignment(vector: Vector, subspace: Eigenpairs) -> float:
    """chi_k = ||P u|| / ||u||: 1 inside of the dominant subspace, 0 at right angles to it; NaN for a zero vector."""
    return math.sqrt(_share(dominant(vector, subspace), laid_out(vector, subspace)))


def bulk_share(vector: Vector, subspace: Eigenpairs) -> float:
    """||(I - P) u||^2 / ||u||^2 = 1 - chi_k^2, without the cancellation; NaN for a zero vector."""
    return _share(bulk(vector, subspace), laid_out(vector, subspace))


def _share(part: Tensor, whole: Tensor) -> float:
    return (part.double().square().sum() / whole.double().square().sum()).item()


def laid_out(vector: Vector, subspace: Eigenpairs) -> Tensor:
    """The vector as one Tensor `[numel]`, of the eigenvectors' type and on their device."""
    whole = flatten([vector] if isinstance(vector, Tensor) else vector).to(subspace.vectors)
    if len(whole) != len(subspace.vectors):
        raise ValueError(f"vector has {len(whole)} elements: the eigenvectors have {len(subspace.vectors)}")
    return whole
