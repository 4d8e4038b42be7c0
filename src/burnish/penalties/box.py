"""Bounds for every number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from burnish.penalties.penalty import Penalty


@dataclass(frozen=True)
class Box(Penalty):
    """Zero between two bounds, infinite outside: the map is a clamp in any diagonal metric.

    Args:
        low, high: either may be infinite; `Box(0, math.inf)` keeps weights from being negative.

    Raises:
        ValueError: low above high.
    """

    low: float = -1.0
    high: float = 1.0
    constraint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low={self.low}, high={self.high}: expected low <= high")

    def value(self, x: Tensor) -> Tensor:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        inside = ((work >= self.low) & (work <= self.high)).all()
        return torch.where(inside, 0.0, math.inf).to(work.dtype)

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        x.clamp_(self.low, self.high)
