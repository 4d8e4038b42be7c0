"""Inverse square roots (V^(1/2) + eps I)^(-1) of many small symmetric matrices at once, each of them checked.

Eigendecompositions are taken in float64 of V over its trace, and checked: float32 ones of a block with zero rows come
out as NaN, or wrong by more than a step can bear, without any error. A block whose decomposition fails counts, and is
treated as if it were diagonal.

V is known up to the rounding of its own dtype, so that a rank-deficient V has eigenvalues of that size, of either sign,
where it should have zeros: `unit * trace` is added to all of them. It is the smallest eigenvalue that means anything,
and bounds what a rounding error in the momentum can grow to.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("auto", "eigh", "newton-schulz")
ITERATIONS = 32
TOLERANCE = 1e-10
FEWEST_FOR_THREADS = 64


class Spectrum(NamedTuple):
    """Eigenvectors and roots of eigenvalues: V^(1/2) = Q diag(r) Q'.

    Attributes:
        vectors: Tensor [count, size, size], float64, eigenvectors in columns.
        roots: Tensor [count, size], float64, at least 0.
        failed: how many blocks were taken as diagonal.
    """

    vectors: Tensor
    roots: Tensor
    failed: int


def spectrum(moments: Tensor) -> Spectrum:
    """Q and r of each block, V = Q diag(r^2) Q'.

    Args:
        moments: Tensor [count, size, size], symmetric and positive semidefinite up to rounding, of any scale.

    Source: arXiv 1905.10757; the shift, float64 and the checks are ours (the paper's code shifts by 1e-6).
    """
    scaled, size = _scaled(moments)
    values, vectors = _decomposed(scaled)
    # One product with a vector that leans to no axis finds a wrong decomposition at a fraction of its cost.
    probe = torch.linspace(1, 2, moments.shape[-1], dtype=torch.float64, device=moments.device)
    back = vectors @ (values.unsqueeze(-1) * (vectors.mT @ probe).unsqueeze(-1))
    right = ((back.squeeze(-1) - scaled @ probe).abs() <= TOLERANCE * probe.norm()).all(-1)
    right &= ((vectors.mT @ probe).norm(dim=-1) - probe.norm()).abs() <= TOLERANCE * probe.norm()
    right &= moments.isfinite().all(-1).all(-1)
    roots = (values.clamp(min=0) + _unit(moments)).sqrt() * size.unsqueeze(-1)
    failed = int((~right).sum())
    if failed:
        diagonal = moments.diagonal(dim1=-2, dim2=-1).double().sqrt()
        roots = torch.where(right.unsqueeze(-1), roots, diagonal)
        vectors = torch.where(right[:, None, None], vectors, torch.eye(moments.shape[-1]).to(vectors))
    return Spectrum(vectors, roots, failed)


def reciprocal(denominators: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0 or no number: what has had no gradient, or a gradient too large, does not move."""
    return torch.where(denominators > 0, denominators.reciprocal(), 0)


def inverse_root(moments: Tensor, *, scale: float, eps: float, method: str = "eigh") -> tuple[Tensor, int]:
    """(scale V^(1/2) + eps I)^(-1) of each block.

    Args:
        moments: as for `spectrum`.
        scale, eps: numbers, at least 0.
        method: "eigh", or "newton-schulz": products alone, for a GPU. Blocks that it does not solve go to "eigh".

    Returns:
        Tensor [count, size, size], float64, and how many blocks were taken as diagonal.
    """
    if method == "eigh":
        vectors, roots, failed = spectrum(moments)
        return (vectors * reciprocal(scale * roots + eps).unsqueeze(-2)) @ vectors.mT, failed
    inverse, solved = _inverse_by_products(moments, scale, eps)
    if solved.all():
        return inverse, 0
    inverse[~solved], failed = inverse_root(moments[~solved], scale=scale, eps=eps)
    return inverse, failed


def root_by_newton_schulz(matrices: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """A^(1/2) of positive definite matrices of trace 1, by Y <- Y T, Z <- T Z, T = (3 I - Z Y) / 2 from Y = A, Z = I.

    32 iterations reach the floor of float64 for condition numbers up to 1e8.

    Source: N. Higham, Functions of Matrices, section 6.7.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    y, z = matrices, identity.expand_as(matrices)
    for _ in range(iterations):
        t = torch.baddbmm(identity, z, y, beta=1.5, alpha=-0.5)  # [count, size, size]
        y, z = y @ t, t @ z
    return y


def _inverse_by_products(moments: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    scaled, size = _scaled(moments)
    identity = torch.eye(moments.shape[-1], dtype=torch.float64, device=moments.device)
    shifted = scaled + _unit(moments) * identity
    norm = shifted.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    root = root_by_newton_schulz(shifted / norm) * norm.sqrt()
    # The smallest eigenvalue, the shift, is right to a thousandth; in float64 it is too small for products to find.
    right = ((root @ root - shifted).abs() <= 1e-3 * _unit(moments) * norm).flatten(1).all(-1)
    root = (root + root.mT) / 2 * (scale * size)[:, None, None] + eps * identity
    inverse, info = torch.linalg.inv_ex(root)
    right &= (info == 0) & (size > 0) & moments.isfinite().all(-1).all(-1) & inverse.isfinite().all(-1).all(-1)
    return inverse, right


def _scaled(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks over their trace, in float64, and the root of the trace; what is not finite is zero.

    Sums of outer products are symmetric up to rounding alone; LAPACK would read one half, and products both.
    """
    doubled = torch.nan_to_num(moments.double(), nan=0.0, posinf=0.0, neginf=0.0)
    largest = doubled.diagonal(dim1=-2, dim2=-1).amax(-1)
    # By the largest number first: neither the smallest nor the largest doubles then leave their range.
    doubled = doubled / largest.where(largest > 0, 1)[:, None, None]
    doubled = (doubled + doubled.mT) / 2
    trace = doubled.diagonal(dim1=-2, dim2=-1).sum(-1)
    return doubled / trace.where(trace > 0, 1)[:, None, None], trace.sqrt() * largest.sqrt()


def _unit(moments: Tensor) -> float:
    return torch.finfo(moments.dtype).eps


def _decomposed(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a batch; on a CPU each thread takes a share of the blocks.

    LAPACK shares one small matrix among threads, at a loss. Each worker here is one-threaded, which torch keeps for
    each thread by itself.
    """
    threads = torch.get_num_threads()
    if matrices.device.type != "cpu" or threads == 1 or len(matrices) < threads * FEWEST_FOR_THREADS:
        return _decomposed_or_nan(matrices)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # LAPACK rounds by where a matrix lies in a cache line: shares that begin at one give the same bits as one
            # thread does.
            share = -(-len(matrices) // (8 * threads)) * 8
            shares = list(pool.map(_decomposed_or_nan, torch.split(matrices, share)))
    finally:
        # The workers' number also became that of threads yet to come.
        torch.set_num_threads(threads)
    return torch.cat([values for values, _ in shares]), torch.cat([vectors for _, vectors in shares])


def _decomposed_or_nan(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix that LAPACK gives up on is NaN, instead of an error for the whole batch."""
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(matrices) == 1:
            return torch.full_like(matrices[..., 0], torch.nan), torch.full_like(matrices, torch.nan)
        halves = [_decomposed_or_nan(half) for half in matrices.tensor_split(2)]
        return torch.cat([values for values, _ in halves]), torch.cat([vectors for _, vectors in halves])
    return values, vectors
