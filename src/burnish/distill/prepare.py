"""Understand a request to distil before the work starts: every check that needs only headers, configs and flags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_config, load_tokenizer
from burnish.data.vocabulary import shared_vocab_size
from burnish.distill.divergence import divergence
from burnish.distill.stored import StoredLogits
from burnish.distill.trainer import Objective
from burnish.optim.training import choose_schedule
from burnish.runs import choose_device, ranks
from burnish.runs.units import parse_count
from burnish.training.options import EVALUATIONS, forward_dtype, require_in_range, require_length, training_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """A request that has passed every check that needs no weights.

    Attributes:
        student, teacher: what is read; no teacher where its logits are stored already.
        stored: the stored logits, where they are there.
        tokenizer: of the student.
        vocab_size: tokens that both know.
        device, dtype: where, and the type of the forward pass.
        steps, tokens_per_step: of training.
        eval_every, checkpoint_every: steps.
        options: as given.
        notes: what is worth knowing.
        forecast: bytes.
    """

    student: Checkpoint
    teacher: Checkpoint | None
    stored: StoredLogits | None
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    device: torch.device
    dtype: str
    objective: Objective
    steps: int
    tokens_per_step: int
    eval_every: int
    checkpoint_every: int
    options: dict[str, Any]
    notes: list[str]
    forecast: dict[str, int]

    @property
    def num_blocks(self) -> int:
        """Blocks that the whole training reads."""
        return self.steps * self.tokens_per_step // int(self.options["max_length"])

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate grows."""
        return math.ceil(float(self.options["warmup"]) * self.steps)

    def teacher_fingerprint(self) -> dict[str, Any]:
        """What stored logits depend on, apart from the tokens."""
        options = self.options
        mine = {
            "temperature": options["temperature"],
            "top_logits": options["top_logits"],
            "teacher_top_k": options["teacher_top_k"],
            "vocab_size": self.vocab_size,
        }
        return mine | ({"teacher": self.teacher.fingerprint()} if self.teacher else {})


def prepare(options: dict[str, Any]) -> Job:
    """Check a request; every check that needs only headers, configs, tokenizers and flags is here."""
    require_in_range(options, counts=("batch_size", "gradient_accumulation", "eval_samples", "top_logits"))
    options = options | {"schedule": choose_schedule(options["optimizer"], options["schedule"])}
    trust = bool(options["trust_remote_code"])
    objective = Objective(
        divergence(options["loss"]), options["temperature"], options["ce_weight"], options["hidden_weight"]
    )
    student = Checkpoint.open(options["student"])
    config, tokenizer = load_config(student, trust_remote_code=trust), load_tokenizer(student, trust_remote_code=trust)
    require_length(student.name, config, options["max_length"])
    logits = Path(options["teacher_logits"]) if options["teacher_logits"] is not None else None
    there = logits is not None and logits.is_dir()
    if options["teacher"] is None and not there:
        raise ValueError("give a teacher, or teacher_logits that were stored before")
    teacher, vocab_size, notes = None, int(config.vocab_size), []
    if options["teacher"] is not None:
        teacher = Checkpoint.open(options["teacher"])
        teacher_config = load_config(teacher, trust_remote_code=trust)
        sizes = [int(teacher_config.vocab_size), vocab_size]
        vocabularies = [load_tokenizer(teacher, trust_remote_code=trust).get_vocab(), tokenizer.get_vocab()]
        vocab_size = shared_vocab_size([teacher.name, student.name], vocabularies, sizes)
        if sizes[0] != sizes[1]:
            notes.append(f"teacher and student have {sizes} logits: the first {vocab_size} take part")
        _require_routing(teacher, teacher_config, options["teacher_top_k"])
        if objective.hidden_weight and teacher_config.hidden_size != config.hidden_size:
            raise ValueError(
                f"hidden_weight={objective.hidden_weight}: hidden states of {config.hidden_size} and"
                f" {teacher_config.hidden_size} numbers cannot be compared: leave it 0"
            )
    if logits is not None and objective.hidden_weight:
        raise ValueError("hidden_weight > 0 needs the teacher itself: stored logits hold no hidden states")
    if options["top_logits"] > vocab_size:
        raise ValueError(f"top_logits={options['top_logits']}: choose 1..{vocab_size}")
    device = choose_device(options["device"])
    per_step = options["max_length"] * options["batch_size"] * options["gradient_accumulation"] * ranks.world_size()
    budget = parse_count(options["tokens"], "tokens")
    steps = max(1, round(budget / per_step))
    return Job(
        student=student,
        teacher=teacher,
        stored=StoredLogits.open(logits, {}) if there and logits is not None else None,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        device=device,
        dtype=forward_dtype(options["dtype"], device),
        objective=objective,
        steps=steps,
        tokens_per_step=per_step,
        eval_every=_steps(options["eval_every"], "eval_every", per_step, steps),
        checkpoint_every=_steps(options["checkpoint_every"], "checkpoint_every", per_step, steps),
        options=options,
        notes=notes,
        forecast=_forecast(student, None if there else teacher),
    )


def _require_routing(teacher: Checkpoint, config: Any, top_k: int | None) -> None:
    if top_k is None:
        return
    own = getattr(config, "num_experts_per_tok", None)
    experts = next(
        (getattr(config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts")
         if getattr(config, name, None)), None,
    )  # fmt: skip
    if own is None or experts is None:
        raise ValueError(f"teacher_top_k={top_k}, but {teacher.name} has no experts: leave it out")
    if not own <= top_k <= experts:
        raise ValueError(f"teacher_top_k={top_k}: choose {own}..{experts}, from its router's top-k to all experts")


def _steps(tokens: int | str | None, name: str, tokens_per_step: int, steps: int) -> int:
    if tokens is None:
        return max(1, steps // EVALUATIONS)
    return max(1, round(parse_count(tokens, name) / tokens_per_step))


def _forecast(student: Checkpoint, teacher: Checkpoint | None) -> dict[str, int]:
    """Bytes of a training of the whole student, with the teacher as stored."""
    needed = training_bytes(student.num_parameters, student.nbytes)
    return {
        "student_bytes": needed["memory_bytes"],
        "teacher_bytes": teacher.nbytes if teacher else 0,
        "disk_bytes": needed["disk_bytes"],
    }
