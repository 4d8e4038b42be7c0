"""What an evaluation found and under which setting, as one JSON-ready record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from burnish.evaluate.estimate import Estimate
from burnish.evaluate.measure import Speed
from burnish.evaluate.tasks import TaskResult

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Comparison:
    """One model against the model before, on the same tokens.

    Attributes:
        forward_kl: KL(before || after), nats per token.
        top1_agreement: part of the tokens where both put the same token first.
        nll_difference: after minus before, paired, nats per token; its exp is the ratio of perplexities.
    """

    forward_kl: Estimate
    top1_agreement: Estimate
    nll_difference: Estimate


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        model: directory or hub name.
        num_parameters: stored elements.
        bytes_on_disk: bytes of all stored tensors.
        nll: negative log-likelihood, nats per predicted token.
        perplexity: exp of it.
        comparison: None for the first model.
        speeds: one for each batch size; empty unless measured.
    """

    model: str
    num_parameters: int
    bytes_on_disk: int
    nll: Estimate
    perplexity: Estimate
    comparison: Comparison | None
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class EvaluateResult:
    """Rows under one setting, the model before first, and everything that could explain a difference to another result.

    Attributes:
        rows: one for each model.
        dataset: what was asked for; None for the bundled held-out text.
        split: split of a Hub data set.
        sources: documents used from each source.
        fingerprint: hash of the token blocks.
        tokenizer_hash: hash of the tokenizer that made them.
        chat_template_hash: hash of its chat template, if it has one.
        num_samples: blocks evaluated.
        max_length: tokens in a block.
        num_tokens: tokens evaluated, without padding.
        vocab_size: logits that took part; fewer than a model has where the models are padded differently.
        batch_size: blocks at a time.
        dtype: of weights and computation.
        device: where.
        seed: order of the bundled documents, and choice of the tasks' examples.
        environment: versions, platform and devices.
        tasks: one for each metric of each task that was asked for, with its own setting.
        task, version: what was measured; results of different versions cannot be compared.
    """

    rows: tuple[Row, ...]
    dataset: str | None
    split: str
    sources: dict[str, int]
    fingerprint: str
    tokenizer_hash: str
    chat_template_hash: str | None
    num_samples: int
    max_length: int
    num_tokens: int
    vocab_size: int
    batch_size: int
    dtype: str
    device: str
    seed: int
    environment: dict[str, object]
    tasks: tuple[TaskResult, ...] = ()
    task: str = "language-modelling"
    version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a number that is not finite becomes null."""
        result: dict[str, Any] = _finite(asdict(self))
        return result

    def table(self) -> Group:
        """For a terminal: the models, their tasks and their speeds, as far as measured."""
        from burnish.evaluate.table import tables

        return tables(self)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
