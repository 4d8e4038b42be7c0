"""The top eigenvalues and eigenvectors of a loss's Hessian, from products with vectors alone, on any device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from burnish.diagnose.hessian import Hessian, Loss, Parameters

Which = Literal["LM", "LA"]
Method = Literal["lanczos", "power"]
Product = Callable[[Tensor], Tensor]

GUARD_VECTORS = 8
"""Vectors that power iteration carries beyond k: a step shrinks the error by |lambda_(k + 9) / lambda_k|."""


@dataclass(frozen=True)
class Eigenpairs:
    """The top of a spectrum.

    Attributes:
        values: Tensor `[k]`, descending; the first is the sharpness.
        vectors: Tensor `[numel, k]`, orthonormal columns.
        residuals: Tensor `[k]`, ||H v - lambda v||.
        products: Hessian-vector products that it took.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


def top_eigenpairs(
    loss: Loss,
    params: Parameters,
    k: int,
    *,
    method: Method = "lanczos",
    which: Which = "LM",
    tol: float = 1e-4,
    max_iterations: int = 300,
    seed: int = 0,
    start: Eigenpairs | None = None,
) -> Eigenpairs:
    """The k top eigenpairs of the Hessian of a loss at the present parameters.

    "lanczos" grows a Krylov space from k + 1 starts, so that all copies of a repeated eigenvalue are found, and
    restarts it from its best vectors when it holds max(2k + 1, 20); in memory are twice as many vectors. "power" is
    block power iteration with a QR factorisation: many more products, in matrix products of fixed size.
    Both end when ||H v - lambda v|| <= tol |lambda_1| for all k.

    Args:
        loss: of the full training subset, a micro-batch at a time: see `Loss`.
        params: see `Parameters`; vectors are laid out in their order.
        k: how many; the number of classes in the source.
        method: "lanczos" or "power".
        which: "LM", the largest in magnitude, or "LA", the largest.
        tol: relative to the largest magnitude of the k eigenvalues.
        max_iterations: steps: a product each under "lanczos", k + 8 products each under "power".
        seed: of the random start.
        start: eigenpairs at parameters nearby; saves products.

    Returns:
        Eigenpairs. If they did not converge, a RuntimeWarning says so, and the residuals say how far they are.

    Raises:
        ValueError: k outside 1..numel, an unknown method or `which`, tol below the rounding error of the parameters'
            type, a start of another size, or what `Hessian` refuses.
        BurnishError: the loss or its derivatives are not finite.

    Source: Song, Ahn and Yun, "Does SGD really happen in tiny subspaces?", arXiv 2405.16002, with the settings of its
    predecessors' public code (`eigsh`, LM). Where we differ: `eigsh` grows its space from one start, which can end
    without the further copies of a repeated eigenvalue; ours from k + 1.

    Examples:
        >>> x = torch.zeros(3, requires_grad=True)
        >>> top_eigenpairs(lambda: (torch.tensor([3.0, 5.0, 1.0]) * x**2).sum() / 2, [x], 2).values.round(decimals=3)
        tensor([5., 3.])
    """
    hessian = Hessian(loss, params)
    check_options(hessian, k, method=method, which=which, tol=tol, max_iterations=max_iterations)
    if start is not None and len(start.vectors) != hessian.size:
        raise ValueError(f"start has vectors of {len(start.vectors)} elements: expected {hessian.size}")
    block = _start(k, 1 if method == "lanczos" else GUARD_VECTORS, hessian, start, seed)
    solve = _lanczos if method == "lanczos" else _power
    values, vectors, residuals = solve(hessian, block, k, which, tol, max_iterations)
    unconverged = int((residuals > tol * values.abs().max()).sum())
    if unconverged:
        warnings.warn(
            f"{unconverged} of {k} eigenpairs did not converge to tol={tol} in max_iterations={max_iterations} (largest"
            f" residual {residuals.max():.3g}, largest eigenvalue {values.abs().max():.3g}): raise either, or lower k",
            RuntimeWarning,
            stacklevel=2,
        )
    order = values.argsort(descending=True)
    return Eigenpairs(values[order], vectors[order].mT, residuals[order], hessian.products)


def check_options(hessian: Hessian, k: int, *, method: str, which: str, tol: float, max_iterations: int) -> None:
    """Refuse options of `top_eigenpairs` that are out of range.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """
    if not 1 <= k <= hessian.size:
        raise ValueError(f"k={k}: expected 1..{hessian.size}, the size of params")
    if method not in ("lanczos", "power"):
        raise ValueError(f"method={method!r}: choose lanczos or power")
    if which not in ("LM", "LA"):
        raise ValueError(f"which={which!r}: choose LM (largest magnitude) or LA (largest)")
    rounding = 10 * torch.finfo(hessian.tensors[0].dtype).eps
    if not rounding <= tol < 1:
        raise ValueError(f"tol={tol}: expected {rounding:.1g}..1 for {hessian.tensors[0].dtype}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations}: expected 1 or more")


def _start(k: int, more: int, hessian: Hessian, start: Eigenpairs | None, seed: int) -> Tensor:
    """Rows `[k + more, numel]` to start from: up to k of the start's, and random ones, so that others can come in."""
    like = hessian.tensors[0]
    known = torch.empty(0, hessian.size) if start is None else start.vectors[:, :k].mT
    missing = min(k + more, hessian.size) - len(known)
    random = torch.randn(missing, hessian.size, generator=torch.Generator().manual_seed(seed))
    return torch.cat([known.to(like), random.to(like)])


def _ritz(small: Tensor, which: Which) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[j]` and eigenvectors `[j, j]` (columns) of the Hessian within a space, the wanted ones first."""
    values, coefficients = torch.linalg.eigh(small)
    order = (values.abs() if which == "LM" else values).argsort(descending=True)
    return values[order], coefficients[:, order]


def _residual(values: Tensor, coefficients: Tensor, basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz vectors v and H v - lambda v, as rows, of orthonormal rows and their images under H."""
    turn = coefficients.mT.to(basis)
    vectors = turn @ basis
    return vectors, turn @ images - values.to(basis)[:, None] * vectors


def _lanczos(
    product: Product, block: Tensor, k: int, which: Which, tol: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[k]`, vectors `[k, numel]`, residuals `[k]`.

    The next direction is the largest residual among the wanted pairs, which from one start spans the spaces of Lanczos
    with thick restarts; the images of the basis are kept, so that residuals are measured, not estimated.
    """
    size = block.shape[1]
    room = min(size, max(2 * k + 1, 20, len(block) + 1))
    basis, images = block.new_empty(room, size), block.new_empty(room, size)
    small = torch.zeros(room, room, dtype=torch.float64)
    filled = 0
    directions = list(block)
    for taken in range(1, max_iterations + len(block) + 1):
        direction = directions.pop(0)
        for _ in range(2):  # once would leave the rounding errors of what was taken off
            direction = direction - (basis[:filled] @ direction) @ basis[:filled]
            direction = direction / direction.norm()
        basis[filled], images[filled] = direction, product(direction)
        column = (basis[: filled + 1] @ images[filled]).double().cpu()
        small[: filled + 1, filled] = small[filled, : filled + 1] = column
        filled += 1
        if directions:
            continue
        values, coefficients = _ritz(small[:filled, :filled], which)
        # For 2k products the next pair must converge too, lest a good start ends the search for what it does not hold.
        wanted = k + (taken < 2 * k)
        vectors, errors = _residual(values[:wanted], coefficients[:, :wanted], basis[:filled], images[:filled])
        residuals = errors.norm(dim=1)
        if filled == size or (residuals <= tol * values[:k].abs().max()).all():
            break
        directions.append(errors[residuals.argmax()])
        if filled == room:
            filled = (room + k) // 2
            turn = coefficients[:, :filled].mT.to(basis)
            basis[:filled], images[:filled] = turn @ basis, turn @ images
            small = torch.zeros_like(small)
            small.diagonal()[:filled] = values[:filled]
    return values[:k].to(basis), vectors[:k], residuals[:k]


def _power(
    product: Product, block: Tensor, k: int, which: Which, tol: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[k]`, vectors `[k, numel]`, residuals `[k]`."""
    basis = torch.linalg.qr(block.mT).Q.mT
    for _ in range(max_iterations):
        images = torch.stack([product(row) for row in basis])
        small = (basis @ images.mT).double().cpu()
        values, coefficients = _ritz((small + small.mT) / 2, which)
        vectors, errors = _residual(values, coefficients, basis, images)
        residuals = errors[:k].norm(dim=1)
        if (residuals <= tol * values[:k].abs().max()).all():
            break
        # Shifted by the most negative value seen, the largest eigenvalue is also the largest in magnitude.
        shift = max(0.0, -float(values.min())) if which == "LA" else 0.0
        basis = torch.linalg.qr((errors + (values.to(basis)[:, None] + shift) * vectors).mT).Q.mT
    return values[:k].to(basis), vectors[:k], residuals
