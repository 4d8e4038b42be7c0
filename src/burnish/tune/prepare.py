"""Understand a request to tune before the work starts: every check that needs only headers, configs, data and flags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_config, load_tokenizer
from burnish.optim.training import choose_schedule
from burnish.runs import choose_device
from burnish.runs.units import parse_count
from burnish.training.adapters import LORA_OPTIONS, Lora, chosen_lora, lora_defaults
from burnish.training.base import outlined, require_trainable, trained_dtype
from burnish.training.options import (
    EVALUATIONS,
    forward_dtype,
    refuse_without_effect,
    require_dtype,
    require_in_range,
    require_length,
    rows_per_step,
    steps_of,
    training_bytes,
)
from burnish.tune import penalty as penalties
from burnish.tune.rows import Rows
from burnish.tune.score import SCORES
from burnish.tune.zeroth_order import (
    BLOCK_OPTIONS,
    DEFAULTS,
    EPS,
    LR,
    OPTIONS,
    STEPS,
    has_blocks,
    is_forward_only,
    zeroth_order,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBJECTIVES = ("loss", *SCORES)
PENALISED = "proxgen"
EPOCHS = 3.0
MAX_GRAD_NORM = 1.0
FIRST_ORDER_LR = {False: 2e-5, True: 2e-4}
"""For all weights of a model, and for LoRA."""
COUNTS = (
    "batch_size", "gradient_accumulation", "eval_samples", "queries", "steps", "interval", "eval_every",
    "checkpoint_every",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A request that has passed every check that needs no weights.

    Attributes:
        source: the model that is read.
        tokenizer: of it.
        rows, evaluation: what is trained and evaluated on.
        device: where.
        load: type that the weights are loaded in; "auto" as stored.
        precision: of the forward pass, where that is another.
        lora: adapters, or None where all weights are trained.
        forward_only: no gradients.
        steps, eval_every, checkpoint_every: in optimizer steps.
        options: as given, with what was left out filled in.
        notes: what is worth knowing.
        forecast: bytes, and numbers of weights.
    """

    source: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    evaluation: Rows | None
    device: torch.device
    load: str
    precision: str
    lora: Lora | None
    forward_only: bool
    steps: int
    eval_every: int
    checkpoint_every: int
    options: dict[str, Any]
    notes: list[str]
    forecast: dict[str, int]

    @property
    def examples_per_step(self) -> int:
        """Of all processes."""
        return rows_per_step(self.options)

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate grows."""
        return math.ceil(float(self.options["warmup"]) * self.steps)

    @property
    def pad(self) -> int:
        """Id of the token that fills up a batch."""
        found = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)


def prepare(options: dict[str, Any]) -> Job:
    """Check a request; nothing is written and no weight is read."""
    schedule = choose_schedule(options["optimizer"], options["schedule"], forward_only=True)
    forward_only = is_forward_only(options["optimizer"])
    _refuse_without_effect(options, forward_only)
    options = _filled(options, forward_only) | {"schedule": schedule}
    clip = MAX_GRAD_NORM if options["max_grad_norm"] is None else options["max_grad_norm"]
    require_in_range(options | {"max_grad_norm": clip}, counts=[name for name in COUNTS if options[name] is not None])
    if options["objective"] not in OBJECTIVES:
        raise ValueError(f"objective={options['objective']!r}: choose one of {', '.join(OBJECTIVES)}")
    if options["objective"] != "loss" and not forward_only:
        raise ValueError(
            f"objective={options['objective']!r} is a score of generated text and has no gradient: take"
            " --optimizer mezo or mezo-bcd"
        )
    if options["dataset"] is None:
        raise ValueError("give a dataset: rows with `messages`, or with `prompt` and `completion`")
    if options["optimizer"] == PENALISED:
        penalties.penalty(options["penalty"], options["penalty_strength"])
    lora = chosen_lora(options)
    device = choose_device(options["device"])
    require_dtype(options["dtype"])
    source = Checkpoint.open(options["model"])
    trust = bool(options["trust_remote_code"])
    config, tokenizer = load_config(source, trust_remote_code=trust), load_tokenizer(source, trust_remote_code=trust)
    require_length(source.name, config, options["max_length"])
    require_trainable(source, lora, merge=options["merge"])
    load = options["dtype"] if forward_only else trained_dtype(options["dtype"], device, lora)
    forecast = _forecast(source, config, lora, load, options, trust=trust)
    rows, evaluation = _read(options, tokenizer)
    steps = steps_of(options, len(rows))
    return Job(
        source=source,
        tokenizer=tokenizer,
        rows=rows,
        evaluation=evaluation,
        device=device,
        load=load,
        precision="float32" if forward_only else forward_dtype(options["dtype"], device),
        lora=lora,
        forward_only=forward_only,
        steps=steps,
        eval_every=options["eval_every"] or max(1, steps // EVALUATIONS),
        checkpoint_every=options["checkpoint_every"] or max(1, steps // EVALUATIONS),
        options=options,
        notes=[f"trained on {rows.counts}"] + ([f"evaluated on {evaluation.counts}"] if evaluation else []),
        forecast=forecast,
    )


def _refuse_without_effect(options: dict[str, Any], forward_only: bool) -> None:
    """An option of another method is a mistake, not a wish."""
    name = options["optimizer"]
    if forward_only and options["max_grad_norm"] is not None:
        raise ValueError(
            f"max_grad_norm={options['max_grad_norm']} has no effect: {name} has no gradient; leave it out"
        )
    if forward_only and options["gradient_checkpointing"]:
        raise ValueError(f"gradient_checkpointing has no effect: {name} has no backward pass")
    of_others: list[tuple[str, tuple[str, ...]]] = [] if forward_only else [("mezo or mezo-bcd", OPTIONS)]
    if not has_blocks(name):
        of_others.append(("mezo-bcd", BLOCK_OPTIONS))
    if name != PENALISED:
        of_others.append((PENALISED, penalties.OPTIONS))
    if not options["lora"]:
        of_others.append(("--lora", (*LORA_OPTIONS, "merge")))
    refuse_without_effect(options, of_others)


def _filled(options: dict[str, Any], forward_only: bool) -> dict[str, Any]:
    """Options with what was left out, as far as it has an effect."""
    lora, filled = bool(options["lora"]), dict(options)
    known: dict[str, Any] = {"max_grad_norm": MAX_GRAD_NORM, "lr": FIRST_ORDER_LR[lora]}
    if forward_only:
        known = DEFAULTS | {"eps": EPS[lora], "lr": LR[options["optimizer"], lora]}
        if options["epochs"] is None:
            known["steps"] = STEPS
        if not has_blocks(options["optimizer"]):
            known = {name: value for name, value in known.items() if name not in BLOCK_OPTIONS}
    if options["optimizer"] == PENALISED:
        known |= penalties.DEFAULTS
    if lora:
        known |= lora_defaults(options)
    if options["steps"] is None and "steps" not in known:
        known["epochs"] = EPOCHS
    for name, value in known.items():
        if filled[name] is None:
            filled[name] = value
    if isinstance(filled["blocks"], str):
        filled["blocks"] = parse_count(filled["blocks"], "blocks")
    return filled


def _read(options: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, Rows | None]:
    rows = Rows.read(tokenizer, options["dataset"], max_length=options["max_length"], split=options["split"])
    if options["eval_dataset"] is None:
        return rows, None
    return rows, Rows.read(
        tokenizer,
        options["eval_dataset"],
        max_length=options["max_length"],
        split=options["split"],
        seed=0,  # the same rows for every seed, so that runs can be compared
        limit=options["eval_samples"],
    )


def _forecast(
    source: Checkpoint, config: Any, lora: Lora | None, load: str, options: dict[str, Any], *, trust: bool
) -> dict[str, int]:
    """Numbers of weights, and bytes in memory (but for one forward pass) and on disk.

    They are taken from a model without weights, which shows, too, whether adapters and blocks find their tensors.
    """
    found = outlined(source, config, lora, load, merge=options["merge"], trust=trust)
    if not is_forward_only(options["optimizer"]):
        disk = training_bytes(found.trained, found.written)["disk_bytes"]
        return {"trained_weights": found.trained, "memory_bytes": found.held + 12 * found.trained, "disk_bytes": disk}
    optimizer = zeroth_order(found.model, options)
    block = max(block.size for block in optimizer.blocks)
    copy = 4 * block if has_blocks(options["optimizer"]) or found.width < 4 else 0
    noise = 4 * block if has_blocks(options["optimizer"]) else 0  # otherwise it is drawn piece by piece
    return {
        "trained_weights": sum(block.size for block in optimizer.blocks),
        "block_weights": block,
        "memory_bytes": found.held + copy + noise,
        "disk_bytes": 2 * (found.trained * found.width + copy) + found.written,
    }
