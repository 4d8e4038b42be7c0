"""Optimizers on two factors of one matrix, the model problem of a LoRA adapter: flows, trajectories, closed forms.

The loss is 1/2 ||A B - Y||^2 + l2/2 (||A||^2 + ||B||^2). Under gradient descent large singular values of Y are learned
first, exponentially; with steps that are orthogonalised for each factor, the square roots of all active singular values
of A B grow at the same rate, so that the small ones arrive first.

Source: "Uniform Spectral Growth and Convergence of Muon in LoRA-Style Matrix Factorization", arXiv 2602.06385. Its
problem, orthogonalised flow and statements are confirmed through abstract and notes of readers; the smoothed operator,
what l2 does inside it, and the closed forms are reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from burnish.diagnose.spectrum import lora_singular_values
from burnish.optim.orthogonalization import orthogonalize


@dataclass(frozen=True, eq=False)
class Factorization:
    """A point of the problem.

    Attributes:
        a: Tensor `[m, r]`.
        b: Tensor `[r, n]`.
        target: Tensor `[m, n]`, Y.
    """

    a: Tensor
    b: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        if self.a.shape[1] != self.b.shape[0] or (self.a.shape[0], self.b.shape[1]) != self.target.shape:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (self.a, self.b, self.target))
            raise ValueError(f"a, b and target are {shapes}: expected [m, r], [r, n] and [m, n]")

    @property
    def error(self) -> Tensor:
        """A B - Y, Tensor `[m, n]`."""
        return self.a @ self.b - self.target

    @property
    def singular_values(self) -> Tensor:
        """Of A B, Tensor `[r]`, float64."""
        return lora_singular_values(self.a, self.b)

    @property
    def imbalance(self) -> Tensor:
        """A^T A - B B^T, Tensor `[r, r]`: gradient flow conserves it, and l2 lets it decay as exp(-2 l2 t)."""
        return self.a.mT @ self.a - self.b @ self.b.mT

    def gradients(self, l2: float = 0.0) -> tuple[Tensor, Tensor]:
        """Of the loss, for A `[m, r]` and for B `[r, n]`."""
        error = self.error
        return error @ self.b.mT + l2 * self.a, self.a.mT @ error + l2 * self.b


def lora_start(target: Tensor, rank: int, *, size: float, generator: torch.Generator) -> Factorization:
    """The start of a LoRA adapter: A = 0, and B Gaussian with standard deviation `size`.

    Args:
        target: Tensor `[m, n]`.
        rank: r.
        size: gamma of the source; how uneven the growth is is proportional to it.
        generator: for the draw.
    """
    rows, columns = target.shape
    draw = torch.randn(rank, columns, generator=generator, dtype=target.dtype)
    return Factorization(target.new_zeros(rows, rank), size * draw, target)


def matrix_with(singular_values: Sequence[float], rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix `[rows, columns]`, float64, of these singular values in uniformly drawn directions."""
    values = torch.tensor(singular_values, dtype=torch.float64)

    def frame(length: int) -> Tensor:
        draw = torch.randn(length, len(values), generator=generator, dtype=torch.float64)
        orthonormal, upper = torch.linalg.qr(draw)
        uniform: Tensor = orthonormal * upper.diagonal().sign()  # the signs of QR alone are not random
        return uniform

    return frame(rows) * values @ frame(columns).mT


Direction = Callable[[Factorization, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a point and the gradients of its factors to what is subtracted from each factor, per unit of time."""


def gradient(point: Factorization, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient flow (GF): the gradients as they are."""
    return grad_a, grad_b


def spectral(point: Factorization, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
    """Spectral gradient flow (SpecGF): T(G) = U V^T of each gradient G = U S V^T; directions without gradient stay."""
    return orthogonalize(grad_a, method="svd"), orthogonalize(grad_b, method="svd")


def smoothed(beta: float) -> Direction:
    """Smoothed spectral flow: T_beta(G) = (G G^T + beta^2 I)^(-1/2) G, which sends s to s / sqrt(s^2 + beta^2).

    It is T for beta -> 0 and G / beta for small G, so that it comes to rest where T would go on to oscillate. The form
    is reconstructed: the source only says that T_beta is analytic and near T.

    Raises:
        ValueError: beta is not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: expected a number above 0, or the exact `spectral`")

    def operator(matrix: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        smooth: Tensor = (u * (s / torch.hypot(s, torch.full_like(s, beta)))) @ vh
        return smooth

    return lambda point, grad_a, grad_b: (operator(grad_a), operator(grad_b))


def lora_muon(point: Factorization, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
    """LoRA-Muon: a spectral step of the product, whichever factors it is written in.

    Delta A = T(G_A R_B) R_B / 2 and Delta B = R_A T(R_A G_B) / 2, with R_B = (B B^T)^(-1/2) and R_A = (A^T A)^(-1/2).
    To first order the product then moves by two polar factors of half length each. A factor of zero gives no direction.

    Source: arXiv 2606.12921, without its momentum; there W = A B^T, here W = A B.
    """
    root_a, root_b = _inverse_root(point.a.mT @ point.a), _inverse_root(point.b @ point.b.mT)
    move_a = orthogonalize(grad_a @ root_b, method="svd") @ root_b
    move_b = root_a @ orthogonalize(root_a @ grad_b, method="svd")
    return move_a / 2, move_b / 2


def _inverse_root(gram: Tensor) -> Tensor:
    """Of a positive semidefinite matrix; 0 where it is 0 up to rounding."""
    values, vectors = torch.linalg.eigh(gram)
    known = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors * torch.where(known, values, torch.inf).rsqrt() @ vectors.mT
    return root


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What was seen on the way.

    Attributes:
        steps: at which it was measured, from 0; T of them.
        times: Tensor `[T]`: steps times learning rate.
        singular_values: Tensor `[T, r]` of A B, float64, descending.
        residuals: Tensor `[T]`, ||A B - Y||.
        end: the last point.
    """

    steps: tuple[int, ...]
    times: Tensor
    singular_values: Tensor
    residuals: Tensor
    end: Factorization

    def at_share(self, share: float) -> Tensor:
        """Singular values `[r]` when their sum first reaches a share of that of the r largest of the target.

        Raises:
            ValueError: it never does.
        """
        best = torch.linalg.svdvals(self.end.target)[: self.singular_values.shape[1]].sum()
        reached = self.singular_values.sum(1) >= share * best
        if not reached.any():
            raise ValueError(f"share={share} of the target was not reached in {self.steps[-1]} steps")
        return self.singular_values[reached.int().argmax()]


def flow(
    start: Factorization,
    direction: Direction,
    *,
    lr: float,
    steps: int,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    every: int = 1,
) -> Trajectory:
    """Follow a flow with Euler steps of length `lr`; both factors move at once, from gradients at the old point.

    Args:
        start: where.
        direction: `gradient`, `spectral`, `smoothed(beta)`, `lora_muon`, or one's own.
        lr: eta; after n steps the time is n eta.
        steps: how many.
        l2: lambda of the loss: its gradient goes through the direction, which lowers each singular value by lambda.
        weight_decay: decoupled: each factor is multiplied by 1 - lr weight_decay. Under orthogonalised steps this
            bounds a factor's modes by 1 / weight_decay and lowers nothing below that.
        every: steps between measurements; the last is always measured.
    """

    def advance(point: Factorization) -> Factorization:
        move_a, move_b = direction(point, *point.gradients(l2))
        keep = 1 - lr * weight_decay
        return replace(point, a=keep * point.a - lr * move_a, b=keep * point.b - lr * move_b)

    return _follow(start, advance, lr, steps, every)


def descend(
    start: Factorization,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    *,
    steps: int,
    l2: float = 0.0,
    every: int = 1,
) -> Trajectory:
    """Train both factors with an optimizer of torch or of burnish.

    Args:
        start: where.
        optimizer: makes it from the two parameters.
        steps: how many.
        l2: as in `flow`.
        every: steps between measurements.

    Examples:
        >>> descend(start, lambda both: torch.optim.Adam(both, lr=0.01), steps=300)  # doctest: +SKIP
    """
    a, b = (torch.nn.Parameter(factor.clone()) for factor in (start.a, start.b))
    stepper = optimizer([a, b])

    def advance(point: Factorization) -> Factorization:
        a.grad, b.grad = point.gradients(l2)
        stepper.step()
        return replace(point, a=a.detach().clone(), b=b.detach().clone())

    return _follow(start, advance, stepper.param_groups[0]["lr"], steps, every)


def _follow(
    point: Factorization, advance: Callable[[Factorization], Factorization], lr: float, steps: int, every: int
) -> Trajectory:
    measured, values, residuals = [0], [point.singular_values], [point.error.norm()]
    for step in range(1, steps + 1):
        point = advance(point)
        if step % every == 0 or step == steps:
            measured.append(step)
            values.append(point.singular_values)
            residuals.append(point.error.norm())
    times = lr * torch.tensor(measured, dtype=torch.float64)
    return Trajectory(tuple(measured), times, torch.stack(values), torch.stack(residuals), point)


def best_residual(target: Tensor, rank: int) -> float:
    """||A B - Y|| at the global minimum without l2: the root of the sum of squares of the singular values cut off.

    Source: Eckart and Young (1936).
    """
    return float(torch.linalg.svdvals(target)[rank:].norm())


def soft_threshold(target: Tensor, rank: int, l2: float) -> Tensor:
    """Singular values `[rank]` of A B at the global minimum with l2: max(s - l2, 0), where the factors are balanced.

    Because min (||A||^2 + ||B||^2) / 2 over all factors of W is the nuclear norm of W.
    """
    values: Tensor = torch.linalg.svdvals(target)[:rank]
    return (values - l2).clamp(min=0)


def spectral_time(singular_value: float, share: float = 1.0) -> float:
    """When a mode reaches a share of its target under spectral flow from almost 0: sqrt(share s).

    Source: sqrt(d) grows at rate 1, arXiv 2602.06385, Theorem 5.7.
    """
    return math.sqrt(share * singular_value)


def gradient_time(singular_value: float, start: float, share: float) -> float:
    """When a balanced mode reaches a share of its target under gradient flow, from a singular value of A B of `start`.

    d' = 2 d (s - d) is logistic, so t = ln(share / (1 - share) * (s - start) / start) / (2 s).

    >>> round(gradient_time(2.0, 1e-4, 0.9), 5)
    3.02517
    """
    odds = share / (1 - share) * (singular_value - start) / start
    return math.log(odds) / (2 * singular_value)
