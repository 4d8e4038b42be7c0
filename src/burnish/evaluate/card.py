"""The before/after table in the model card of a model that burnish wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich import filesize

from burnish.errors import OutputError
from burnish.evaluate.result import EvaluateResult, Row
from burnish.evaluate.table import labels, setting, shown, task_label
from burnish.runs.resources import write_text

RECORD, CARD = "burnish.json", "README.md"
BEGIN, END = "<!-- burnish evaluation -->", "<!-- /burnish evaluation -->"


def require_card(directory: str | Path) -> Path:
    """The card of a model that burnish wrote, which need not exist yet; called before anything is measured.

    Raises:
        OutputError: not a local directory that burnish wrote, or a card with one of the two marks alone.
    """
    card = Path(directory) / CARD
    if not (card.parent / RECORD).is_file():
        raise OutputError(
            f"{directory}: no local directory with a {RECORD}: only the card of a model that burnish wrote is updated"
        )
    _split(card)
    return card


def update_card(directory: str | Path, result: EvaluateResult) -> Path:
    """Write a model's before/after table into its card, in place of the table that an earlier call wrote.

    Args:
        directory: one of the models after in `result`, with the record that burnish left beside it.
        result: of `evaluate(before=..., after=...)`.

    Returns:
        The card.

    Raises:
        ValueError: `result` does not compare this model with one before.
        OutputError: the directory was not written by burnish, or its card cannot be written.
    """
    card = require_card(directory)
    wanted = Path(directory).resolve()
    place = next((i for i, row in enumerate(result.rows) if i and Path(row.model).resolve() == wanted), None)
    if place is None:
        raise ValueError(f"{directory}: not one of the models after: {', '.join(row.model for row in result.rows[1:])}")
    before, after = _split(card)
    try:
        write_text(card, f"{before}{BEGIN}\n{comparison_table(result, place)}{END}\n{after}")
    except OSError as error:
        raise OutputError(f"{card}: cannot be written ({error.strerror})") from error
    return card


def comparison_table(result: EvaluateResult, place: int) -> str:
    """Markdown: the first model of a result against the one at `place`, and the setting."""
    first, row = result.rows[0], result.rows[place]
    name = labels([each.model for each in result.rows])[0]
    lines = ["## Evaluation", "", f"| | before: {_cell(name)} | this model | difference |", "|---|---|---|---|"]
    for cells in (*_quality(first, row), *_tasks(result, place), *_speeds(first, row)):
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    versions = result.environment["versions"]
    assert isinstance(versions, dict)
    hashes = f"text {result.fingerprint}, tokenizer {result.tokenizer_hash}"
    lines += ["", f"{setting(result)}; seed {result.seed}; {hashes}; burnish {versions['burnish']}.", ""]
    return "\n".join(lines)


def _quality(first: Row, row: Row) -> Iterator[tuple[str, str, str, str]]:
    yield (
        "parameters",
        f"{first.num_parameters:,}",
        f"{row.num_parameters:,}",
        _factor(first.num_parameters, row.num_parameters),
    )
    yield (
        "size of the weights",
        filesize.decimal(first.bytes_on_disk),
        filesize.decimal(row.bytes_on_disk),
        _factor(first.bytes_on_disk, row.bytes_on_disk),
    )
    seen = row.comparison
    assert seen is not None
    yield "perplexity", shown(first.perplexity, 3), shown(row.perplexity, 3), ""
    yield "loss, nats per token", shown(first.nll, 4), shown(row.nll, 4), shown(seen.nll_difference, 4, signed=True)
    yield "KL(before ‖ this model), nats per token", "", shown(seen.forward_kl, 4), ""
    yield "same most likely token", "", shown(seen.top1_agreement, 4), ""


def _tasks(result: EvaluateResult, place: int) -> Iterator[tuple[str, str, str, str]]:
    for task in result.tasks:
        difference = task.differences[place]
        paired = shown(difference, 4, signed=True) if difference else ""
        yield task_label(task), shown(task.values[0], 4), shown(task.values[place], 4), paired


def _speeds(first: Row, row: Row) -> Iterator[tuple[str, str, str, str]]:
    for old, new in zip(first.speeds, row.speeds, strict=True):
        batch = f"batch {new.batch_size}"
        for name, one, other in (
            ("prefill tokens/s", old.prefill_tokens_per_second, new.prefill_tokens_per_second),
            ("decode tokens/s", old.decode_tokens_per_second, new.decode_tokens_per_second),
        ):
            yield f"{name}, {batch}", f"{one:,.0f}", f"{other:,.0f}", _factor(one, other)
        one, other = old.peak_memory_bytes, new.peak_memory_bytes
        yield f"peak memory, {batch}", filesize.decimal(one), filesize.decimal(other), _factor(one, other)


def _factor(before: float, after: float) -> str:
    return f"{after / before:.3g}×"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _split(card: Path) -> tuple[str, str]:
    """What stands before and after the table, or where a card without one gets it: at its end."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if (text.count(BEGIN), text.count(END)) == (0, 0):
        return (text.rstrip("\n") + "\n\n" if text else ""), ""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed) or text.count(BEGIN) + text.count(END) > 2:
        raise OutputError(f"{card}: expected one {BEGIN} and after it one {END}: repair or remove these lines")
    return before, after.removeprefix("\n")
