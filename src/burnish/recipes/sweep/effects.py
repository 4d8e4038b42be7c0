"""What a finished grid says: how much each factor matters, and which students no other beats. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

LEAST = 1e-12
"""Divergences below it, of a student that equals its teacher, count as this one: their logarithm is noise."""


@dataclass(frozen=True)
class Level:
    """One level of a factor: over all rows that have it, mean and standard deviation of log KL (NaN of one row)."""

    name: str
    num_rows: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class Effect:
    """A factor's main effect.

    Attributes:
        factor: its name.
        levels: in the order in which the rows name them.
        share: of the variance of log KL that the level means explain (eta squared).
    """

    factor: str
    levels: tuple[Level, ...]
    share: float

    @property
    def spread(self) -> float:
        """Largest minus smallest level mean, in units of log KL."""
        means = [level.mean for level in self.levels]
        return max(means) - min(means)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "spread": self.spread}


def log_divergence(kl: float) -> float:
    """What effects are measured in: log KL, so that equal factors of KL weigh the same."""
    return math.log(max(kl, LEAST))


def main_effects(factors: Mapping[str, Sequence[Hashable]], values: Sequence[float]) -> list[Effect]:
    r"""Main effects of a balanced grid.

    $\eta^2_f = \sum_l n_l (\bar y_l - \bar y)^2 / \sum_i (y_i - \bar y)^2$ over the levels $l$ of factor $f$. On a
    balanced grid the factors are orthogonal, so that the shares and that of their interactions sum to one.

    Args:
        factors: name -> level of each row.
        values: of each row; finite.

    Source: Fisher's one-way decomposition for each factor of a full factorial; Montgomery, Design and Analysis of
    Experiments (8th ed., 2013), section 5.3.
    """
    centre = fmean(values)
    total = math.fsum((value - centre) ** 2 for value in values)
    effects = []
    for factor, levels in factors.items():
        rows: dict[Hashable, list[float]] = {}
        for level, value in zip(levels, values, strict=True):
            rows.setdefault(level, []).append(value)
        explained = math.fsum(len(some) * (fmean(some) - centre) ** 2 for some in rows.values())
        effects.append(
            Effect(
                factor,
                tuple(
                    Level(str(level), len(some), fmean(some), stdev(some) if len(some) > 1 else math.nan)
                    for level, some in rows.items()
                ),
                explained / total if total > 0 else 0.0,
            )
        )
    return effects


def pareto_front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: none is as small in both and smaller in one. By the first cost.

    >>> pareto_front([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1)])
    [0, 1, 4]
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: costs[index]):
        if not front or costs[index][1] < costs[front[-1]][1]:
            front.append(index)
    return front
