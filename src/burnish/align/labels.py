"""Which of two completions is preferred: labels from rewards, and labels that people write into a file.

A label is the probability that the first completion of a pair is preferred.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from burnish.data.examples import Messages
from burnish.data.text import Layout, columns_of, load_rows, shown
from burnish.errors import DataError, LabelsNeededError, ResumeMismatchError
from burnish.runs.resources import write_text

QUESTIONS_FILE, LABELS_FILE = "to_label.jsonl", "labels.jsonl"


def hard_labels(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first reward is the larger one, else 0; of equal ones the first is preferred.

    Args:
        first, second: Tensors `[pairs]`, float.

    Source: as TRL's OnlineDPOTrainer breaks ties.
    """
    return (first >= second).to(first.dtype)


def soft_labels(first: Tensor, second: Tensor, *, scale: float = 1.0) -> Tensor:
    """The Bradley-Terry probability itself: sigma(scale * (first - second)).

    Args:
        first, second: Tensors `[pairs]`, float.
        scale: of the rewards; those of a model that differ by hundredths give labels of one half without it.

    Source: preference distillation, arXiv 2506.01523, section 4; the scale is ours.
    """
    return torch.sigmoid(scale * (first - second))


def sampled_labels(first: Tensor, second: Tensor, *, scale: float = 1.0, generator: torch.Generator) -> Tensor:
    """0 or 1, drawn with the probability of `soft_labels`: an annotator of the Bradley-Terry model.

    Args:
        first, second: Tensors `[pairs]`, float.
        scale: of the rewards.
        generator: of the draws.
    """
    return torch.bernoulli(soft_labels(first, second, scale=scale), generator=generator)


def reward_labels(kind: str, first: Tensor, second: Tensor, *, scale: float, generator: torch.Generator) -> Tensor:
    """The labels of a kind of `RoundOptions`: "soft", "sampled", or hard ones for all others."""
    if kind == "soft":
        return soft_labels(first, second, scale=scale)
    if kind == "sampled":
        return sampled_labels(first, second, scale=scale, generator=generator)
    return hard_labels(first, second)


@dataclass(frozen=True)
class Question:
    """What somebody is asked: which of `a` and `b` answers the prompt better."""

    id: str
    prompt: str | Messages
    a: str
    b: str


def ask(directory: Path, questions: Sequence[Question]) -> Tensor:
    """Labels that people give by a file: `to_label.jsonl` is written, and `labels.jsonl` is read.

    Each line of `labels.jsonl` is `{"id": ..., "label": ...}`, the label the probability that `a` is better: 1 for a,
    0 for b, 0.5 for no difference. Lines may come in any order, and may hold more than that.

    Args:
        directory: where both files lie.
        questions: with different ids.

    Returns:
        Tensor `[questions]`, float64.

    Raises:
        LabelsNeededError: there is no `labels.jsonl` yet.
        DataError: a line of it cannot be used, or a question has no answer; names file and row.
        ResumeMismatchError: `to_label.jsonl` holds other questions.
    """
    asked, answers = directory / QUESTIONS_FILE, directory / LABELS_FILE
    text = "".join(json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions)
    if not asked.exists():
        write_text(asked, text)
    elif asked.read_text(encoding="utf-8") != text:
        raise ResumeMismatchError(f"{asked}: holds other questions than this run asks: remove it and {LABELS_FILE}")
    if not answers.exists():
        raise LabelsNeededError(
            f"{asked}: {len(questions)} pairs wait for labels: write {answers}, a line"
            ' {"id": ..., "label": probability from 0 to 1 that a is better} for each, and run the same again'
        )
    return read_labels(answers, [question.id for question in questions])


def read_labels(file: Path, ids: Sequence[str]) -> Tensor:
    """The labels of a file in the order of these ids, Tensor `[ids]`, float64.

    Raises:
        DataError: a line is malformed, its id unknown or there twice, its label not from 0 to 1; or an id is missing.
    """
    known, found = set(ids), dict[str, float]()
    for row in load_rows(file, ANSWERS):
        name, label = row.content
        where = f"{file} row {row.row}: column 'id' is {shown(name)}"
        if name not in known:
            raise DataError(f"{where}, which was not asked; {ANSWERS.accepted}")
        if name in found:
            raise DataError(f"{where} a second time: expected one label for each")
        found[name] = label
    missing = [name for name in ids if name not in found]
    if missing:
        raise DataError(f"{file}: {len(missing)} of {len(ids)} ids have no label, first {missing[0]!r}: add them")
    return torch.tensor([found[name] for name in ids], dtype=torch.float64)


def _read_answer(row: object, where: str, accepted: str) -> tuple[str, float]:
    columns = columns_of(row, where, accepted)
    for name in ("id", "label"):
        if name not in columns:
            raise DataError(f"{where}: column {name!r} is missing; {accepted}")
    label = columns["label"]
    if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
        raise DataError(f"{where}: column 'label' is {shown(label)}, expected a number from 0 to 1")
    return columns["id"], float(label)


ANSWERS = Layout(("id", "label"), f'accepted: {{"id": one of {QUESTIONS_FILE}, "label": 0 to 1}}', _read_answer)
