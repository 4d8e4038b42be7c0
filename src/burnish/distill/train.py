"""Compose student, teacher, data and `Trainer` into one distillation; the only file that knows all the others."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from burnish.checkpoint import Staging
from burnish.checkpoint.load import load_model
from burnish.checkpoint.staging import refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.data import TokenBlocks, bundled_text, token_blocks
from burnish.data.examples import IGNORED
from burnish.data.packed import PackedTokens, identity, pack_tokens
from burnish.distill.card import model_card
from burnish.distill.prepare import Job, prepare
from burnish.distill.stored import StoredLogits, store
from burnish.distill.teacher import LiveTeacher, StoredTeacher, Teacher
from burnish.distill.trainer import DistillTrainer
from burnish.families.conversion import RECORD_FORMAT, now
from burnish.optim.training import trainer_options
from burnish.runs import Progress, environment, ranks
from burnish.training.base import whole_weights
from burnish.training.course import METRICS_FILE, Course, Metrics
from burnish.training.fit import arguments, fit, staged
from burnish.training.head import require_head
from burnish.training.options import determining, plain
from burnish.training.output import described, finish, perplexity, write_weights

HEAD_PROBE_TOKENS = 16


@dataclass(frozen=True)
class DistillResult:
    """What a distillation did.

    Attributes:
        out: the written directory; None for a dry run.
        record: the run record, as in `burnish.json`.
        history: lines of `metrics.jsonl`: training lines (`loss`) and evaluations (`eval_kl`).
    """

    out: Path | None
    record: dict[str, Any]
    history: tuple[dict[str, Any], ...] = ()

    def summary(self) -> str:
        """A few lines for people: what was trained on what, and what it brought or would take."""
        training, needs = self.record["training"], self.record["forecast"]
        lines = [
            f"{self.record['source']['name']} from {self.record['teacher']['name']}: {training['tokens']:,} tokens in"
            f" {training['steps']:,} steps of {training['tokens_per_step']:,}"
        ]
        if self.out is None:
            lines.append(
                f"dry run, nothing written: weights, gradients and optimizer of the student"
                f" {needs['student_bytes'] / 1e9:.2f} GB, teacher {needs['teacher_bytes'] / 1e9:.2f} GB, activations on"
                f" top; free disk needed {needs['disk_bytes'] / 1e9:.2f} GB"
            )
            return "\n".join(lines)
        first, last = training["first_evaluation"], training["last_evaluation"]
        if first and last:
            lines.append(
                f"held-out KL {first['eval_kl']:.4f} -> {last['eval_kl']:.4f}, perplexity"
                f" {perplexity(first['eval_nll']):,.1f} -> {perplexity(last['eval_nll']):,.1f}"
            )
        lines.append(
            f"train {self.record['seconds']['train']:.1f} s, {training['tokens_per_second']:,.0f} tokens/s; peak memory"
            f" {self.record['peak_rss_bytes'] / 1e9:.2f} GB"
        )
        lines.append(f"wrote {self.out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out) if self.out else None, **self.record}


def distill(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str] | None = None,
    dataset: str | os.PathLike[str] | None = None,
    split: str = "train",
    eval_dataset: str | os.PathLike[str] | None = None,
    eval_samples: int = 32,
    tokens: int | str = "10M",
    max_length: int = 512,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    loss: str = "forward-kl",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    hidden_weight: float = 0.0,
    teacher_top_k: int | None = None,
    teacher_logits: str | os.PathLike[str] | None = None,
    top_logits: int = 64,
    optimizer: str = "adamw",
    lr: float = 1e-4,
    schedule: str = "auto",
    warmup: float = 0.02,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    eval_every: int | str | None = None,
    checkpoint_every: int | str | None = None,
    gradient_checkpointing: bool = False,
    dtype: str = "auto",
    teacher_dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    report_to: str = "none",
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> DistillResult:
    """Train a student to predict what its teacher predicts.

    Args:
        student: directory or hub name of the model to train; all its weights are trained.
        out: directory to write; it appears complete or not at all.
        teacher: directory or hub name, in any form that transformers loads; None when `teacher_logits` are there.
        dataset: training text, as `burnish.data.load_texts`; None is the bundled corpus.
        split: of a Hub data set.
        eval_dataset: held-out text; None is the bundled held-out text when `dataset` is None, else no evaluation.
        eval_samples: blocks of it.
        tokens: how many to train on, such as "4B"; a smaller corpus is repeated.
        max_length: tokens in a block.
        batch_size: blocks per process and forward pass.
        gradient_accumulation: passes per step.
        loss: "forward-kl", "reverse-kl", "jensen-shannon" or "jensen-shannon:BETA".
        temperature: softens both distributions.
        ce_weight: share of the cross-entropy with the text in the loss.
        hidden_weight: weight of the hidden-state loss; needs equal hidden sizes and a live teacher.
        teacher_top_k: experts per token in the teacher's forward pass (Eq. 6 of the paper); None leaves the router's.
        teacher_logits: directory of stored logits: read where it is there, else written by the teacher first.
        top_logits: tokens stored per position; the rest is one more outcome.
        optimizer: "adamw", one of burnish.optim ("amuse", "muon", "normuon", "adamw-schedule-free", ...), or any name
            that `TrainingArguments(optim=)` knows.
        lr: peak learning rate.
        schedule: "cosine" (to 0), "linear" (to 0) or "constant", each after a linear warm-up; "auto" is cosine, or
            constant for an optimizer that averages.
        warmup: share of the steps.
        weight_decay: decoupled.
        max_grad_norm: gradients are clipped to it.
        eval_every: tokens between evaluations; None is a tenth of `tokens`.
        checkpoint_every: tokens between checkpoints; None is a tenth of `tokens`.
        gradient_checkpointing: recompute activations in the backward pass.
        dtype: "auto", "float32", "bfloat16" or "float16": of the forward pass; weights are trained in float32. auto is
            bfloat16 on a GPU that has it, else float32.
        teacher_dtype: of the teacher; auto as stored.
        device: "auto", "cpu" or "cuda"; under torchrun each process takes its own GPU.
        seed: of the order of the data and all random draws.
        report_to: "none", "tensorboard", "wandb" or "trackio"; metrics.jsonl is written always.
        dry_run: check everything and forecast; write nothing.
        overwrite: replace `out`, and discard unfinished work of other inputs.
        resume: continue unfinished work of the same inputs.
        max_shard_size: with a unit, such as "5GB".
        trust_remote_code: run code beside the models.
        callbacks: further callbacks of transformers.
        progress: where progress is shown; silent by default.

    Raises:
        BurnishError: the input cannot be used, the output cannot be written, or the loss is no longer a number.
        ValueError: an option is out of range.

    Source: arXiv 2605.28207, section 3.5: forward KL on logits at temperature 1, no other term, the whole student
    trained (confirmed by implementers of the paper); optimizer, learning rate, batch and schedule are not known and
    ours.

    Examples:
        >>> from burnish import distill
        >>> distill("qwen3-dense", "qwen3-distilled", teacher="Qwen/Qwen3-30B-A3B", tokens="4B")  # doctest: +SKIP
    """
    options = {name: value for name, value in locals().items() if name not in ("callbacks", "progress")}
    if progress is None or ranks.rank() != 0:
        progress = Progress(quiet=True)
    out, started = Path(out), now()
    refuse_existing(out, overwrite=overwrite)
    job = prepare(options)
    require_apart(out, job.student.path)
    require_disk_space(out, job.forecast["disk_bytes"])
    record = _new_record(job, started)
    if dry_run:
        return DistillResult(None, record)
    for note in job.notes:
        progress.say(note)
    with staged(out, _fingerprint(job), device=job.device, overwrite=overwrite, resume=resume) as staging:
        history = _work(job, staging, record, list(callbacks), progress)
    return DistillResult(out, ranks.of_first(record), tuple(history))


def _new_record(job: Job, started: str) -> dict[str, Any]:
    source, told = described(job.student), ("student", "out", "teacher")
    return {
        "format": RECORD_FORMAT,
        "verb": "distill",
        "started": started,
        "options": {key: value for key, value in plain(job.options).items() if key not in told},
        "source": source,
        "teacher": _teacher_record(job),
        "output": {key: source[key] for key in ("architecture", "parameters", "bytes")},
        "training": {
            "tokens": job.steps * job.tokens_per_step,
            "steps": job.steps,
            "tokens_per_step": job.tokens_per_step,
            "processes": ranks.world_size(),
            "dtype": job.dtype,
            "device": str(job.device),
        },
        "forecast": job.forecast,
        "environment": environment(),
        "notes": job.notes,
    }


def _teacher_record(job: Job) -> dict[str, Any]:
    if job.teacher is None:
        assert job.stored is not None
        return {"name": str(job.stored.directory), "parameters": 0, "bytes": 0}
    return {"name": job.teacher.name, "parameters": job.teacher.num_parameters, "bytes": job.teacher.nbytes}


def _fingerprint(job: Job) -> dict[str, Any]:
    """What determines the output."""
    return {
        "options": determining(job.options, "student", "teacher", "dataset", "teacher_logits"),
        "data": identity(job.options["dataset"]),
        "eval_data": identity(job.options["eval_dataset"]) if job.options["eval_dataset"] else None,
        "student": job.student.fingerprint(),
        "teacher": job.teacher.fingerprint() if job.teacher else None,
    }


class _Blocks(Dataset[dict[str, Tensor]]):
    """Training blocks, and the number of each for a stored teacher; the first token of a block is not predicted."""

    def __init__(self, packed: PackedTokens) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return self.packed.num_blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.packed.block(index)
        labels = ids.clone()
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels, "row": torch.tensor(index)}


class _EvalBlocks(Dataset[dict[str, Tensor]]):
    """Held-out blocks; their numbers follow those of the training blocks. Padding is not predicted."""

    def __init__(self, blocks: TokenBlocks, first_row: int) -> None:
        self.blocks, self.first_row = blocks, first_row

    def __len__(self) -> int:
        return len(self.blocks.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.blocks.input_ids[index], self.blocks.attention_mask[index]
        labels = ids.masked_fill(~mask, IGNORED)
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels, "row": torch.tensor(self.first_row + index)}


def _work(
    job: Job, staging: Staging, record: dict[str, Any], callbacks: list[TrainerCallback], progress: Progress
) -> list[dict[str, Any]]:
    """Pack, load, train, write, publish; returns the lines of metrics.jsonl."""
    clock = time.perf_counter()
    data, evaluation = _read_data(job, staging, progress)
    student = load_model(
        job.student,
        dtype=torch.float32,
        device=job.device if ranks.world_size() == 1 else None,
        trust_remote_code=job.options["trust_remote_code"],
    )
    require_head(student, data[0]["input_ids"][None, :HEAD_PROBE_TOKENS].to(student.device))
    teacher, tail_mass = _load_teacher(job, data, evaluation, progress)
    prepared = time.perf_counter()
    chosen = trainer_options(
        job.options["optimizer"],
        student,
        lr=job.options["lr"],
        weight_decay=job.options["weight_decay"],
        warmup_steps=job.warmup_steps,
    )
    if chosen.routing is not None:
        progress.say(str(chosen.routing))
    course = Course({"tokens": job.tokens_per_step}, {"eval_kl": "KL", "eval_nll": "nll"})
    trainer = DistillTrainer(
        student,
        teacher,
        job.objective,
        args=arguments(
            job.options,
            staging,
            steps=job.steps,
            warmup_steps=job.warmup_steps,
            eval_every=job.eval_every,
            checkpoint_every=job.checkpoint_every,
            device=job.device,
            precision=job.dtype,
            evaluate=evaluation is not None,
        ),
        train_dataset=data,
        eval_dataset=evaluation,
        callbacks=[
            *callbacks,
            *chosen.callbacks,
            Metrics(course, staging.files / METRICS_FILE, progress),
        ],
        optimizer_cls_and_kwargs=chosen.optimizer,
    )
    first_step = fit(trainer, staging, "distill", progress)
    trained = time.perf_counter()
    state = whole_weights(trainer, student, None)
    history = course.lines(trainer.state.log_history)
    if ranks.rank() == 0:
        write_weights(job.student, student, state, staging, max_shard_size=job.options["max_shard_size"])
        seconds = trained - prepared
        record["training"] |= {
            "optimizer": job.options["optimizer"],
            "lr": job.options["lr"],
            "schedule": job.options["schedule"],
            "loss": job.options["loss"],
            "temperature": job.options["temperature"],
            "tail_mass": tail_mass,
            "tokens_per_second": (job.steps - first_step) * job.tokens_per_step / seconds,
            "resumed_at_step": first_step,
            "blocks": len(data),
            "documents": data.packed.sources,
            **course.evaluations(history),
        }
        record["seconds"] = {
            "prepare": prepared - clock,
            "train": seconds,
            "write": time.perf_counter() - trained,
        }
        finish(record, job.student, staging, model_card, device=job.device)
    return history


def _read_data(job: Job, staging: Staging, progress: Progress) -> tuple[_Blocks, _EvalBlocks | None]:
    """Training blocks in a file, and held-out blocks; the first rank packs, the others read what it packed."""
    options = job.options
    if ranks.rank() != 0:
        ranks.wait_for_all()
    with progress.task("pack", job.num_blocks * options["max_length"], unit="tokens") as advance:
        packed = pack_tokens(
            job.tokenizer,
            options["dataset"],
            staging.work / "tokens.bin",
            num_blocks=job.num_blocks,
            max_length=options["max_length"],
            seed=options["seed"],
            split=options["split"],
            advance=advance,
        )
    if ranks.rank() == 0:
        ranks.wait_for_all()
    if packed.num_blocks < job.num_blocks:
        times = job.num_blocks / packed.num_blocks
        progress.say(f"the text has {packed.num_tokens:,} tokens: it is read {times:.1f} times")
    held_out = options["eval_dataset"]
    if held_out is None:
        if options["dataset"] is not None:
            return _Blocks(packed), None
        held_out = bundled_text("heldout")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a held-out text shorter than asked for is no fault
        blocks = token_blocks(
            job.tokenizer,
            held_out,
            num_samples=options["eval_samples"],
            max_length=options["max_length"],
            seed=0,  # the same text for every seed, so that runs can be compared
        )
    return _Blocks(packed), _EvalBlocks(blocks, packed.num_blocks)


def _load_teacher(
    job: Job, data: _Blocks, evaluation: _EvalBlocks | None, progress: Progress
) -> tuple[Teacher, float | None]:
    """The teacher, and the mean mass that stored logits lump together."""
    fingerprint = job.teacher_fingerprint() | {
        "tokens": data.packed.fingerprint,
        "held_out": evaluation.blocks.fingerprint if evaluation else None,
    }
    if job.stored is not None:
        stored = StoredLogits.open(job.stored.directory, fingerprint)
        return StoredTeacher(stored), stored.tail_mass
    assert job.teacher is not None
    directory = job.options["teacher_logits"]
    if directory is not None and ranks.rank() != 0:  # the first rank writes what all of them read
        ranks.wait_for_all()
        stored = StoredLogits.open(Path(directory), fingerprint)
        return StoredTeacher(stored), stored.tail_mass
    progress.say(f"loading {job.teacher.name}")
    settings: dict[str, Any] = {}
    if job.options["teacher_top_k"] is not None:
        settings["num_experts_per_tok"] = job.options["teacher_top_k"]
    device: torch.device | None = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if job.device.type != "cuda":
        device = job.device
    if "quantization_config" in job.teacher.config:  # weights that cannot be moved once they are loaded
        settings["device_map"], device = {"": device}, None
    teacher_dtype = job.options["teacher_dtype"]
    model = load_model(
        job.teacher,
        dtype=teacher_dtype if teacher_dtype == "auto" else getattr(torch, teacher_dtype),
        device=device,
        trust_remote_code=job.options["trust_remote_code"],
        **settings,
    ).eval()
    require_head(model, data[0]["input_ids"][None, :HEAD_PROBE_TOKENS].to(model.device))
    if directory is None:
        return LiveTeacher(model), None
    total = len(data) + (len(evaluation) if evaluation else 0)

    def block(row: int) -> Tensor:
        if row < len(data):
            return data.packed.block(row)
        assert evaluation is not None
        return evaluation[row - len(data)]["input_ids"]

    with progress.task("store the teacher's logits", total, unit="blocks") as advance:
        stored = store(
            model,
            block,
            total,
            Path(directory),
            best=job.options["top_logits"],
            temperature=job.objective.temperature,
            vocab_size=job.vocab_size,
            batch_size=job.options["batch_size"],
            fingerprint=fingerprint,
            advance=advance,
        )
    ranks.wait_for_all()
    progress.say(f"stored {stored.directory}; on average {stored.tail_mass:.2%} of the mass is in the rest")
    return StoredTeacher(stored), stored.tail_mass
