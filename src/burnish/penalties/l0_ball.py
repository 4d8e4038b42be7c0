"""At most so many numbers of a tensor that are not zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from burnish.penalties.penalty import Penalty


@dataclass(frozen=True)
class L0Ball(Penalty):
    """Zero where at most `count` numbers of a tensor, or a `share` of them, are not zero; infinite elsewhere.

    The map keeps the numbers with the largest d x^2, of equal ones those that come first: setting a number to zero
    costs d x^2 / 2, and they are chosen independently, so that this is exact in any diagonal metric.

    Args:
        count: of a whole tensor.
        share: in [0, 1], rounded down; one of the two must be given.

    Raises:
        ValueError: both or none given, out of range.

    Examples:
        >>> L0Ball(count=2).prox(torch.tensor([3.0, -1.0, 2.0, -2.0]))
        tensor([3., 0., 2., 0.])
    """

    count: int | None = None
    share: float | None = None
    elementwise: ClassVar[bool] = False
    constraint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.count is None) == (self.share is None):
            raise ValueError(f"count={self.count}, share={self.share}: give one of them")
        if self.count is not None and (self.count < 0 or self.count != int(self.count)):
            raise ValueError(f"count={self.count}: expected a whole number, 0 or more")
        if self.share is not None and not (0 <= self.share <= 1):
            raise ValueError(f"share={self.share}: expected a number in [0, 1]")

    def kept(self, numel: int) -> int:
        """How many of `numel` numbers may be other than zero."""
        return min(numel, self.count) if self.count is not None else int((self.share or 0.0) * numel + 1e-9)

    def value(self, x: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        return torch.where(x.count_nonzero() <= self.kept(x.numel()), 0.0, math.inf).to(work)

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        kept = self.kept(x.numel())
        if kept == x.numel():
            return
        if kept == 0:
            x.zero_()
            return
        cost = x.abs() if metric is None else metric.sqrt_().mul_(x.abs())
        flat = cost.flatten()
        least = flat.kthvalue(x.numel() - kept + 1).values
        keep, ties = flat > least, flat == least
        keep |= ties & (ties.cumsum(0) <= kept - keep.sum())
        x.masked_fill_(~keep.view_as(x), 0.0)
