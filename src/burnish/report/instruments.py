"""What instruments saw of a training, as drawings: spectra of adapters, and the dominant subspace of the Hessian."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from burnish.report import figures
from burnish.report.document import fill
from burnish.report.figures import Line, Points
from burnish.report.records import RECORD, SPECTRUM, SUBSPACE, AdapterSpectrum, Subspace, read_instruments


@dataclass(frozen=True)
class Key:
    """An entry of a drawing's legend: the class of the line, and what it is."""

    kind: str
    name: str


@dataclass(frozen=True)
class Drawing:
    """A figure over the steps of training."""

    name: str
    curve: Markup
    keys: tuple[Key, ...]
    note: str = ""


def spectrum_drawings(spectra: Sequence[AdapterSpectrum]) -> tuple[Drawing, ...]:
    """Growth of each mode, effective rank and unevenness, over steps; the median over adapters, and their range."""
    if not spectra:
        return ()
    rank, adapters = max(len(line.singular_values) for line in spectra), len({line.adapter for line in spectra})
    of = f"median of {adapters} adapters" if adapters > 1 else "one adapter"

    def mode(index: int) -> Points:
        return _over_steps(
            statistics.median,
            (
                (line.step, math.sqrt(line.singular_values[index]))
                for line in spectra
                if len(line.singular_values) > index
            ),
        )

    grown = [Line(_shade(index, rank), mode(index)) for index in reversed(range(rank))]
    name = "Square roots of the singular values"
    curve = figures.lines(grown, title=f"{name}, {rank} modes, over steps; {of}", unit="steps", reach=(0.0,))
    return (
        Drawing(name, Markup(curve), _mode_keys(rank, "singular value"), of),
        *_ranged("Effective rank", [(line.step, line.effective_rank) for line in spectra], of, reach=(0.0, rank)),
        *_ranged(
            "Variation of the square roots", [(line.step, line.growth_variation) for line in spectra], of, reach=(0.0,)
        ),
    )


def subspace_drawings(subspaces: Sequence[Subspace]) -> tuple[Drawing, ...]:
    """Top eigenvalues of the Hessian, alignment of gradient and update, and the bulk's share of the update."""
    if not subspaces:
        return ()
    k = max(len(line.eigenvalues) for line in subspaces)
    tops = [
        Line(
            _shade(index, k),
            [(line.step, line.eigenvalues[index]) for line in subspaces if len(line.eigenvalues) > index],
        )
        for index in reversed(range(k))
    ]
    drawn = []
    if k:
        name = "Largest eigenvalues of the Hessian"
        values = [y for line in tops for _, y in line.points]
        scale = "logarithmic scale" if figures.logarithmic(values) else ""
        curve = figures.lines(tops, title=f"{name}, {k} of them, over steps", unit="steps")
        drawn.append(Drawing(name, Markup(curve), _mode_keys(k, "eigenvalue"), scale))
    gradient, update, bulk = (
        [(line.step, value) for line in subspaces if (value := getattr(line, key)) is not None]
        for key in ("gradient_alignment", "update_alignment", "bulk_share")
    )
    for name, faint, strong, keys in (
        (f"Length inside the span of the top {k}", gradient, update, ("gradient", "update")),
        ("Share of the update’s square outside of it", [], bulk, ("", "update")),
    ):
        if faint or strong:
            curve = figures.curve(faint, strong, title=f"{name}, over steps", unit="steps")
            kinds = [("train", keys[0])] * bool(faint) + [("eval", keys[1])] * bool(strong)
            drawn.append(Drawing(name, Markup(curve), tuple(Key(*kind) for kind in kinds)))
    return tuple(drawn)


def last_spectra(spectra: Sequence[AdapterSpectrum]) -> tuple[AdapterSpectrum, ...]:
    """The newest line of each adapter, in the order of the model."""
    return tuple({line.adapter: line for line in spectra}.values())


def _over_steps(
    value: Callable[[list[float]], float], points: Iterable[tuple[int, float]]
) -> list[tuple[float, float]]:
    """One point a step, made of all values of that step."""
    steps: dict[int, list[float]] = {}
    for step, y in points:
        steps.setdefault(step, []).append(y)
    return [(step, value(steps[step])) for step in sorted(steps)]


def _ranged(
    name: str, points: Sequence[tuple[int, float | None]], of: str, *, reach: Sequence[float]
) -> tuple[Drawing, ...]:
    known = [(step, y) for step, y in points if y is not None]
    if not known:
        return ()
    edges = [Line("train", _over_steps(edge, known)) for edge in (min, max)]
    middle = Line("eval", _over_steps(statistics.median, known))
    last = figures.number(middle.points[-1][1])
    curve = figures.lines([*edges, middle], title=f"{name} over steps, at the end {last}", unit="steps", reach=reach)
    keys = (Key("eval", of), Key("train", "lowest and highest"))
    return (Drawing(name, Markup(curve), keys if "median" in of else keys[:1]),)


def _shade(index: int, count: int) -> str:
    """The palette from the strongest for the first of `count` lines to one that still stands out for the last."""
    strongest, faintest = figures.SHADES - 1, 3
    return f"q{round(strongest - (strongest - faintest) * index / max(count - 1, 1))}"


def _mode_keys(count: int, what: str) -> tuple[Key, ...]:
    if count == 1:
        return (Key(_shade(0, 1), what),)
    return (Key(_shade(0, count), f"largest {what}"), Key(_shade(count - 1, count), f"{what} {count}"))


def has_instruments_alone(run_dir: Path) -> bool:
    """Whether a directory holds what instruments wrote, but no record of a run of burnish."""
    written = any((run_dir / name).is_file() for name in (SPECTRUM, SUBSPACE))
    return written and not (run_dir / RECORD).exists()


def render_instruments(run_dir: Path) -> str:
    """The page of a training that only instruments watched."""
    seen = read_instruments(run_dir)
    steps = max((*(line.step for line in seen.spectra), *(line.step for line in seen.subspaces)), default=0)
    return fill("instruments.html.j2", name=run_dir.resolve().name, steps=steps, seen=seen, **DRAWINGS)


DRAWINGS: dict[str, Any] = {
    "spectrum_drawings": spectrum_drawings,
    "subspace_drawings": subspace_drawings,
    "last_spectra": last_spectra,
}
"""What the templates' macro `spectra` draws with."""
