"""The report page: read a run directory into a typed record, turn the record into HTML, write the page."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from burnish.errors import BurnishError, OutputError
from burnish.report import figures

RECORD, PLAN, EVALUATION, PAGE = "burnish.json", "plan.json", "evaluation.json", "report.html"

LAYERS_SHOWN_OPEN = 16
"""A table of more layers than this starts folded."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a run started from; `bytes` counts its weight files."""

    name: str
    family: str
    architecture: str
    parameters: int
    bytes: int
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """The model that a run wrote."""

    architecture: str
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files beside the weights: taken over as they were, rewritten, left behind."""

    copied: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Software and hardware of a run, as `burnish.runs.environment` records them."""

    versions: dict[str, str]
    platform: str
    threads: int | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What was observed: tokens seen, and the size of the record that they were reduced to."""

    num_tokens: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """`burnish.json`: what was asked, what was read and written, what it took."""

    format: Literal["burnish.run/1"]
    verb: str
    started: datetime
    finished: datetime
    options: dict[str, Any]
    source: Source
    output: Output
    environment: Surroundings
    seconds: dict[str, FiniteFloat] = field(default_factory=dict)
    command: str | None = None
    peak_rss_bytes: int | None = None
    statistics: Statistics = field(default_factory=Statistics)
    counts: dict[str, int] = field(default_factory=dict)
    files: Files = field(default_factory=Files)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What was decided for one layer; `scores` has one value per expert, `scales` and `weights` one entry per group.

    `relative_block_error` is the expected squared error of the block's output over its energy.
    """

    layer: int
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[FiniteFloat, ...], ...]
    scales: tuple[FiniteFloat, ...]
    shared_scale: FiniteFloat = 1.0
    scores: tuple[FiniteFloat, ...] | None = None
    relative_block_error: FiniteFloat | None = None
    effective_rank: FiniteFloat | None = None

    def __post_init__(self) -> None:
        if not len(self.groups) == len(self.scales) == len(self.weights):
            raise ValueError(
                f"{len(self.groups)} groups, {len(self.weights)} weights and {len(self.scales)} scales:"
                " expected one of each per group"
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the kept experts, ascending."""
        return tuple(sorted(expert for group in self.groups for expert in group))

    @property
    def score_share(self) -> float | None:
        """Part of the layer's total score that the kept experts hold; None where scores are absent or negative."""
        if not self.scores or min(self.scores) < 0 or sum(self.scores) == 0:
            return None
        return sum(self.scores[expert] for expert in self.kept) / sum(self.scores)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`plan.json`: which experts of which layer were kept, and how they were put together."""

    format: Literal["burnish.densify.plan/1"]
    num_experts: int
    layers: tuple[Layer, ...]
    score: str | None = None
    grouping: str | None = None
    scaling: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers is empty: expected one entry per converted layer")
        for layer in self.layers:
            if outside := [expert for expert in layer.kept if not 0 <= expert < self.num_experts]:
                raise ValueError(f"layer {layer.layer} keeps expert {outside[0]}: choose 0..{self.num_experts - 1}")
            if layer.scores is not None and len(layer.scores) != self.num_experts:
                raise ValueError(f"layer {layer.layer} has {len(layer.scores)} scores for {self.num_experts} experts")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured value and its standard error; None where it was not a finite number."""

    value: FiniteFloat | None
    standard_error: FiniteFloat | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against the model before, on the same tokens; divergence and difference in nats per token."""

    forward_kl: Estimate
    top1_agreement: Estimate
    nll_difference: Estimate


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What greedy generation with a cache took."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: FiniteFloat
    decode_tokens_per_second: FiniteFloat
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one model."""

    model: str
    num_parameters: int
    bytes_on_disk: int
    perplexity: Estimate
    comparison: Comparison | None
    speed: Speed | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluation.json`: models measured under one setting, the one before first."""

    task: Literal["language-modelling"]
    version: Literal[1]
    rows: tuple[Row, ...]
    dataset: str | None
    split: str
    fingerprint: str
    tokenizer_hash: str
    chat_template_hash: str | None
    num_samples: int
    max_length: int
    num_tokens: int
    batch_size: int
    dtype: str
    device: str
    seed: int
    environment: Surroundings

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty: expected one entry per model")

    @property
    def before(self) -> Row | None:
        """The model that the others are compared with; None where only one was measured."""
        return self.rows[0] if len(self.rows) > 1 else None

    @property
    def after(self) -> tuple[Row, ...]:
        """The models that burnish made."""
        return self.rows[1:] or self.rows


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One converted model: its record and its plan."""

    name: str
    record: Record
    plan: Plan

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know, from the record and the plan, each once."""
        return tuple(dict.fromkeys((*self.record.notes, *self.plan.notes)))


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that one page shows: one conversion, or several of a sweep, and the evaluation they share."""

    name: str
    conversions: tuple[Conversion, ...]
    evaluation: Evaluation | None = None

    def measured(self, conversion: Conversion) -> Row | None:
        """The evaluation row of a conversion: the one that carries its name, or the only student of the only run."""
        students = self.evaluation.after if self.evaluation else ()
        if len(students) == len(self.conversions) == 1:
            return students[0]
        return next((row for row in students if Path(row.model).name == conversion.name), None)


T = TypeVar("T")


def _read(kind: type[T], path: Path) -> T:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BurnishError(f"{path}: {key}: {message}" if key else f"{path}: {message}") from None
    except OSError as error:
        raise BurnishError(f"{path} cannot be read: {error.strerror}") from None


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts `k4` before `k16`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def read_run(directory: Path) -> Run:
    """The run in a directory: its own record, or else those of its subdirectories, and the evaluation beside them.

    Raises:
        BurnishError: a file is missing or malformed; the message names file and key.
    """
    if not directory.is_dir():
        raise BurnishError(f"{directory} is not a directory: give the directory that burnish wrote")
    if (directory / RECORD).exists():
        found = [directory]
    else:
        found = sorted((path.parent for path in directory.glob(f"*/{RECORD}")), key=_natural)
    if not found:
        raise BurnishError(f"{directory} holds no {RECORD}, nor does any directory in it: nothing to report")
    evaluation = directory / EVALUATION
    return Run(
        name=directory.resolve().name,
        conversions=tuple(
            Conversion(name=path.resolve().name, record=_read(Record, path / RECORD), plan=_read(Plan, path / PLAN))
            for path in found
        ),
        evaluation=_read(Evaluation, evaluation) if evaluation.exists() else None,
    )


def _spread(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _all(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def kept(plans: Sequence[Plan]) -> str:
    """How many experts plans keep, in words."""
    experts = _spread([len(layer.kept) for plan in plans for layer in plan.layers])
    return f"kept {experts} of {_spread([plan.num_experts for plan in plans])} experts per layer"


def choices(plan: Plan) -> str:
    """How a plan was made, as far as it says: the score, the grouping and the scaling."""
    parts = {"score": plan.score, "grouping": plan.grouping, "scaling": plan.scaling}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value not in (None, "none"))


def headline(run: Run) -> tuple[str, str]:
    """What was done: from which model family to which architecture, and how."""
    records = [conversion.record for conversion in run.conversions]
    plans = [conversion.plan for conversion in run.conversions]
    models = f"{_all([r.source.family for r in records])} → {_all([r.output.architecture for r in records])}"
    if len(plans) > 1:
        return models, f"{kept(plans)}, in {len(plans)} conversions"
    how = choices(plans[0])
    return models, f"{kept(plans)} ({how})" if how else kept(plans)


def _tips(plan: Plan, layer: Layer) -> list[str]:
    fates = {}
    for index, (group, weights, scale) in enumerate(zip(layer.groups, layer.weights, layer.scales, strict=True)):
        for expert, weight in zip(group, weights, strict=False):
            share = f", weight {figures.number(weight)}" if len(group) > 1 else ""
            fates[expert] = f"kept in group {index}{share}, scale {figures.number(scale)}"
    tips = []
    ordered = sorted(layer.scores, reverse=True) if layer.scores else []
    for expert in range(plan.num_experts):
        tip = f"layer {layer.layer}, expert {expert}"
        if layer.scores:
            score = layer.scores[expert]
            tip += f"\nscore {figures.number(score)}, rank {ordered.index(score) + 1} of {plan.num_experts}"
        tips.append(f"{tip}\n{fates.get(expert, 'dropped')}")
    return tips


def expert_map(plan: Plan) -> Markup:
    """The heat map of a plan: layers by experts, kept ones marked."""
    return Markup(
        figures.heat_map(
            [layer.scores for layer in plan.layers],
            [layer.kept for layer in plan.layers],
            [_tips(plan, layer) for layer in plan.layers],
            [layer.layer for layer in plan.layers],
            title=f"Expert scores by layer, {len(plan.layers)} layers: {kept([plan])}; the table of layers lists them",
        )
    )


@dataclass(frozen=True)
class _Tile:
    """One number of the headline, before and after."""

    name: str
    before: str
    after: str
    note: str
    worse: bool = False


def tiles(run: Run) -> tuple[_Tile, ...]:
    """The headline numbers of a single run; empty for a sweep, whose table says more than a range would."""
    if len(run.conversions) > 1:
        return ()
    conversion = run.conversions[0]
    source, output = conversion.record.source, conversion.record.output
    shown = [
        _Tile(
            "Parameters",
            figures.count(source.parameters),
            figures.count(output.parameters),
            figures.change(source.parameters, output.parameters, "fewer", "more"),
        ),
        _Tile(
            "Size on disk",
            figures.size(source.bytes),
            figures.size(output.bytes),
            figures.change(source.bytes, output.bytes, "smaller", "larger"),
        ),
    ]
    before, after = run.evaluation.before if run.evaluation else None, run.measured(conversion)
    if before is None or after is None:
        return tuple(shown)
    if before.perplexity.value and after.perplexity.value:
        old, new = before.perplexity.value, after.perplexity.value
        note = figures.change(old, new, "lower", "higher")
        shown.append(_Tile("Perplexity", figures.number(old), figures.number(new), note, worse=new > old))
    if before.speed and after.speed:
        old, new = before.speed.decode_tokens_per_second, after.speed.decode_tokens_per_second
        note = figures.change(old, new, "slower", "faster")
        shown.append(_Tile("Decode, tokens/s", figures.number(old), figures.number(new), note, worse=new < old))
    return tuple(shown)


@dataclass(frozen=True)
class _Line:
    """One model of the quality and speed table; `section` is the place of its conversion in a sweep."""

    name: str
    row: Row
    section: int | None
    interval: Markup | None
    prefill_ratio: float | None
    decode_ratio: float | None


@dataclass(frozen=True)
class _Measurements:
    """The quality and speed table: its lines, the axis above the intervals, and which columns hold anything."""

    lines: tuple[_Line, ...]
    axis: Markup | None
    compared: bool
    speed: Speed | None


def measurements(run: Run) -> _Measurements | None:
    """The models before and after side by side; None where nothing was evaluated."""
    if run.evaluation is None:
        return None
    rows, before = run.evaluation.rows, run.evaluation.before
    scale = _perplexity_scale(rows) if before else None
    sections = {id(run.measured(conversion)): index for index, conversion in enumerate(run.conversions)}
    lines = []
    for row in rows:
        section = sections.get(id(row))
        name = row.model if section is None else run.conversions[section].name
        prefill_ratio = decode_ratio = None
        if before and row is not before and before.speed and row.speed:
            prefill_ratio = row.speed.prefill_tokens_per_second / before.speed.prefill_tokens_per_second
            decode_ratio = row.speed.decode_tokens_per_second / before.speed.decode_tokens_per_second
        lines.append(
            _Line(
                name=_short(name),
                row=row,
                section=section if len(run.conversions) > 1 else None,
                interval=_interval(scale, row, before) if scale else None,
                prefill_ratio=prefill_ratio,
                decode_ratio=decode_ratio,
            )
        )
    return _Measurements(
        lines=tuple(lines),
        axis=Markup(figures.axis(scale)) if scale else None,
        compared=any(row.comparison for row in rows),
        speed=next((row.speed for row in rows if row.speed), None),
    )


def _perplexity_scale(rows: Sequence[Row]) -> figures.LogScale | None:
    ends = []
    for row in rows:
        if row.perplexity.value:
            error = row.perplexity.standard_error or 0.0
            ends += [row.perplexity.value - error, row.perplexity.value, row.perplexity.value + error]
    return figures.LogScale.around([end for end in ends if end > 0]) if ends else None


def _interval(scale: figures.LogScale, row: Row, before: Row | None) -> Markup | None:
    value, error = row.perplexity.value, row.perplexity.standard_error
    if not value:
        return None
    reference = before.perplexity.value if before else None
    title = f"perplexity {figures.with_error(value, error)}"
    return Markup(figures.interval(scale, value, error, reference=reference, title=title))


@dataclass(frozen=True)
class _Column:
    """One measure of the table of layers; `top` is the value of a full bar."""

    key: str
    name: str
    top: float
    values: tuple[float | None, ...]

    @property
    def summary(self) -> str:
        known = [value for value in self.values if value is not None]
        middle, low, high = (figures.number(f(known)) for f in (statistics.median, min, max))
        return f"{self.name} {middle} in the median, {low} to {high}"


def layer_columns(plan: Plan) -> tuple[_Column, ...]:
    """The per-layer measures that a plan holds."""
    columns = []
    for key, name, top in (
        ("relative_block_error", "relative block error", 1.0),
        ("score_share", "score kept", 1.0),
        ("effective_rank", "effective rank", 1.0),
        ("shared_scale", "shared experts’ scale", 1.0),
    ):
        values = tuple(getattr(layer, key) for layer in plan.layers)
        known = [value for value in values if value is not None]
        if known and not (key == "shared_scale" and set(known) == {1.0}):
            columns.append(_Column(key, name, max(top, *known), values))
    return tuple(columns)


def _short(name: str) -> str:
    """A model or data set as a reader knows it: not where on a disk it lay."""
    return Path(name).name if Path(name).is_absolute() else name


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(_plain(item) for item in value) if isinstance(value, list) else str(value)


def _estimate(estimate: Estimate, factor: float = 1.0) -> str:
    if estimate.value is None:
        return "not finite"
    error = estimate.standard_error
    return figures.with_error(factor * estimate.value, None if error is None else factor * error)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("burnish.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(figures, name) for name in ("count", "size", "duration", "number", "ratio")}
    environment.filters |= {"plain": _plain, "short": _short, "estimate": _estimate}
    environment.globals |= {"expert_map": expert_map, "layer_columns": layer_columns, "kept": kept, "choices": choices}
    return environment


def render(run: Run) -> str:
    """The page as HTML text: self-contained, no script, nothing fetched; the same run gives the same bytes."""
    models, how = headline(run)
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            run=run,
            models=models,
            how=how,
            tiles=tiles(run),
            measurements=measurements(run),
            layers_shown_open=LAYERS_SHOWN_OPEN,
        )
    )


def write_report(run_dir: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the page of a run, whole or not at all.

    Args:
        run_dir: a run directory, or a directory of run directories.
        out: the page; `report.html` in the run directory by default.
        overwrite: replace the page if it exists.

    Returns:
        The path of the page.

    Raises:
        BurnishError: the run cannot be read.
        OutputError: the page exists and `overwrite` is false, or it cannot be written.
    """
    page = out if out is not None else run_dir / PAGE
    if page.exists() and not overwrite:
        raise OutputError(f"{page} exists: choose another name, or pass --overwrite")
    text = render(read_run(run_dir))
    partial = page.with_name(page.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(page)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{page} cannot be written: {error.strerror}") from None
    return page
