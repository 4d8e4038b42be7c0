"""Understand a request to tune before the work starts: every check that needs only headers, configs, data and flags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_config, load_tokenizer
from burnish.errors import UnsupportedModelError
from burnish.optim.training import choose_schedule
from burnish.runs import choose_device, ranks
from burnish.runs.randomness import random_state_kept
from burnish.runs.units import parse_count
from burnish.training.options import (
    EVALUATIONS,
    forward_dtype,
    require_dtype,
    require_in_range,
    require_length,
    training_bytes,
)
from burnish.tune import penalty as penalties
from burnish.tune.adapters import Lora, add_adapters, base_name, require_peft
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
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")


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
        return int(self.options["batch_size"] * self.options["gradient_accumulation"] * ranks.world_size())

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
    lora = _lora(options)
    device = choose_device(options["device"])
    require_dtype(options["dtype"])
    source = Checkpoint.open(options["model"])
    trust = bool(options["trust_remote_code"])
    config, tokenizer = load_config(source, trust_remote_code=trust), load_tokenizer(source, trust_remote_code=trust)
    require_length(source.name, config, options["max_length"])
    quantised = "quantization_config" in source.config
    if quantised and (lora is None or options["merge"]):
        what = "merged into" if lora else "trained"
        raise UnsupportedModelError(f"{source.name}: its quantised weights cannot be {what}: train adapters, --lora")
    load = options["dtype"] if forward_only else _trained_dtype(options["dtype"], device, lora)
    forecast = _forecast(source, config, lora, load, options, trust=trust)
    rows, evaluation = _read(options, tokenizer)
    steps = options["steps"] or _steps_of(options, len(rows))
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
    for owner, names in of_others:
        for option in names:
            if options[option] is not None and options[option] is not False:
                raise ValueError(f"{option}={options[option]!r} has no effect without {owner}: leave it out")
    if options["steps"] is not None and options["epochs"] is not None:
        raise ValueError(f"steps={options['steps']} and epochs={options['epochs']}: give one of them")


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
        rank = options["lora_rank"] or Lora.rank
        known |= {"lora_rank": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "lora_targets": Lora.targets}
    if options["steps"] is None and "steps" not in known:
        known["epochs"] = EPOCHS
    for name, value in known.items():
        if filled[name] is None:
            filled[name] = value
    if isinstance(filled["blocks"], str):
        filled["blocks"] = parse_count(filled["blocks"], "blocks")
    return filled


def _lora(options: dict[str, Any]) -> Lora | None:
    if not options["lora"]:
        return None
    require_peft()
    targets = options["lora_targets"]
    return Lora(
        rank=options["lora_rank"],
        alpha=options["lora_alpha"],
        dropout=options["lora_dropout"],
        targets=targets if isinstance(targets, str) else tuple(targets),
        seed=options["seed"],
    )


def _trained_dtype(dtype: str, device: torch.device, lora: Lora | None) -> str:
    """Weights that gradients train are float32; those that adapters leave alone need only what a pass needs."""
    return forward_dtype(dtype, device) if lora else "float32"


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


def _steps_of(options: dict[str, Any], rows: int) -> int:
    epochs = float(options["epochs"])
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs={epochs}: expected a number above 0")
    per_step = int(options["batch_size"] * options["gradient_accumulation"] * ranks.world_size())
    return max(1, math.ceil(epochs * math.ceil(rows / per_step)))


def _forecast(
    source: Checkpoint, config: Any, lora: Lora | None, load: str, options: dict[str, Any], *, trust: bool
) -> dict[str, int]:
    """Numbers of weights, and bytes in memory (but for one forward pass) and on disk.

    They are taken from a model without weights, which shows, too, whether adapters and blocks find their tensors.
    """
    with torch.device("meta"), random_state_kept():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        if lora is not None:
            model = add_adapters(model, lora, base_name(source))
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    frozen = sum(tensor.numel() for tensor in model.parameters()) - trained
    stored = load == "auto" or "quantization_config" in source.config
    width = source.nbytes / max(source.num_parameters, 1) if stored else getattr(torch, load).itemsize
    each = 4 if lora else math.ceil(width)  # PEFT keeps adapters in float32
    held = trained * each + (0 if lora is None else source.nbytes if stored else math.ceil(frozen * width))
    output = 4 * trained if lora and not options["merge"] else source.nbytes
    if not is_forward_only(options["optimizer"]):
        disk = training_bytes(trained, output)["disk_bytes"]
        return {"trained_weights": trained, "memory_bytes": held + 12 * trained, "disk_bytes": disk}
    optimizer = zeroth_order(model, options)
    block = max(block.size for block in optimizer.blocks)
    copy = 4 * block if has_blocks(options["optimizer"]) or each < 4 else 0
    noise = 4 * block if has_blocks(options["optimizer"]) else 0  # otherwise it is drawn piece by piece
    return {
        "trained_weights": sum(block.size for block in optimizer.blocks),
        "block_weights": block,
        "memory_bytes": held + copy + noise,
        "disk_bytes": 2 * (trained * each + copy) + output,
    }
