"""The squared distance to a quantised copy whose levels are fitted to each tensor: ternary or k bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from burnish.penalties.penalty import Penalty, check_strength
from burnish.penalties.wells import nearest, uniform_levels

FITS = 8


@dataclass(frozen=True)
class NearQuantized(Penalty):
    """strength / 2 times the squared distance to the tensor's own quantised copy.

    The map is (v + kappa q) / (1 + kappa): weights approach the copy and never reach it, so that a training ends by
    rounding (`ProxGen.freeze`). The copy q is that of v; for it the map is exact in any diagonal metric.

    Args:
        strength: beside a mean loss.
        bits: "ternary" (three values for each tensor), or 1 to 8 for 2^bits equally spaced ones.

    Raises:
        ValueError: a negative strength, unknown bits.

    Source: arXiv 1810.00861, multi-bit and ternary; its ternary threshold is 0.7 times the mean of |v|. Ours: k bits on
    a uniform grid whose scale is fitted by least squares, in place of sums of binary codes.
    """

    strength: float
    bits: int | str = "ternary"
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.bits != "ternary" and self.bits not in range(1, 9):
            raise ValueError(f"bits={self.bits!r}: expected 'ternary' or a whole number from 1 to 8")

    def rounded(self, x: Tensor) -> Tensor:
        """The quantised copy of a tensor."""
        x = x.contiguous()  # sums in one order, whatever the layout
        return ternary(x) if isinstance(self.bits, str) else uniform(x, self.bits)

    def value(self, x: Tensor) -> Tensor:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        return 0.5 * self.strength * (work - self.rounded(work.detach())).square().sum()

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        pull = step * self.strength
        copy = self.rounded(x)
        x.lerp_(copy, pull / (1 + pull) if metric is None else metric.add_(pull).reciprocal_().mul_(pull)).add_(0.0)


def ternary(x: Tensor) -> Tensor:
    """0 where |x| is at most 0.7 times its mean, else the mean of what is left on that side."""
    bound = 0.7 * x.abs().mean()
    copy = torch.zeros_like(x)
    for side in (x > bound, x < -bound):
        copy = torch.where(side, (x * side).sum() / side.sum().clamp(min=1), copy)
    return copy


def uniform(x: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits equally spaced levels, whose scale is fitted by least squares and rounding in turn."""
    levels, scale = uniform_levels(bits), x.abs().amax()
    for _ in range(FITS if bits > 1 else 1):
        code = nearest(x / scale, levels)
        scale = (x * code).sum() / code.square().sum()
    return (code * scale).nan_to_num(0.0)
