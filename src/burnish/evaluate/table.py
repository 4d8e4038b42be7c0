"""An evaluation in words: the tables of the terminal, and how a number is written in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich import filesize
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from burnish.evaluate.estimate import Estimate
from burnish.evaluate.result import EvaluateResult
from burnish.evaluate.tasks import TaskResult


def tables(result: EvaluateResult) -> Group:
    """The models; their tasks; their speeds with the ratio to the first model, red and said where below 1."""
    names = labels([row.model for row in result.rows])
    parts = [_models(result, names)]
    if result.tasks:
        parts.append(_tasks(result.tasks, names))
    if result.rows[0].speeds:
        parts.append(_speeds(result, names))
    return Group(*parts)


def labels(models: Sequence[str]) -> list[str]:
    """The last parts of the names, where they tell the models apart."""
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    return short if len(set(short)) == len(models) and all(short) else list(models)


def setting(result: EvaluateResult) -> str:
    """What all numbers share, in one line."""
    text = "the bundled held-out text" if result.dataset is None else result.dataset
    text = Path(text).name if Path(text).is_absolute() else text
    return (
        f"{result.num_tokens:,} tokens of {text} in {result.num_samples} blocks of {result.max_length}, {result.dtype}"
        f" on {result.device}; ± one standard error"
    )


def task_label(task: TaskResult) -> str:
    """A task's metric with its own setting: `hellaswag acc, 0-shot, first 100`."""
    parts = [f"{task.task} {task.metric}" + (f" ({task.filter})" if task.filter != "none" else "")]
    parts.append(f"{task.num_fewshot}-shot")
    parts += [f"first {task.limit}"] if task.limit is not None else []
    parts += ["chat template"] if task.chat_template_hash is not None else []
    return ", ".join(parts)


def shown(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """`0.1234 ± 0.0012`; an error that is not known is left out."""
    value = f"{estimate.value:{'+' if signed else ''}.{digits}f}".replace("-", "−")
    return value if math.isnan(estimate.standard_error) else f"{value} ± {estimate.standard_error:.{digits}f}"


def _models(result: EvaluateResult, names: Sequence[str]) -> Table:
    compared = len(result.rows) > 1
    table = Table(caption=escape(setting(result)))
    table.add_column("model", overflow="fold")
    for heading in ("parameters", "bytes", "perplexity", *(("KL (nats)", "top-1", "Δ nll (nats)") if compared else ())):
        table.add_column(heading, justify="right")
    for name, row in zip(names, result.rows, strict=True):
        cells = [f"{row.num_parameters:,}", filesize.decimal(row.bytes_on_disk), shown(row.perplexity, 3)]
        if seen := row.comparison:
            cells += [shown(seen.forward_kl, 4), f"{seen.top1_agreement.value:.1%}", shown(seen.nll_difference, 4)]
        table.add_row(escape(name), *cells)
    return table


def _tasks(tasks: Sequence[TaskResult], names: Sequence[str]) -> Table:
    table = Table(caption="Δ: paired difference to the first model, on the same documents")
    table.add_column("task", overflow="fold")
    table.add_column("documents", justify="right")
    for place, name in enumerate(names):
        table.add_column(escape(name), justify="right", overflow="fold")
        if place:
            table.add_column("Δ", justify="right")
    for task in tasks:
        cells = [escape(task_label(task)), f"{task.num_samples:,}"]
        for place, (value, difference) in enumerate(zip(task.values, task.differences, strict=True)):
            cells.append(shown(value, 4))
            if place:
                cells.append(shown(difference, 4, signed=True) if difference else "")
        table.add_row(*cells)
    return table


def _speeds(result: EvaluateResult, names: Sequence[str]) -> Table:
    first = result.rows[0].speeds
    table = Table(caption=f"greedy, {first[0].prompt_tokens} prompt tokens, {first[0].new_tokens} new tokens")
    table.add_column("model", overflow="fold")
    for heading in ("batch", "prefill ms", "prefill tok/s", "decode ms/token", "decode tok/s", "memory"):
        table.add_column(heading, justify="right")
    for place, base in enumerate(first):
        for name, row in zip(names, result.rows, strict=True):
            speed = row.speeds[place]
            compared = row is not result.rows[0]
            table.add_row(
                escape(name),
                str(speed.batch_size),
                f"{speed.prefill_ms:,.1f}",
                _rate(speed.prefill_tokens_per_second, base.prefill_tokens_per_second if compared else None),
                f"{speed.decode_ms_per_token:,.2f}",
                _rate(speed.decode_tokens_per_second, base.decode_tokens_per_second if compared else None),
                filesize.decimal(speed.peak_memory_bytes),
            )
        table.add_section()
    return table


def _rate(rate: float, base: float | None) -> str:
    if base is None:
        return f"{rate:,.0f}"
    text = f"{rate:,.0f} ({rate / base:.2f}x)"
    return text if rate >= base else f"[red]{text} slower[/]"
