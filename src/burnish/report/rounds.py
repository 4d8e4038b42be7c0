"""On-policy rounds as small drawings, one for each measure, over the rounds that the policy had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from burnish.report import figures
from burnish.report.document import fill
from burnish.report.figures import Line, Points
from burnish.report.instruments import Drawing, Key
from burnish.report.records import RECORD, ROUNDS, RoundLine, read_rounds

NORMAL_95 = 1.96
EVEN = (0.5,)
"""What the drawing of the win rate shows in any case: no better than the reference."""

Value = Callable[[RoundLine], float | None]


def round_drawings(lines: Sequence[RoundLine]) -> tuple[Drawing, ...]:
    """Reward, win rate, divergence, entropy, length, coverage and variety, as far as they were measured."""
    drawn = (
        _estimate(lines, "Reward", "reward"),
        _interval(
            lines, "Win rate against the reference", _of("win_rate"), _of("win_rate_low"), _of("win_rate_high"),
            reach=EVEN,
        ),
        _estimate(lines, "KL to the reference, nats per completion", "kl", reach=(0.0,)),
        _estimate(lines, "Entropy, nats per completion", "entropy"),
        _several(lines, "Length of a completion, tokens", {"mean": "length"}),
        _several(
            lines,
            "Coverage: largest ratio of variances",
            {"by the round before": "coverage", "by the reference": "reference_coverage"},
        ),
        _several(
            lines,
            "Log-determinant of features",
            {"pairs that were labelled": "pairs_log_det", "the policy’s": "log_det"},
        ),
    )  # fmt: skip
    return tuple(drawing for drawing in drawn if drawing is not None)


def _of(name: str) -> Value:
    """The measure of this name."""

    def value(line: RoundLine) -> float | None:
        found: float | None = getattr(line, name)
        return found

    return value


def _points(lines: Sequence[RoundLine], value: Value) -> Points:
    return [(float(line.rounds), y) for line in lines if (y := value(line)) is not None]


def _interval(
    lines: Sequence[RoundLine], name: str, value: Value, low: Value, high: Value, *, reach: Sequence[float] = ()
) -> Drawing | None:
    """A strong line between two faint ones."""
    middle = _points(lines, value)
    if not middle:
        return None
    edges = [Line("train", points) for edge in (low, high) if (points := _points(lines, edge))]
    title = f"{name} by round, from {figures.number(middle[0][1])} to {figures.number(middle[-1][1])}"
    curve = figures.lines([*edges, Line("eval", middle, dotted=True)], title=title, unit="rounds", reach=reach)
    keys = (Key("eval", "measured"), *([Key("train", "95 % interval")] if edges else []))
    return Drawing(name, Markup(curve), keys)


def _estimate(lines: Sequence[RoundLine], name: str, measure: str, *, reach: Sequence[float] = ()) -> Drawing | None:
    value, error = _of(measure), _of(f"{measure}_error")

    def edge(side: float) -> Value:
        def found(line: RoundLine) -> float | None:
            mean, spread = value(line), error(line)
            return None if mean is None or spread is None else mean + side * NORMAL_95 * spread

        return found

    return _interval(lines, name, value, edge(-1), edge(1), reach=reach)


def _several(lines: Sequence[RoundLine], name: str, measures: dict[str, str]) -> Drawing | None:
    """A line for each measure, the last one strong."""
    found = {what: points for what, measure in measures.items() if (points := _points(lines, _of(measure)))}
    if not found:
        return None
    kinds = dict(zip(reversed(found), ("eval", "q5"), strict=False))
    drawn = [Line(kinds[what], points, dotted=kinds[what] == "eval") for what, points in found.items()]
    heights = [y for points in found.values() for _, y in points]
    ends = "; ".join(f"{what} {figures.number(points[-1][1])}" for what, points in found.items())
    curve = figures.lines(drawn, title=f"{name} by round, at the end: {ends}", unit="rounds")
    note = "logarithmic scale" if figures.logarithmic(heights) else ""
    return Drawing(name, Markup(curve), tuple(Key(kinds[what], what) for what in found), note)


def has_rounds_alone(run_dir: Path) -> bool:
    """Whether a directory holds rounds, but no record of a run of burnish."""
    return (run_dir / ROUNDS).is_file() and not (run_dir / RECORD).exists()


def render_rounds(run_dir: Path) -> str:
    """The page of rounds that were run from Python."""
    lines = read_rounds(run_dir / ROUNDS)
    return fill("rounds.html.j2", name=run_dir.resolve().name, lines=lines, **ROUND_DRAWINGS)


ROUND_DRAWINGS: dict[str, Any] = {"round_drawings": round_drawings, "with_error": figures.with_error}
"""What the templates' macro `rounds` draws with."""
