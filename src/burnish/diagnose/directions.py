"""How well steps along random directions follow a gradient: the subspace alignment of zeroth-order methods.

A two-point method sees e = (z . g) z of a gradient g, with a random z. On an L-smooth loss the step eta e lowers the
loss on average by at least eta E[e . g] - eta^2 L E|e|^2 / 2. With

    alpha = E[e . g] / |g|^2 = E(z . g)^2 / |g|^2,      s = E|e|^2 / |g|^2 = E (z . g)^2 |z|^2 / |g|^2

the best step is eta = alpha / (s L), and it lowers the loss by alpha^2 / s times |g|^2 / 2 L: the share alpha^2 / s of
what a gradient step is sure of. For z ~ N(0, M) both follow from tr M, g'Mg and g'M^2 g; with a projector M = P of rank
k they are rho and (k + 2) rho, rho = |P g|^2 / |g|^2.

Source: the questions (subspace alignment, intrinsic dimension, stable rank) are those of arXiv 2501.19099, of which
only the abstract is known here. The definitions and closed forms are reconstructions, ours; tests hold them against
exact quadrature and sampling.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.optim.blocks import derived_seed
from burnish.optim.mezo import MeZO
from burnish.optim.perturbation import (
    Direction,
    Gaussian,
    LowRank,
    Perturbation,
    Rademacher,
    Row,
    Sparse,
    Subspace,
    row,
)

Blocks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Alignment:
    """Moments of the estimate e = (z . g) z.

    Attributes:
        alpha: E[e . g] / |g|^2, how much of the gradient the mean estimate keeps.
        second_moment: s = E|e|^2 / |g|^2.
        alpha_error: standard error of a sampled alpha, else 0.
        second_moment_error: of a sampled s, else 0.
    """

    alpha: float
    second_moment: float
    alpha_error: float = 0.0
    second_moment_error: float = 0.0

    @property
    def efficiency(self) -> float:
        """alpha^2 / s: what a step gains, as a share of what a gradient step gains."""
        return self.alpha**2 / self.second_moment

    @property
    def best_step(self) -> float:
        """alpha / s: the best learning rate times the smoothness constant L."""
        return self.alpha / self.second_moment


def covariance_alignment(covariance: Tensor, gradient: Tensor) -> Alignment:
    """Alignment of z ~ N(0, M).

    Args:
        covariance: M, Tensor `[d, d]`, symmetric and positive semidefinite.
        gradient: g, Tensor `[d]`, not zero.
    """
    covariance, gradient = covariance.double(), gradient.double()
    image = covariance @ gradient
    length = gradient @ gradient
    second = (covariance.trace() * (gradient @ image) + 2 * (image @ image)) / length
    return Alignment(float(gradient @ image / length), float(second))


def intrinsic_dimension(covariance: Tensor) -> float:
    """tr M / |M|_2 of a covariance `[d, d]`: the rank of a projector, and less where some directions matter more."""
    values = torch.linalg.eigvalsh(covariance.double())
    return float(values.sum() / values[-1])


def stable_rank(matrix: Tensor) -> float:
    """|A|_F^2 / |A|_2^2 of a matrix `[m, n]`: at most its rank."""
    values = torch.linalg.svdvals(matrix.double())
    return float(values.square().sum() / values[0].square())


def expected_alignment(
    perturbation: Perturbation,
    gradients: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
    blocks: Blocks | None = None,
) -> Alignment:
    """The alignment of a perturbation in closed form, averaged over all that it draws.

    What it keeps for an epoch (`LowRank`, `Subspace`) is averaged over epochs: within one, alpha is another.

    Args:
        perturbation: how z is drawn.
        gradients: g, a tensor a parameter.
        weights: of the same shapes; needed where a perturbation goes by magnitude.
        blocks: positions of tensors that are perturbed together, one block a step, each as often as the others; None
            perturbs all at once.

    Raises:
        ValueError: a gradient of zero, a position that is not there, or weights that are missing.
    """
    weights, blocks, total = _checked(perturbation, gradients, weights, blocks)
    lengths = [float(gradient.double().square().sum()) for gradient in gradients]
    moments = [_moments(perturbation, *pair) for pair in zip(gradients, weights, strict=True)]
    alpha = second = 0.0
    for block in blocks:
        energy = sum(moments[index].energy for index in block)
        for index in block:
            one = moments[index]
            alpha += lengths[index] * one.alpha
            # Other tensors of the block are drawn independently of this one: cross terms have mean zero.
            second += lengths[index] * (one.second_moment + one.alpha * (energy - one.energy))
    return Alignment(alpha / (len(blocks) * total), second / (len(blocks) * total))


def sampled_alignment(
    perturbation: Perturbation,
    gradients: Sequence[Tensor],
    *,
    num_samples: int,
    seed: int = 0,
    weights: Sequence[Tensor] | None = None,
    blocks: Blocks | None = None,
    epoch: int | None = None,
) -> Alignment:
    """The alignment of a perturbation by drawing the directions that the optimizers draw.

    Args:
        perturbation: how z is drawn.
        gradients: g, a tensor a parameter.
        num_samples: directions, at least 2.
        seed: of the directions.
        weights: as in `expected_alignment`.
        blocks: as in `expected_alignment`.
        epoch: what the perturbation keeps for an epoch is that of this one; None draws it anew with each direction.

    Raises:
        ValueError: as `expected_alignment`, or fewer than 2 samples.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples={num_samples}: expected at least 2, to tell the error of a mean")
    weights, blocks, total = _checked(perturbation, gradients, weights, blocks)
    rows = _rows(perturbation, gradients, weights)
    first, second = [], []
    for sample in range(num_samples):
        direction = _direction(perturbation, seed, sample, epoch)
        chosen = [rows[index] for index in blocks[derived_seed(seed, "block", sample) % len(blocks)]]
        product = energy = 0.0
        columns = (pair for one in chosen for pair in one.pieces)
        for (_, gradient), noise in zip(columns, direction.walk(chosen), strict=True):
            product += float((noise.double() * gradient).sum())
            energy += float(noise.double().square().sum())
        first.append(product**2 / total)
        second.append(first[-1] * energy)
    errors = [statistics.stdev(values) / math.sqrt(num_samples) for values in (first, second)]
    return Alignment(statistics.fmean(first), statistics.fmean(second), *errors)


def subspace_share(
    perturbation: Perturbation,
    gradients: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
    blocks: Blocks | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> float:
    """rho = |P g|^2 / |g|^2, P onto all directions that the steps of one epoch can take.

    Args:
        perturbation: how z is drawn.
        gradients: g, a tensor a parameter.
        weights: as in `expected_alignment`.
        blocks: the tensors of these blocks are perturbed; None for all.
        seed: as of `sampled_alignment`.
        epoch: as of `sampled_alignment`.

    Raises:
        ValueError: as `expected_alignment`.
    """
    weights, blocks, total = _checked(perturbation, gradients, weights, blocks)
    rows = [_rows(perturbation, gradients, weights)[index] for index in sorted({i for block in blocks for i in block})]
    direction = _direction(perturbation, seed, 0, epoch)
    for _ in direction.walk(rows):
        pass
    inside = 0.0
    for one in rows:
        gradient, held = gradients[one.index].double(), direction.bases.get(one.index)
        if held is not None:
            *left, right = (basis.double() for basis in held[1])
            gradient = gradient.reshape(len(gradient), -1)
            if isinstance(perturbation, LowRank):
                gradient = gradient @ torch.linalg.qr(right.mT).Q
            else:
                gradient = left[0].mT @ gradient @ right
        elif "threshold" in one.notes:
            gradient = gradient[weights[one.index].abs() <= one.notes["threshold"]]
        inside += float(gradient.square().sum())
    return inside / total


def quadratic_course(
    optimizer: Callable[[list[tuple[str, Tensor]]], MeZO],
    curvatures: Sequence[Tensor],
    steps: int,
    *,
    seed: int = 0,
) -> list[float]:
    """Losses of a zeroth-order optimizer on sum h x^2 / 2, at the start and after each step.

    A two-point estimate is exact there, whatever its eps. Where all curvatures are L, the mean loss falls by the factor
    1 - alpha^2 / s a step at the best learning rate.

    Args:
        optimizer: called with named tensors `layers.<i>.x`, float64.
        curvatures: h, one tensor for each of those.
        steps: to take.
        seed: of the start, which is Gaussian.
    """
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(h.shape, generator=draw, dtype=torch.float64) for h in curvatures]

    def loss() -> float:
        return sum(float((h * x * x).sum()) for h, x in zip(curvatures, tensors, strict=True)) / 2

    chosen = optimizer([(f"layers.{index}.x", tensor) for index, tensor in enumerate(tensors)])
    losses = [loss()]
    for _ in range(steps):
        chosen.step(loss)
        losses.append(loss())
    return losses


@dataclass(frozen=True)
class _Moments:
    """Of the direction within one tensor; `energy` is E|z|^2."""

    alpha: float
    second_moment: float
    energy: float


def _moments(perturbation: Perturbation, gradient: Tensor, weights: Tensor) -> _Moments:
    size, matrix = gradient.numel(), gradient.ndim >= 2
    rows, columns = (len(gradient), size // len(gradient)) if matrix else (1, size)
    match perturbation:
        case Rademacher():
            return _Moments(1.0, size, size)
        case Sparse(keep=keep, by="random"):
            return _Moments(keep, keep * (3 + (size - 1) * keep), keep * size)
        case Sparse():
            mask = weights.abs() <= perturbation.prepare(weights)["threshold"]
            kept = int(mask.sum())
            inside = float(gradient[mask].double().square().sum())
            share = inside / float(gradient.double().square().sum()) if inside else 0.0
            return _Moments(share, (kept + 2) * share, kept)
        case LowRank(rank=rank, normalize=normalize) if matrix:
            # Given V, the rows of U V' are N(0, S) with S = V V' of a Wishart distribution: E[tr(S) S] = r (n r + 2) I
            # and E[S^2] = r (r + n + 1) I.
            second = rows * rank * (columns * rank + 2) + 2 * rank * (rank + columns + 1)
            scale = 1 / rank if normalize else 1.0
            return _Moments(scale * rank, scale**2 * second, scale * rank * size)
        case Subspace() if matrix:
            rank = min(perturbation.rank, rows, columns)
            return _Moments(1.0, size / rank**2 * (rank**2 + 2), size)
        case Gaussian() | LowRank() | Subspace():
            return _Moments(1.0, size + 2, size)
    raise ValueError(f"{type(perturbation).__name__} has no closed form here: use sampled_alignment")


def _checked(
    perturbation: Perturbation, gradients: Sequence[Tensor], weights: Sequence[Tensor] | None, blocks: Blocks | None
) -> tuple[Sequence[Tensor], Blocks, float]:
    """Weights and blocks, given or not, and the gradient's squared length."""
    total = sum(float(gradient.double().square().sum()) for gradient in gradients)
    if not total:
        raise ValueError(f"the gradient of {len(gradients)} tensors is zero: nothing can be aligned with it")
    if weights is None:
        if perturbation.unperturbed:
            raise ValueError(f"{type(perturbation).__name__} goes by the magnitude of the weights: give weights")
        weights = [torch.zeros_like(gradient) for gradient in gradients]
    blocks = [range(len(gradients))] if blocks is None else blocks
    if not blocks or any(not 0 <= index < len(gradients) for block in blocks for index in block):
        raise ValueError(f"blocks={blocks}: expected one or more, of positions 0 to {len(gradients) - 1}")
    return weights, blocks, total


def _rows(perturbation: Perturbation, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Row]:
    return [
        row(index, pair, perturbation.prepare(pair[0]), split=perturbation.elementwise)
        for index, pair in enumerate(zip(weights, gradients, strict=True))
    ]


def _direction(perturbation: Perturbation, seed: int, sample: int, epoch: int | None) -> Direction:
    slow = derived_seed(seed, "slow", sample if epoch is None else f"epoch {epoch}")
    return Direction(perturbation, derived_seed(seed, sample), slow)
