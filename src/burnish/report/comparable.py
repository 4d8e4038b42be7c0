"""Which results may stand side by side: only those of one setting. Pure functions over evaluation records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from burnish.report.records import Estimate, Evaluation, Row, TaskScore


@dataclass(frozen=True)
class QualityGroup:
    """Evaluations that share a setting, as one table.

    Attributes:
        files: where they came from.
        evaluation: the first of them, which names the setting.
        rows: of all of them, each model once.
        apart: why they do not stand in the first table: `seed 1, not 0`; empty for the first table.
    """

    files: tuple[str, ...]
    evaluation: Evaluation
    rows: tuple[Row, ...]
    apart: tuple[str, ...]

    @property
    def before(self) -> Row | None:
        """The model that the others are compared with; None where no two models were compared."""
        return self.evaluation.before

    @property
    def after(self) -> tuple[Row, ...]:
        """The models that burnish made."""
        return self.rows[1:] if self.before else self.rows


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task under one setting.

    Attributes:
        score: of the first evaluation that has it.
        values: by model, with the paired difference to the model before where there is one.
        file: set only where another row has the same name and setting but asked other questions.
    """

    score: TaskScore
    values: Mapping[str, tuple[Estimate, Estimate | None]]
    file: str | None = None


def quality_groups(evaluations: Mapping[str, Evaluation], *, mix_settings: bool = False) -> tuple[QualityGroup, ...]:
    """Evaluations by setting, in the order of their first files; all in one where settings may be mixed."""
    groups: dict[object, list[str]] = {}
    for file, evaluation in evaluations.items():
        groups.setdefault(None if mix_settings else tuple(_setting(evaluation).items()), []).append(file)
    first = next(iter(evaluations.values()), None)
    found = []
    for files in groups.values():
        rows: dict[str, Row] = {}
        for row in (row for file in files for row in evaluations[file].rows):
            rows.setdefault(row.model, row)
        evaluation = evaluations[files[0]]
        differences = () if first is None else _differences(_setting(evaluation), _setting(first))
        found.append(QualityGroup(tuple(files), evaluation, tuple(rows.values()), differences))
    return tuple(found)


def task_rows(evaluations: Mapping[str, Evaluation], *, mix_settings: bool = False) -> tuple[TaskRow, ...]:
    """Task scores of all evaluations; two share a row only when the whole setting of the task is the same.

    Args:
        evaluations: by file.
        mix_settings: let the task, the metric and the filter alone decide.
    """
    rows: dict[tuple[object, ...], TaskRow] = {}
    for file, evaluation in evaluations.items():
        for score in evaluation.tasks:
            name = (score.task, score.metric, score.filter)
            visible = (*name, score.version, score.num_fewshot, score.limit, score.chat_template_hash)
            key = name if mix_settings else (*visible, score.fingerprint, *_task_setting(evaluation))
            alike = not mix_settings and key not in rows and any(other[: len(visible)] == visible for other in rows)
            row = rows.setdefault(key, TaskRow(score, {}, file if alike else None))
            measured = zip(evaluation.rows, score.values, score.differences, strict=True)
            values = {model.model: (value, difference) for model, value, difference in measured}
            rows[key] = TaskRow(row.score, {**values, **row.values}, row.file)
    return tuple(rows.values())


def _before(evaluation: Evaluation) -> str | None:
    return evaluation.before.model if evaluation.before else None


def _task_setting(evaluation: Evaluation) -> tuple[object, ...]:
    """What all tasks of an evaluation share; the differences are to the model before."""
    return evaluation.tokenizer_hash, evaluation.seed, _before(evaluation)


def _setting(evaluation: Evaluation) -> dict[str, object]:
    return {
        "task": f"{evaluation.task}, version {evaluation.version}",
        "text": evaluation.fingerprint,
        "samples": evaluation.num_samples,
        "length": evaluation.max_length,
        "chat template": evaluation.chat_template_hash,
        "tokenizer": evaluation.tokenizer_hash,
        "seed": evaluation.seed,
        "model before": _before(evaluation),
    }


def _differences(setting: Mapping[str, object], other: Mapping[str, object]) -> tuple[str, ...]:
    different = [name for name in setting if setting[name] != other[name]]
    return tuple(f"{name} {_brief(setting[name])}, not {_brief(other[name])}" for name in different)


def _brief(value: object) -> str:
    """A hash by its first digits, a path by its last part."""
    text = "none" if value is None else str(value)
    return text[:8] if len(text) == 32 and set(text) <= set("0123456789abcdef") else text.rpartition("/")[2]
