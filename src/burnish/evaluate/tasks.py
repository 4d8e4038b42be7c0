"""Scores of tasks from the answers that models gave, and paired differences. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from burnish.evaluate.estimate import Estimate, jackknife, mean, weighted_mean

Aggregate = Callable[[list[Any]], float]


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, or of a group of tasks, for all models under one setting.

    Attributes:
        task: name.
        version: of the task's definition, as the task says it; None where it does not.
        num_fewshot: examples before each question.
        limit: documents asked for; None for all.
        chat_template_hash: hash of the chat template that wrapped the prompts; None where none did.
        fingerprint: hash of all prompts and targets.
        metric: such as `acc` or `exact_match`.
        filter: what extracted the answers; `none` where nothing did.
        higher_is_better: None where the task does not say.
        num_samples: documents that were scored.
        values: one for each model.
        differences: each model minus the first one on the same documents; None for the first, and where the two were
            not scored on the same documents.
    """

    task: str
    version: str | None
    num_fewshot: int
    limit: int | None
    chat_template_hash: str | None
    fingerprint: str
    metric: str
    filter: str
    higher_is_better: bool | None
    num_samples: int
    values: tuple[Estimate, ...]
    differences: tuple[Estimate | None, ...]


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: lm-eval's own dictionary (tasks, groups), and the setting that all models share."""

    loaded: dict[str, Any]
    limit: int | None
    seed: int


@dataclass(frozen=True)
class Answers:
    """What one model made of one task: document -> value of each (metric, filter), and a hash of what it was asked."""

    values: dict[tuple[str, str], dict[int, Any]]
    fingerprint: str


def task_results(
    tasks: Tasks, answers: Sequence[dict[str, Answers]], chat_template_hash: str | None
) -> tuple[TaskResult, ...]:
    """Scores of all models on all tasks and groups, and each model's paired difference to the first.

    A mean has the error of a mean; any other aggregate (F1, a perplexity, BLEU) that of the jackknife over documents.
    A group is the mean of its tasks, weighted as the group says.

    Args:
        tasks: as loaded.
        answers: of each model, the one before first.
        chat_template_hash: hash of the template that wrapped the prompts, if one did.
    """
    results = [
        _task_result(name, task, tasks.limit, chat_template_hash, key, [each[name] for each in answers])
        for name, task in tasks.loaded["tasks"].items()
        for key in answers[0][name].values
    ]
    groups = [
        result
        for group in tasks.loaded.get("groups", {}).values()
        for aggregate in group.aggregate_metric_list or ()
        for result in _group_results(group, aggregate, results)
    ]
    return (*groups, *results)


def _task_result(
    name: str,
    task: Any,
    limit: int | None,
    chat_template_hash: str | None,
    key: tuple[str, str],
    answers: Sequence[Answers],
) -> TaskResult:
    from lm_eval.api.metrics import mean as plain_mean

    metric, answer_filter = key
    aggregate = task.aggregation().get(metric, plain_mean)
    found = [each.values.get(key, {}) for each in answers]
    score = _mean_score if aggregate is plain_mean else lambda *models: _jackknife_score(aggregate, *models)
    better = task.higher_is_better().get(metric)
    return TaskResult(
        task=name,
        version=None if task.VERSION is None else str(task.VERSION),
        num_fewshot=task.get_config("num_fewshot"),
        limit=limit,
        chat_template_hash=chat_template_hash,
        fingerprint=answers[0].fingerprint,
        metric=metric,
        filter=answer_filter,
        higher_is_better=None if better is None else bool(better),
        num_samples=len(found[0]),
        values=tuple(score(list(values.values())) for values in found),
        differences=(
            None,
            *(
                score(list(values.values()), list(found[0].values())) if values.keys() == found[0].keys() else None
                for values in found[1:]
            ),
        ),
    )


def _mean_score(values: list[Any], before: list[Any] | None = None) -> Estimate:
    """Mean, or mean difference to `before`, document by document."""
    if before is None:
        return mean([float(value) for value in values])
    return mean([float(value) - float(base) for value, base in zip(values, before, strict=True)])


def _jackknife_score(aggregate: Aggregate, values: list[Any], before: list[Any] | None = None) -> Estimate:
    """Aggregate, or its difference to that of `before`, both without the same documents."""

    def statistic(kept: Sequence[int]) -> float:
        value = float(aggregate([values[i] for i in kept]))
        return value if before is None else value - float(aggregate([before[i] for i in kept]))

    return jackknife(statistic, len(values))


def _group_results(group: Any, aggregate: Any, results: Sequence[TaskResult]) -> Iterator[TaskResult]:
    """A group's own metric, once for each filter that its tasks have; nothing where its tasks have none of it."""
    members = {task.task_name for task in group.get_all_tasks()}
    of_metric = [result for result in results if result.task in members and result.metric == aggregate.metric]
    for answer_filter in aggregate.filter_list or dict.fromkeys(result.filter for result in of_metric):
        parts = [result for result in of_metric if result.filter == answer_filter]
        if not parts:
            continue
        weights = [part.num_samples if aggregate.weight_by_size else 1 for part in parts]
        columns = zip(*(part.values for part in parts), strict=True)
        differences = zip(*(part.differences for part in parts), strict=True)
        yield TaskResult(
            task=group.name,
            version=None if group.version == "N/A" else group.version,
            num_fewshot=max(part.num_fewshot for part in parts),
            limit=parts[0].limit,
            chat_template_hash=parts[0].chat_template_hash,
            fingerprint=fingerprint([part.fingerprint for part in parts]),
            metric=aggregate.metric,
            filter=answer_filter,
            higher_is_better=parts[0].higher_is_better,
            num_samples=sum(part.num_samples for part in parts),
            values=tuple(weighted_mean(column, weights) for column in columns),
            differences=tuple(_weighted_difference(column, weights) for column in differences),
        )


def _weighted_difference(column: Sequence[Estimate | None], weights: Sequence[float]) -> Estimate | None:
    known = [estimate for estimate in column if estimate is not None]
    return weighted_mean(known, weights) if len(known) == len(column) else None


def fingerprint(texts: Sequence[str]) -> str:
    """Hash of texts in their order."""
    return xxhash.xxh3_128_hexdigest("\n".join(texts).encode())
