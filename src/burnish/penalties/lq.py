"""l0, l1/2, l2/3, l1 and every other l_q with q in [0, 1]: the exact proximal map of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import threshold

from burnish.penalties.penalty import Penalty, check_strength

MOST_COEFFICIENTS = 6


@dataclass(frozen=True)
class Lq(Penalty):
    """strength times the sum of |x|^q, plus ridge / 2 times the sum of x^2.

    Args:
        q: 0 counts what is not zero, 1 is the lasso; in between neither convex nor biased for large weights. 1/2 and
            2/3 are the usual ones; any number in [0, 1] is exact.
        strength: beside a mean loss (see `mean_loss_strength`).
        ridge: makes the lasso an elastic net.

    Raises:
        ValueError: q outside of [0, 1], a negative strength.

    Source: arXiv 2007.07484; thresholds and closed forms of q = 0, 1/2, 2/3, 1 are special cases of this one. Ours:
    Newton on the scaled curve, and the ridge for any q.

    Examples:
        >>> Lq(0.5, 0.1).prox(torch.tensor([1.0, 0.5, 0.3, -0.35]))
        tensor([ 0.9487,  0.4231,  0.0000, -0.2500])
    """

    q: float
    strength: float
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.q <= 1):
            raise ValueError(f"q={self.q}: expected a number in [0, 1]; for a squared norm use weight_decay or ridge")
        check_strength(self.strength)
        check_strength(self.ridge, "ridge")

    def value(self, x: Tensor) -> Tensor:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        total = work.count_nonzero().to(work.dtype) if self.q == 0 else work.abs().pow(self.q).sum()
        return self.strength * total + 0.5 * self.ridge * work.square().sum()

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        if self.ridge:
            # Completing the square leaves the same problem at v / (1 + a) with d + a in place of d, a = step ridge.
            metric = torch.ones_like(x) if metric is None else metric
            x.mul_(metric)
            metric.add_(step * self.ridge)
            x.div_(metric)
        shrink_lq_(x, self.q, step * self.strength, metric)


class Curve(NamedTuple):
    """Scaled by v the map is one curve, x = v r(s) with s = kappa |v|^(q - 2), which jumps to zero at an edge.

    Attributes:
        edge: s there.
        left: r just before.
        beyond: an s a little further, where the curve still goes on; it ends where its slope is infinite.
    """

    edge: float
    left: float
    beyond: float


@lru_cache
def curve(q: float) -> Curve:
    """For q in [0, 1).

    The jump is from |v| = t to (2 (1 - q) / (2 - q)) t, for kappa = 1 to (2 (1 - q))^(1 / (2 - q)). The curve ends at
    half of that share, at 2^(q - 1) / q times the s of the edge.
    """
    left = 2 * (1 - q) / (2 - q)
    edge = ((2 * (1 - q)) ** (1 / (2 - q)) / left) ** (q - 2)
    return Curve(edge, left, edge * min(1.01, 0.75 + 0.25 * 2 ** (q - 1) / q if q else 2.0))


def shrink_lq_(x: Tensor, q: float, strength: float, metric: Tensor | None = None) -> None:
    """argmin over y of d (y - x)^2 / 2 + strength |y|^q, elementwise, in place.

    Args:
        x: Tensor, float32 or float64.
        q: in [0, 1].
        strength: positive.
        metric: d, Tensor of the shape of x, in [0, inf); overwritten. 1 where left out.
    """
    if q == 1:
        if metric is None:
            x.sub_(x.clamp(-strength, strength))
        else:
            bound = metric.reciprocal_().mul_(strength)
            x.sub_(torch.minimum(x, bound).maximum(bound.neg_()))
        return
    share = x.abs()
    # Whole powers and the inverse root are vectorised, others cost ten times as much.
    if q == 0:
        share.pow_(-2)
    elif q == 0.5:
        share.pow_(-0.5).pow_(3)
    else:
        share.pow_(q - 2)
    if metric is not None:
        share.div_(metric)
    at = curve(q)
    # All that is beyond the edge goes to one point, is recognised there, and loses everything: x - x is +0.0.
    taken = taken_share_(threshold(share.mul_(-strength), -at.edge, -at.beyond, inplace=True), q)
    if q:
        threshold(taken, -0.5 * (1 - at.left + share_beyond(q)), -1.0, inplace=True)
    x.addcmul_(x, taken)


def taken_share_(s: Tensor, q: float) -> Tensor:
    """-(1 - r) for -s: what the penalty takes off, as a negative share of v. Overwrites s.

    r is the larger root of r + s q r^(q - 1) = 1. Newton falls to it from r = 1, because the left side is convex. In
    float32 a quotient of short polynomials is as exact, where there is one, and needs a quarter of the time.
    """
    if q == 0:
        return torch.le(s, -curve(0.0).edge, out=s).neg_()
    if s.dtype == torch.float32 and (quotient := rational(q, s.device)):
        from_end = torch.add(1.0, s, alpha=1 / curve(q).beyond)
        upper, lower = (_polynomial(coefficients, from_end) for coefficients in quotient)
        return s.mul_(upper).div_(lower)
    s.mul_(q)
    left = torch.add(1.0, s, alpha=2 - q).div_(torch.add(1.0, s, alpha=1 - q))
    for _ in range(newton_steps(q, torch.finfo(s.dtype).eps) - 1):
        slope = left.pow(q - 1).mul_(s)
        left = torch.add(1.0, slope, alpha=2 - q).div_(slope.div_(left).mul_(1 - q).add_(1.0))
    return left.pow_(q - 1).mul_(s)


def _polynomial(coefficients: tuple[Tensor, ...], x: Tensor) -> Tensor:
    *others, second, first = coefficients
    found = (x * first).add_(second)
    for coefficient in reversed(others):
        torch.addcmul(coefficient, found, x, out=found)
    return found


@lru_cache
def rational(q: float, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
    """Coefficients, constants first, of two polynomials whose quotient is (1 - r) / s to float32; none where they would
    have to be long.

    They are in 1 - s / beyond: the poles lie on the other side of zero, so that no terms cancel.
    """
    place = 0.5 - 0.5 * np.cos(np.linspace(0, np.pi, 200))
    s, left = q * curve(q).beyond * (1 - place), np.ones_like(place)
    for _ in range(newton_steps(q, 2.0**-52)):
        slope = s * left ** (q - 1)
        left = (1 - (2 - q) * slope) / (1 - (1 - q) * slope / left)
    share = q * left ** (q - 1)
    for upper, lower in ((number + extra, number) for number in range(1, MOST_COEFFICIENTS) for extra in (0, 1)):
        weight = np.ones_like(place)
        for _ in range(10):  # weighted so that the residual of the linear problem becomes that of the quotient
            powers = place[:, None] ** np.arange(MOST_COEFFICIENTS + 1)
            columns = np.hstack([powers[:, : upper + 1], -share[:, None] * powers[:, 1 : lower + 1]])
            found = np.linalg.lstsq(weight[:, None] * columns, weight * share, rcond=None)[0]
            tops, bottoms = found[: upper + 1], np.array([1.0, *found[upper + 1 :]])
            weight = 1 / (powers[:, : lower + 1] @ bottoms)
        error = (powers[:, : upper + 1] @ tops) * weight - share
        if bottoms.min() > 0 and np.abs(error).max() * curve(q).edge < 2.0**-24 * curve(q).left:
            return tuple(tuple(torch.tensor(float(one), device=device) for one in part) for part in (tops, bottoms))
    return ()


@lru_cache
def newton_steps(q: float, precision: float) -> int:
    """Steps from r = 1 to relative precision beyond the edge, where they have furthest to go."""
    course = list(descent(q))
    done = (number for number, (before, after) in enumerate(pairwise(course)) if before - after <= precision * after)
    # Its error is the square of the step: the first step that is small enough was not needed.
    return max(1, next(done, len(course) - 1))


def share_beyond(q: float) -> float:
    """What `taken_share_` gives beyond the edge, without its sign."""
    return 1 - list(descent(q))[-1]


@lru_cache
def descent(q: float) -> tuple[float, ...]:
    """Newton's iterates for r beyond the edge, from 1 until they no longer fall."""
    s, left = q * curve(q).beyond, [1.0]
    while len(left) < 2 or left[-1] < left[-2]:
        slope = s * left[-1] ** (q - 1)
        left.append((1 - (2 - q) * slope) / (1 - (1 - q) * slope / left[-1]))
    return tuple(left[:-1])
