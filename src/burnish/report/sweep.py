"""The page of a sweep: which configurations are good, which factor matters, what parameters buy."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from pydantic import FiniteFloat

from burnish.report import figures
from burnish.report.document import fill, short
from burnish.report.records import Estimate, Surroundings, read_as

SWEEP, RECORD = "sweep.json", "burnish.json"
ROWS_OPEN = 20
"""Different students shown before the fold."""

FACTORS = {"score": "Score", "grouping": "Grouping", "scaling": "Scaling", "keep": "Kept experts"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A configuration in the names that the user types."""

    label: str
    score: str
    grouping: str
    scaling: str
    keep: int


@dataclass(frozen=True, kw_only=True)
class SweepRow(Cell):
    """A configuration and what was measured; `shared_with` is the one whose student is the same."""

    num_parameters: int
    nll: Estimate
    perplexity: Estimate
    forward_kl: Estimate
    shared_with: str | None

    @property
    def rank_key(self) -> tuple[float, int, str]:
        """Smallest divergence first, then the smallest student."""
        value = self.forward_kl.value
        return (math.inf if value is None else value, self.num_parameters, self.label)


@dataclass(frozen=True, kw_only=True)
class Level:
    """Mean and standard deviation of log KL over all rows of one level."""

    name: str
    num_rows: int
    mean: FiniteFloat
    deviation: FiniteFloat | None


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Main effect of a factor on log KL; `share` of its variance, `spread` of its level means."""

    factor: str
    levels: tuple[Level, ...]
    share: FiniteFloat
    spread: FiniteFloat


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Held-out KL of a finalist after so many tokens."""

    tokens: int
    forward_kl: FiniteFloat | None


@dataclass(frozen=True, kw_only=True)
class Final(Cell):
    """A finalist's distillation; not complete where successive halving stopped it."""

    complete: bool
    evaluations: tuple[Evaluated, ...]

    @property
    def at(self) -> dict[int, float | None]:
        """Held-out KL by tokens."""
        return {one.tokens: one.forward_kl for one in self.evaluations}

    @property
    def rank_key(self) -> tuple[int, float]:
        """Who came farthest first, then the smallest divergence."""
        if not self.evaluations:
            return (0, math.inf)
        last = self.evaluations[-1]
        return (-last.tokens, math.inf if last.forward_kl is None else last.forward_kl)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model that all students are made from."""

    name: str
    num_parameters: int
    nll: Estimate

    @property
    def perplexity(self) -> float | None:
        """Of the held-out text."""
        return None if self.nll.value is None else math.exp(self.nll.value)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows were measured on."""

    dataset: str | None
    fingerprint: str
    num_samples: int
    max_length: int
    num_tokens: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """`sweep.json`."""

    format: Literal["burnish.sweep/1"]
    teacher: Teacher
    evaluation: Setting
    rows: tuple[SweepRow, ...]
    front: tuple[str, ...]
    effects: tuple[Effect, ...]
    finals: tuple[Final, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty: expected one for each configuration")

    @property
    def ranked(self) -> list[SweepRow]:
        """All rows, best first; a row that shares a student follows the one that was measured."""
        own = {row.label: row for row in self.rows}
        return sorted(
            self.rows, key=lambda row: (own[row.shared_with or row.label].rank_key, bool(row.shared_with), row.label)
        )


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """`burnish.json` of a sweep, as the worker that ended last wrote it."""

    format: Literal["burnish.run/1"]
    verb: Literal["sweep"]
    options: dict[str, Any]
    seconds: dict[str, FiniteFloat]
    environment: Surroundings
    statistics: dict[str, Any]
    peak_rss_bytes: int | None = None


def is_sweep(directory: Path) -> bool:
    """Whether a directory is one that `burnish sweep` wrote."""
    return (directory / SWEEP).exists()


def render_sweep(directory: Path) -> str:
    """The page as HTML text: self-contained, no script; the same sweep gives the same bytes.

    Raises:
        BurnishError: a file is missing or malformed; the message names file and key.
    """
    found, record = read_as(Found, directory / SWEEP), read_as(SweepRecord, directory / RECORD)
    ranked = found.ranked
    return fill(
        "sweep.html.j2",
        name=directory.resolve().name,
        found=found,
        record=record,
        ranked=ranked,
        best=ranked[0],
        different=[row for row in ranked if row.shared_with is None],
        sharing=Counter(row.shared_with for row in ranked if row.shared_with),
        factors=FACTORS,
        rows_open=ROWS_OPEN,
        text=short(found.evaluation.dataset) if found.evaluation.dataset else "the bundled held-out text",
        front=Markup(front(found)) if len({row.num_parameters for row in found.rows}) > 1 else None,
        scale=_level_scale(found.effects),
        level_range=level_range,
        axis=lambda scale: Markup(figures.axis(scale)),
        effects=sorted(found.effects, key=lambda effect: -effect.share),
        factor_of=lambda spread: figures.ratio(math.exp(spread)),
        level_mean=lambda level: figures.number(math.exp(level.mean)),
        finals=sorted(found.finals, key=lambda final: final.rank_key),
        rungs=rungs(found.finals),
        before={row.label: row.forward_kl for row in found.rows},
    )


def front(found: Found) -> str:
    """Divergence against parameters, both logarithmic: every different student a dot, the front a line of larger ones.

    Three SVG elements as in `figures.curve`; places are percentages, so that dots stay round at any width.
    """
    shown = [row for row in found.rows if row.shared_with is None and row.forward_kl.value]
    across = figures.LogScale.around([float(row.num_parameters) for row in shown])
    up = figures.LogScale.around([row.forward_kl.value for row in shown if row.forward_kl.value])
    best = [row for label in found.front for row in shown if row.label == label]

    def place(row: SweepRow) -> tuple[float, float]:
        return across.percent(row.num_parameters), round(100 - up.percent(row.forward_kl.value or up.low), 2)

    labels = "".join(
        f'<text class="tick" x="100%" y="{100 - up.percent(tick):g}%" text-anchor="end" dominant-baseline="central">'
        f"{tick:g}</text>"
        for tick in up.ticks()
    )
    title = f"Divergence against parameters of {len(shown)} students; the table of all rows lists them"
    parts = [
        f'<svg class="ys" aria-hidden="true">{labels}</svg>',
        f'<svg class="plot" role="img" aria-label="{title}">',
    ]
    for tick in up.ticks():
        y = 100 - up.percent(tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y:g}%" y2="{y:g}%"/>')
    places = [place(row) for row in best]
    for (x1, y1), (x2, y2) in itertools.pairwise(places):  # a step: no student lies between the two
        parts.append(f'<line class="step" x1="{x1:g}%" x2="{x2:g}%" y1="{y1:g}%" y2="{y1:g}%"/>')
        parts.append(f'<line class="step" x1="{x2:g}%" x2="{x2:g}%" y1="{y1:g}%" y2="{y2:g}%"/>')
    for kind, rows in (("other", [row for row in shown if row.label not in found.front]), ("best", best)):
        for row in rows:
            x, y = place(row)
            tip = f"{row.label}\nKL {figures.number(row.forward_kl.value or 0)}, {row.num_parameters:,} parameters"
            radius = 5 if kind == "best" else 3
            parts.append(
                f'<circle class="{kind}" cx="{x:g}%" cy="{y:g}%" r="{radius}"><title>{escape(tip)}</title></circle>'
            )
    counts = sorted({row.num_parameters for row in shown})
    labels = "".join(
        f'<text class="tick" x="{across.percent(count):g}%" y="12" text-anchor="middle">{figures.count(count)}</text>'
        for count in counts
        if len(counts) <= 8
    )
    return "\n".join([*parts, "</svg>", f'<svg class="xs" aria-hidden="true">{labels}</svg>'])


def _level_scale(effects: tuple[Effect, ...]) -> figures.LogScale | None:
    levels = [level for effect in effects for level in effect.levels]
    ends = [level.mean + side * (level.deviation or 0) for level in levels for side in (-1, 1)]
    return figures.LogScale.around([math.exp(end) for end in ends]) if ends else None


def level_range(scale: figures.LogScale, level: Level) -> Markup:
    """The geometric mean of a level's KL, with one standard deviation of log KL to each side."""
    at, deviation = math.exp(level.mean), level.deviation or 0.0
    left, right = (scale.percent(math.exp(level.mean + side * deviation)) for side in (-1, 1))
    title = f"{level.name}: geometric mean {figures.number(at)}, times or by {figures.number(math.exp(deviation))}"
    grid = "".join(
        f'<line class="grid" x1="{scale.percent(tick):g}%" x2="{scale.percent(tick):g}%" y1="0" y2="18"/>'
        for tick in scale.ticks()
    )
    return Markup(
        f'<svg class="interval" role="img" aria-label="{escape(title)}" width="100%" height="18">{grid}'
        f'<line class="whisker" x1="{left:g}%" x2="{right:g}%" y1="9" y2="9"/>'
        f'<circle class="dot" cx="{scale.percent(at):g}%" cy="9" r="4"/></svg>'
    )


def rungs(finals: Sequence[Final]) -> list[int]:
    """Token counts at which finalists were compared: those that lie a power of two below the last."""
    tokens = sorted({one.tokens for final in finals for one in final.evaluations})
    return [count for count in tokens if tokens[-1] % count == 0 and (tokens[-1] // count).bit_count() == 1]
