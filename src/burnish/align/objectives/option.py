"""What the options of objectives may be: ranges that a signature states and `objective()` checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Finite numbers between two ends; `ends` says with a bracket which of them belongs to it.

    Examples:
        >>> 0 in Range(0, 1, "[)"), 1 in Range(0, 1, "[)"), str(Range(0, 1, "[)"))
        (True, False, '[0, 1)')
    """

    low: float
    high: float
    ends: str = "()"

    def __contains__(self, value: float) -> bool:
        inside = self.low < value < self.high
        at_end = (self.ends[0] == "[" and value == self.low) or (self.ends[1] == "]" and value == self.high)
        return math.isfinite(value) and (inside or at_end)

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


Positive = Annotated[float, Range(0, math.inf)]
NonNegative = Annotated[float, Range(0, math.inf, "[)")]
FlipRate = Annotated[float, Range(0, 0.5, "[)")]
"""Share of labels that are wrong."""
