"""The page of a run: turn what lies in a run directory into the tables and drawings that the template shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from burnish.report import figures
from burnish.report.comparable import QualityGroup, TaskRow, quality_groups, task_rows
from burnish.report.document import fill, refuse_existing_page, short, write_page
from burnish.report.instruments import DRAWINGS, has_instruments_alone, render_instruments
from burnish.report.records import (
    Conversion,
    DensifyPlan,
    Estimate,
    Evaluation,
    Layer,
    Metrics,
    PrunePlan,
    Record,
    Row,
    Run,
    Shape,
    Speed,
    TaskScore,
    read_run,
)
from burnish.report.rounds import ROUND_DRAWINGS, has_rounds_alone, render_rounds
from burnish.report.sweep import is_sweep, render_sweep

PAGE = "report.html"

LAYERS_SHOWN_OPEN = 16
"""A table of more layers than this starts folded."""


def _spread(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _all(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def kept(plans: Sequence[DensifyPlan]) -> str:
    """How many experts plans keep, in words."""
    experts = _spread([len(layer.kept) for plan in plans for layer in plan.layers])
    return f"kept {experts} of {_spread([plan.num_experts for plan in plans])} experts per layer"


def choices(plan: DensifyPlan) -> str:
    """How a plan was made, as far as it says: the score, the grouping and the scaling."""
    parts = {"score": plan.score, "grouping": plan.grouping, "scaling": plan.scaling}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value not in (None, "none"))


def description(conversion: Conversion) -> str:
    """What was done to make one model, in words."""
    plan, record = conversion.plan, conversion.record
    if isinstance(plan, DensifyPlan):
        how = choices(plan)
        return f"{kept([plan])} ({how})" if how else kept([plan])
    if isinstance(plan, PrunePlan):
        changed = [f"{name} {old} → {new}" for name, old, new in shape_rows(plan.source, plan.target) if old != new]
        return f"pruned: {', '.join(changed) or 'nothing'}"
    if record.verb == "distill":
        tokens = record.training.get("tokens")
        teacher = f"distilled from {short(record.teacher.name)}" if record.teacher else "distilled"
        return f"{teacher} over {figures.count(tokens)} tokens" if isinstance(tokens, int) else teacher
    if record.verb in ("tune", "replay"):
        steps, optimizer = (record.training.get(key) or record.options.get(key) for key in ("steps", "optimizer"))
        adapters = ", adapters" if record.training.get("adapters") else ""
        return f"tuned with {optimizer} over {steps} steps{adapters}"
    if record.verb == "align":
        name, steps = (record.training.get(key) for key in ("objective", "steps"))
        rounds = f"{record.options.get('rounds')} rounds of " if record.options.get("rounds") else ""
        adapters = ", adapters" if record.training.get("adapters") else ""
        return f"aligned with {name} over {rounds}{steps} steps{adapters}"
    return f"control: {record.options.get('init')}" if record.verb == "densify" else record.verb


def headline(run: Run) -> tuple[str, str]:
    """What was done: from which model family to which architecture, and how."""
    records = [conversion.record for conversion in run.conversions]
    starts = records[:1] if run.steps else records
    ends = records[-1:] if run.steps else records
    models = f"{_all([_start(record) for record in starts])} → {_all([record.output.architecture for record in ends])}"
    if len(records) == 1 or run.steps:
        return models, "; ".join(description(conversion) for conversion in run.conversions)
    plans = [conversion.plan for conversion in run.conversions if isinstance(conversion.plan, DensifyPlan)]
    if len(plans) == len(records):
        return models, f"{kept(plans)}, in {len(plans)} conversions"
    return models, f"{len(records)} conversions: {_all([record.verb for record in records])}"


def _start(record: Record) -> str:
    """What a model was made from: the teacher where it was distilled, the family of the source elsewhere."""
    return short(record.teacher.name) if record.teacher else record.source.family or record.source.architecture


def shape_rows(source: Shape, target: Shape) -> tuple[tuple[str, int, int], ...]:
    """Sizes before and after pruning, with their names."""
    return (
        ("layers", source.layers, target.layers),
        ("hidden size", source.hidden_size, target.hidden_size),
        ("feed-forward width", source.intermediate_size, target.intermediate_size),
        ("attention heads", source.heads, target.heads),
        ("key-value heads", source.kv_heads, target.kv_heads),
    )


def ranges(indices: Sequence[int]) -> str:
    """Ascending indices as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7–8'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def block_influence(plan: PrunePlan) -> Markup:
    """Bars of the influence of each layer, kept ones filled."""
    assert plan.block_influence is not None
    title = f"Block influence by layer, {len(plan.block_influence)} layers; kept: {ranges(plan.layers)}"
    return Markup(figures.bars(plan.block_influence, set(plan.layers), title=title, what="block influence"))


@dataclass(frozen=True)
class _Course:
    """One drawing of a training: its heading, the drawing, what its axes are, and which lines it has."""

    name: str
    drawing: Markup
    unit: str
    logarithmic: bool
    trained: bool
    evaluated: bool


def courses(metrics: Sequence[Metrics]) -> tuple[_Course, ...]:
    """Divergence from the teacher, negative log-likelihood and loss over tokens, as far as they were written down.

    The loss stands alone only where it is not one of the others itself. Where a line does not say its tokens, all are
    drawn over steps.
    """
    unit = "steps" if any(line.tokens is None for line in metrics) else "tokens"
    own_loss = any(
        line.loss is not None and not any(_same(line.loss, part) for part in (_divergence(line), line.nll))
        for line in metrics
    )

    def points(value: Callable[[Metrics], float | None]) -> list[tuple[float, float]]:
        found = [
            (line.step if line.tokens is None or unit == "steps" else line.tokens, value(line)) for line in metrics
        ]
        return [(x, y) for x, y in found if y is not None]

    drawn = []
    for name, trained, evaluated in (
        ("Divergence from the teacher, nats per token", points(_divergence), points(lambda line: line.eval_kl)),
        ("Negative log-likelihood, nats per token", points(lambda line: line.nll), points(lambda line: line.eval_nll)),
        ("Mean score of generated answers", [], points(lambda line: line.eval_score)),
        ("Reward of drawn completions", points(lambda line: line.reward), points(lambda line: line.eval_reward)),
        ("Margin of implicit rewards", points(lambda line: line.margin), points(lambda line: line.eval_margin)),
        (
            "Share of pairs with a margin above 0",
            points(lambda line: line.accuracy),
            points(lambda line: line.eval_accuracy),
        ),
        (
            "KL to the reference, nats per completion",
            points(lambda line: line.reference_kl),
            points(lambda line: line.eval_reference_kl),
        ),
        ("Training loss", points(lambda line: line.loss) if own_loss else [], points(lambda line: line.eval_loss)),
    ):
        values = [y for _, y in (*trained, *evaluated) if math.isfinite(y)]
        if not values:
            continue
        title = f"{name}, over {figures.count(round(max(x for x, _ in (*trained, *evaluated))))} {unit} of training"
        if held_out := [y for _, y in evaluated if math.isfinite(y)]:
            title += f": on held-out text from {figures.number(held_out[0])} to {figures.number(held_out[-1])}"
        drawing = Markup(figures.curve(trained, evaluated, title=title, unit=unit))
        drawn.append(_Course(name, drawing, unit, figures.logarithmic(values), bool(trained), bool(evaluated)))
    return tuple(drawn)


def _same(loss: float, part: float | None) -> bool:
    """Up to what a mean over the batch rounds away."""
    return part is not None and math.isclose(loss, part, rel_tol=1e-4)


def _divergence(line: Metrics) -> float | None:
    return line.divergence if line.kl is None else line.kl


def _tips(plan: DensifyPlan, layer: Layer) -> list[str]:
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


def expert_map(plan: DensifyPlan) -> Markup:
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
    """One number of the headline, before and after; `before` is empty where there is nothing to compare with."""

    name: str
    before: str
    after: str
    note: str
    worse: bool = False


def tiles(run: Run, groups: Sequence[QualityGroup]) -> tuple[_Tile, ...]:
    """The headline numbers of one run or recipe; empty for a sweep, whose table says more than a range would."""
    if len(run.conversions) > 1 and not run.steps:
        return ()
    first, last = run.conversions[0].record, run.conversions[-1]
    shown = [*_size_tiles(first, last.record), *_training_tiles(last)]
    group, after = measured(run, groups, last)
    before = group.before if group else None
    if before is None or after is None:
        return tuple(shown)
    if before.perplexity.value and after.perplexity.value:
        old, new = before.perplexity.value, after.perplexity.value
        note = figures.change(old, new, "lower", "higher")
        shown.append(_Tile("Perplexity", figures.number(old), figures.number(new), note, worse=new > old))
    if before.speeds and after.speeds:
        old, new = before.speeds[0].decode_tokens_per_second, after.speeds[0].decode_tokens_per_second
        note = figures.change(old, new, "slower", "faster")
        shown.append(_Tile("Decode, tokens/s", figures.number(old), figures.number(new), note, worse=new < old))
    return tuple(shown)


def _size_tiles(first: Record, last: Record) -> list[_Tile]:
    """From the first model (of a distillation alone: the teacher) to the last; nothing where they are the same size."""
    source, output = first.source, last.output
    parameters, size = source.parameters, source.bytes
    if first.verb == "distill" and first.teacher and first.teacher.parameters:
        parameters, size = first.teacher.parameters, first.teacher.bytes
    change = figures.change(parameters, output.parameters, "fewer", "more")
    rows = [_Tile("Parameters", figures.count(parameters), figures.count(output.parameters), change)]
    change = figures.change(size, output.bytes, "smaller", "larger")
    rows.append(_Tile("Size on disk", figures.size(size), figures.size(output.bytes), change))
    return rows


def _training_tiles(conversion: Conversion) -> list[_Tile]:
    shown = []
    for name, values, rises in (
        ("Held-out divergence, nats", [line.eval_kl for line in conversion.metrics], False),
        ("Held-out score", [line.eval_score for line in conversion.metrics], True),
        ("Held-out reward", [line.eval_reward for line in conversion.metrics], True),
        ("Held-out accuracy", [line.eval_accuracy for line in conversion.metrics], True),
        ("Held-out loss, nats", [line.eval_nll for line in conversion.metrics], False),
    ):
        known = [value for value in values if value is not None]
        if known:
            old, new = known[0], known[-1]
            note = figures.change(old, new, "lower", "higher")
            better = new >= old if rises else new <= old
            shown.append(_Tile(name, figures.number(old), figures.number(new), note, worse=not better))
    tokens, rate = (conversion.record.training.get(key) for key in ("tokens", "tokens_per_second"))
    if isinstance(tokens, int):
        note = f"{figures.count(round(rate))} tokens/s" if isinstance(rate, int | float) else ""
        shown.append(_Tile("Tokens of training", "", figures.count(tokens), note))
    return shown


def measured(
    run: Run, groups: Sequence[QualityGroup], conversion: Conversion
) -> tuple[QualityGroup | None, Row | None]:
    """The evaluation row of a conversion: the one that carries its name, or the only student of the only run.

    The latter only where the sizes agree: an evaluation may have been copied along from the model before.
    """
    for group in groups:
        for row in group.after:
            alone = len(groups) == len(group.after) == len(run.conversions) == 1
            if Path(row.model).name == conversion.name or (
                alone and row.num_parameters == conversion.record.output.parameters
            ):
                return group, row
    return None, None


@dataclass(frozen=True)
class _Line:
    """One model of the quality and speed table; `section` is the place of its conversion where there are several."""

    name: str
    row: Row
    before: bool
    section: int | None
    interval: Markup | None
    prefill_ratio: float | None
    decode_ratio: float | None


@dataclass(frozen=True)
class _Measurements:
    """One quality and speed table: its lines, the axis above the intervals, and which columns hold anything."""

    group: QualityGroup
    lines: tuple[_Line, ...]
    axis: Markup | None
    compared: bool
    speed: Speed | None


def measurements(run: Run, groups: Sequence[QualityGroup]) -> tuple[_Measurements, ...]:
    """The models before and after side by side, one table for each setting."""
    sections = {id(measured(run, groups, conversion)[1]): i for i, conversion in enumerate(run.conversions)}
    return tuple(_measurements(run, group, sections) for group in groups)


def _measurements(run: Run, group: QualityGroup, sections: dict[int, int]) -> _Measurements:
    before = group.before
    scale = _perplexity_scale(group.rows) if len(group.rows) > 1 else None
    together = len(group.files) == 1  # speeds of another file were measured at another time
    lines = []
    for row in group.rows:
        section = sections.get(id(row))
        name = row.model if section is None else run.conversions[section].name
        prefill_ratio = decode_ratio = None
        if together and before and row is not before and before.speeds and row.speeds:
            prefill_ratio, decode_ratio = _speed_ratios(row.speeds[0], before.speeds[0])
        lines.append(
            _Line(
                name=short(name),
                row=row,
                before=row is before,
                section=section if len(run.conversions) > 1 else None,
                interval=_interval(scale, row, before) if scale else None,
                prefill_ratio=prefill_ratio,
                decode_ratio=decode_ratio,
            )
        )
    return _Measurements(
        group=group,
        lines=tuple(lines),
        axis=Markup(figures.axis(scale)) if scale else None,
        compared=any(row.comparison for row in group.rows),
        speed=next((row.speeds[0] for row in group.rows if row.speeds), None) if together else None,
    )


def _speed_ratios(speed: Speed, base: Speed) -> tuple[float, float]:
    """Prefill and decode rates over those of the model before."""
    return (
        speed.prefill_tokens_per_second / base.prefill_tokens_per_second,
        speed.decode_tokens_per_second / base.decode_tokens_per_second,
    )


@dataclass(frozen=True)
class _SpeedLine:
    """One model at one batch size."""

    name: str
    speed: Speed
    before: bool
    prefill_ratio: float | None
    decode_ratio: float | None


@dataclass(frozen=True)
class _SpeedTable:
    """All models of one evaluation at several batch sizes."""

    evaluation: Evaluation
    lines: tuple[_SpeedLine, ...]


def speed_tables(run: Run) -> tuple[_SpeedTable, ...]:
    """Speeds by batch size, for each evaluation that has more than one: only what ran together is compared."""
    tables = []
    for evaluation in run.evaluations.values():
        first = evaluation.rows[0]
        if len(first.speeds) < 2:
            continue
        lines = []
        for place, base in enumerate(first.speeds):
            for row in evaluation.rows:
                ratios = (None, None) if row is first else _speed_ratios(row.speeds[place], base)
                lines.append(_SpeedLine(short(row.model), row.speeds[place], row is evaluation.before, *ratios))
        tables.append(_SpeedTable(evaluation, tuple(lines)))
    return tuple(tables)


@dataclass(frozen=True)
class _TaskTable:
    """Tasks by model; `models` in the order of the evaluations, as they are named in the rows."""

    models: tuple[str, ...]
    rows: tuple[TaskRow, ...]
    mixed: bool


def worse(score: TaskScore, difference: Estimate) -> bool:
    """Whether a difference is in the bad direction by more than two standard errors."""
    if difference.value is None or difference.standard_error is None or score.higher_is_better is None:
        return False
    gain = difference.value if score.higher_is_better else -difference.value
    return gain < -2 * difference.standard_error


def task_table(run: Run, *, mix_settings: bool) -> _TaskTable | None:
    """Scores of tasks; None where none was asked."""
    rows = task_rows(run.evaluations, mix_settings=mix_settings)
    models = dict.fromkeys(row.model for evaluation in run.evaluations.values() for row in evaluation.rows)
    asked = tuple(model for model in models if any(model in row.values for row in rows))
    return _TaskTable(asked, rows, mix_settings and len(run.evaluations) > 1) if rows else None


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


def layer_columns(plan: DensifyPlan) -> tuple[_Column, ...]:
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


def render(run: Run, *, mix_settings: bool = False) -> str:
    """The page as HTML text: self-contained, no script, nothing fetched; the same run gives the same bytes.

    Args:
        run: what to show.
        mix_settings: put results of different settings side by side, which says nothing about the models alone.
    """
    models, how = headline(run)
    groups = quality_groups(run.evaluations, mix_settings=mix_settings)
    return fill(
        "run.html.j2",
        run=run,
        models=models,
        how=how,
        tiles=tiles(run, groups),
        measurements=measurements(run, groups),
        speed_tables=speed_tables(run),
        task_table=task_table(run, mix_settings=mix_settings),
        mixed=mix_settings and len(run.evaluations) > 1,
        block_influence=block_influence,
        courses=courses,
        description=description,
        expert_map=expert_map,
        layer_columns=layer_columns,
        ranges=ranges,
        shape_rows=shape_rows,
        worse=worse,
        layers_shown_open=LAYERS_SHOWN_OPEN,
        **DRAWINGS,
        **ROUND_DRAWINGS,
    )


def write_report(
    run_dir: Path, out: Path | None = None, *, overwrite: bool = False, mix_settings: bool = False
) -> Path:
    """Write the page of a run, whole or not at all.

    Args:
        run_dir: a run directory, the directory of a recipe, a directory of run directories, one of a training of
            one's own where instruments of `burnish.diagnose` wrote, or one of `burnish.align.rounds.OnPolicyRounds`.
        out: the page; `report.html` in the run directory by default.
        overwrite: replace the page if it exists.
        mix_settings: put results of different settings (task and version, shots, templates, tokenizer, seed, limit,
            text) into one table.

    Returns:
        The path of the page.

    Raises:
        BurnishError: the run cannot be read.
        OutputError: the page exists and `overwrite` is false, or it cannot be written.
    """
    page = out if out is not None else run_dir / PAGE
    refuse_existing_page(page, overwrite=overwrite)
    if is_sweep(run_dir):
        html = render_sweep(run_dir)
    elif has_instruments_alone(run_dir):
        html = render_instruments(run_dir)
    elif has_rounds_alone(run_dir):
        html = render_rounds(run_dir)
    else:
        html = render(read_run(run_dir), mix_settings=mix_settings)
    return write_page(page, html, overwrite=overwrite)
