"""What an evaluation found and under which setting: one JSON, one table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from burnish.evaluate.estimate import Estimate
from burnish.evaluate.measure import Speed

if TYPE_CHECKING:
    from rich.table import Table


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
        speed: None unless measured.
    """

    model: str
    num_parameters: int
    bytes_on_disk: int
    nll: Estimate
    perplexity: Estimate
    comparison: Comparison | None
    speed: Speed | None


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
        seed: order of the bundled documents.
        environment: versions, platform and devices.
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
    task: str = "language-modelling"
    version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a number that is not finite becomes null."""
        result: dict[str, Any] = _finite(asdict(self))
        return result

    def table(self) -> Table:
        """One line a model; speeds with their ratio to the first model, red and said where it is below 1."""
        from rich import filesize
        from rich.markup import escape
        from rich.table import Table

        first, *others = self.rows
        headings = ["parameters", "bytes", "perplexity"]
        headings += ["KL (nats)", "top-1", "Δ nll (nats)"] if others else []
        headings += ["prefill tok/s", "decode tok/s", "memory"] if first.speed else []
        text = escape(self.dataset or "the bundled held-out text")
        table = Table(
            caption=f"{self.num_tokens:,} tokens of {text} in {self.num_samples} blocks of {self.max_length},"
            f" {self.dtype} on {self.device}; ± one standard error",
        )
        table.add_column("model", overflow="fold")
        for heading in headings:
            table.add_column(heading, justify="right")
        for label, row in zip(_labels([row.model for row in self.rows]), self.rows, strict=True):
            cells = [f"{row.num_parameters:,}", filesize.decimal(row.bytes_on_disk), _shown(row.perplexity, 3)]
            if others:
                seen = row.comparison
                cells += [_shown(seen.forward_kl, 4), f"{seen.top1_agreement.value:.1%}"] if seen else ["", ""]
                cells += [_shown(seen.nll_difference, 4)] if seen else [""]
            if row.speed:
                base = first.speed if row is not first else None
                cells += [
                    _rate(row.speed.prefill_tokens_per_second, base.prefill_tokens_per_second if base else None),
                    _rate(row.speed.decode_tokens_per_second, base.decode_tokens_per_second if base else None),
                    filesize.decimal(row.speed.peak_memory_bytes),
                ]
            table.add_row(escape(label), *cells)
        return table


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _labels(models: list[str]) -> list[str]:
    """The last parts of the names, where they tell the models apart."""
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    return short if len(set(short)) == len(models) and all(short) else models


def _shown(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.standard_error:.{digits}f}"


def _rate(rate: float, base: float | None) -> str:
    if base is None:
        return f"{rate:,.0f}"
    text = f"{rate:,.0f} ({rate / base:.2f}x)"
    return text if rate >= base else f"[red]{text} slower[/]"
