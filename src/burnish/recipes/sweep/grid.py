"""Which configurations a sweep compares: a pure function from names to a grid, and which of its plans are equal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from burnish.densify import DensifyPlan, LayerPlan
from burnish.densify.decide import Choice, make_choice
from burnish.densify.group import GROUPINGS, NO_GROUPING
from burnish.densify.scale import SCALINGS
from burnish.densify.score import SCORES
from burnish.families import MoEShape, RouterRule
from burnish.recipes.verbs import nearest

NUM_KEEPS = 5
DEFAULT_SCALINGS = ("uniform", "score")


@dataclass(frozen=True, order=True)
class Configuration:
    """One cell of the grid, in the names that the user types."""

    grouping: str
    keep: int
    score: str
    scaling: str

    @property
    def label(self) -> str:
        """A file name: `do-acp-weights-k8-uniform`."""
        return f"{self.score}-{self.grouping}-k{self.keep}-{self.scaling}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def choice(self, shape: MoEShape, rule: RouterRule, seed: int) -> Choice:
        """How to decide; raises ValueError where the combination cannot work."""
        return make_choice(shape, rule, seed=seed, **self.to_dict())[0]


def kept_counts(top_k: int, num_experts: int) -> tuple[int, ...]:
    """Five counts of kept experts, from `top_k` to `num_experts`: a geometric sequence, rounded up.

    >>> kept_counts(4, 16), kept_counts(8, 128), kept_counts(2, 4)
    ((4, 6, 8, 12, 16), (8, 16, 32, 64, 128), (2, 3, 4))
    """
    ratio = num_experts / top_k
    steps = (top_k * ratio ** (step / (NUM_KEEPS - 1)) for step in range(NUM_KEEPS))
    return tuple(dict.fromkeys(math.ceil(count - 1e-9) for count in steps))


def make_grid(
    shape: MoEShape,
    rule: RouterRule,
    *,
    scores: Sequence[str] | None = None,
    groupings: Sequence[str] | None = None,
    scalings: Sequence[str] | None = None,
    keeps: Sequence[int] | None = None,
) -> list[Configuration]:
    """Every combination, students of one width together.

    Args:
        shape, rule: of the teacher.
        scores: of `burnish.densify.score`; None for all seven.
        groupings: of `burnish.densify.group`, or "none" for wider students; None for all five.
        scalings: of `burnish.densify.scale`; None for "uniform" and "score".
        keeps: experts kept, top_k..num_experts; None for `kept_counts`.

    Raises:
        ValueError: an unknown name (the nearest is named), a count out of range, an empty list, or a combination that
            cannot work.
    """
    factors: tuple[tuple[str, Sequence[str]], ...] = (
        ("score", _known("score", scores, SCORES)),
        ("grouping", _known("grouping", groupings, GROUPINGS, NO_GROUPING)),
        ("scaling", _known("scaling", DEFAULT_SCALINGS if scalings is None else scalings, SCALINGS)),
    )
    counts = kept_counts(shape.top_k, shape.num_experts) if keeps is None else tuple(dict.fromkeys(keeps))
    if not counts:
        raise ValueError("keeps is empty: give at least one count")
    names = dict(factors)
    grid = [
        Configuration(grouping, keep, score, scaling)
        for grouping, keep, score, scaling in itertools.product(
            sorted(names["grouping"], key=lambda name: name == NO_GROUPING), counts, names["score"], names["scaling"]
        )
    ]
    for configuration in grid:
        configuration.choice(shape, rule, seed=0)
    return grid


def _known(factor: str, chosen: Sequence[str] | None, table: Iterable[str], *more: str) -> tuple[str, ...]:
    known = (*table, *more)
    if chosen is None:
        return tuple(table)
    if not chosen:
        raise ValueError(f"{factor}s is empty: choose from {', '.join(known)}")
    for name in chosen:
        if name not in known:
            raise ValueError(f"{factor} {name!r} is unknown: {nearest(name, known)}")
    return tuple(dict.fromkeys(chosen))


def substance(layer: LayerPlan, *, scaled: bool = True) -> tuple[Any, ...]:
    """What of a layer's plan reaches the weights: merge weights only as shares, and none for a group of one.

    Args:
        layer: the plan.
        scaled: False leaves out the scales, which only the down projection sees.
    """
    groups = tuple(map(tuple, layer.groups))
    shares = tuple(
        tuple(weight / sum(weights) for weight in weights) if len(weights) > 1 else (1.0,) for weights in layer.weights
    )
    return (groups, shares, *((tuple(layer.scales), layer.shared_scale) if scaled else ()))


def distinct(plans: Iterable[DensifyPlan]) -> list[int]:
    """For each plan, the index of the first one that makes the same student: its own where it is new."""
    first: dict[tuple[Any, ...], int] = {}
    return [
        first.setdefault(tuple(substance(layer) for layer in plan.layers), index) for index, plan in enumerate(plans)
    ]
