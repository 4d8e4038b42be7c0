"""Compose model, adapters, data and `Trainer` into one fine-tuning; the only file that knows all the others."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import TrainerCallback

from burnish.checkpoint import Staging
from burnish.checkpoint.staging import refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.data.packed import identity
from burnish.families.conversion import RECORD_FORMAT, now
from burnish.optim.training import trainer_options
from burnish.penalties import sparsity
from burnish.runs import Progress, environment, ranks
from burnish.training.adapters import NOT_OF_ADAPTERS
from burnish.training.base import load_base, weights_hash, whole_weights, write_trained
from burnish.training.course import METRICS_FILE, Course, Metrics
from burnish.training.fit import arguments, fit, newest_checkpoint, staged
from burnish.training.head import require_head
from burnish.training.options import determining, plain
from burnish.training.output import described, finish
from burnish.training.trainer import TokenTrainer
from burnish.tune.card import model_card
from burnish.tune.penalty import penalty as make_penalty
from burnish.tune.prefix import prefix_reuse
from burnish.tune.prepare import PENALISED, Job, prepare
from burnish.tune.score import SCORES
from burnish.tune.trainer import TuneTrainer, ZerothOrderTrainer
from burnish.tune.zeroth_order import has_blocks, zeroth_order

TRAJECTORY_FILE = "trajectory.jsonl"
PROBE_TOKENS = 16


@dataclass(frozen=True)
class TuneResult:
    """What a fine-tuning did.

    Attributes:
        out: the written directory; None for a dry run.
        record: the run record, as in `burnish.json`.
        history: lines of `metrics.jsonl`: training lines (`loss`) and evaluations (`eval_nll`, `eval_score`).
    """

    out: Path | None
    record: dict[str, Any]
    history: tuple[dict[str, Any], ...] = ()

    def summary(self) -> str:
        """A few lines for people: what was trained on what, and what it brought or would take."""
        training, options, needs = self.record["training"], self.record["options"], self.record["forecast"]
        lines = [
            f"{self.record['source']['name']}: {needs['trained_weights']:,} weights, {options['optimizer']},"
            f" {training['steps']:,} steps of {training['examples_per_step']} examples"
        ]
        if self.out is None:
            block = f" (the largest block has {needs['block_weights']:,})" if "block_weights" in needs else ""
            lines.append(
                f"dry run, nothing written: {needs['memory_bytes'] / 1e9:.2f} GB of memory{block}, one pass on top;"
                f" free disk needed {needs['disk_bytes'] / 1e9:.2f} GB"
            )
            return "\n".join([*lines, *self.record["notes"]])
        first, last = training["first_evaluation"], training["last_evaluation"]
        for key, name in (("eval_score", options["objective"]), ("eval_nll", "nats per token")):
            if first and last and key in first:
                lines.append(f"held-out {name} {first[key]:.4f} -> {last[key]:.4f}")
        if "zeros" in training:
            lines.append(f"{training['zeros']:.1%} of the numbers in matrices are exactly zero")
        lines.append(
            f"train {self.record['seconds']['train']:.1f} s, {training['seconds_per_step']:.3f} s a step; peak memory"
            f" {self.record['peak_rss_bytes'] / 1e9:.2f} GB"
        )
        lines.append(f"wrote {self.out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out) if self.out else None, **self.record}


def tune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dataset: str | os.PathLike[str] | None = None,
    split: str = "train",
    eval_dataset: str | os.PathLike[str] | None = None,
    eval_samples: int = 256,
    steps: int | None = None,
    epochs: float | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    gradient_accumulation: int = 1,
    objective: str = "loss",
    optimizer: str = "adamw",
    lr: float | None = None,
    schedule: str = "auto",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    penalty: str | None = None,
    penalty_strength: float | None = None,
    eps: float | None = None,
    queries: int | None = None,
    perturbation: str | None = None,
    blocks: int | str | Sequence[str] | None = None,
    order: str | None = None,
    interval: int | None = None,
    lora: bool = False,
    lora_rank: int | None = None,
    lora_alpha: int | None = None,
    lora_dropout: float | None = None,
    lora_targets: str | Sequence[str] | None = None,
    merge: bool = False,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    gradient_checkpointing: bool = False,
    dtype: str = "auto",
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
) -> TuneResult:
    """Fine-tune a model on prompts and answers: with gradients, or with forward passes only.

    Args:
        model: directory or hub name.
        out: directory to write; it appears complete or not at all.
        dataset: rows with `messages`, or `prompt` and `completion`, or alpaca or sharegpt columns; see
            `burnish.data.examples`. Only answers are learned.
        split: of a Hub data set.
        eval_dataset: held-out rows; None evaluates nothing.
        eval_samples: rows of it.
        steps: optimizer steps; None follows from `epochs`, or is 20,000 for a zeroth-order optimizer.
        epochs: passes over the data, in place of `steps`; 3 where both are None.
        max_length: tokens of an example; a longer one loses the beginning of its prompt.
        batch_size: examples per process and forward pass.
        gradient_accumulation: passes per step.
        objective: "loss" is the cross-entropy of the answers; "exact-match" and "f1" score generated answers, which
            only a zeroth-order optimizer can train.
        optimizer: "adamw", one of burnish.optim ("muon", "amuse", ...), any name that `TrainingArguments(optim=)`
            knows; or "mezo" or "mezo-bcd", which need no gradients and the memory of inference.
        lr: peak learning rate; None is 2e-5 (LoRA 2e-4), mezo 1e-6 (5e-5), mezo-bcd 1e-5 (5e-4).
        schedule: "cosine" (to 0), "linear" (to 0) or "constant", each after a linear warm-up; "auto" is cosine, or
            constant for an optimizer that averages or is zeroth-order.
        warmup: share of the steps.
        weight_decay: decoupled.
        max_grad_norm: gradients are clipped to it; None is 1.
        penalty: proxgen: "l0", "l1/2", "l2/3", "l1" or "group-lasso" (rows) of weight matrices; None is l1.
        penalty_strength: proxgen: beside the mean loss; None is 1e-4.
        eps: zeroth-order: how far weights are displaced; None is 1e-3, LoRA 1e-2.
        queries: zeroth-order: directions a step; None is 1.
        perturbation: zeroth-order: "gaussian", "rademacher", "low-rank", "subspace" or "sparse"; None is gaussian.
        blocks: mezo-bcd: None for a block a layer, a number of weights such as "10M", or name patterns.
        order: mezo-bcd: "random", "ascending" or "descending"; None is random.
        interval: mezo-bcd: steps on a block; None is 100.
        lora: train adapters and leave the model's own weights alone.
        lora_rank, lora_alpha, lora_dropout: of the adapters; None is 16, twice the rank, and 0.
        lora_targets: endings of the names of modules that get one; None is all linear layers but the head.
        merge: write the model with the adapters added to its weights, in place of the adapters.
        eval_every: steps between evaluations; None is a tenth of all.
        checkpoint_every: steps between checkpoints; None is a tenth of all.
        gradient_checkpointing: recompute activations in the backward pass.
        dtype: "auto", "float32", "bfloat16" or "float16". With gradients that of the forward pass (auto: bfloat16 on a
            GPU that has it), trained weights being float32; without, that of the weights (auto: as stored).
        device: "auto", "cpu" or "cuda"; under torchrun each process takes its own GPU.
        seed: of the order of the data and all random draws.
        report_to: "none", "tensorboard", "wandb" or "trackio"; metrics.jsonl is written always.
        dry_run: check everything and forecast; write nothing.
        overwrite: replace `out`, and discard unfinished work of other inputs.
        resume: continue unfinished work of the same inputs.
        max_shard_size: with a unit, such as "5GB".
        trust_remote_code: run code beside the model.
        callbacks: of transformers' Trainer.
        progress: where progress is shown; None is quiet.

    Returns:
        The output directory, the run record and the history.

    Raises:
        BurnishError: the input cannot be used, the output cannot be written, or the loss is no longer a number.
        ValueError: an option is out of range, or has no effect with the others.

    Source: zeroth-order steps arXiv 2305.17333 and 2501.19099, see `burnish.optim`; LoRA arXiv 2106.09685, by PEFT.

    Examples:
        >>> from burnish import tune
        >>> tune("facebook/opt-1.3b", "tuned", dataset="rows.jsonl", optimizer="mezo-bcd")  # doctest: +SKIP
    """
    options = {name: value for name, value in locals().items() if name not in ("callbacks", "progress")}
    if progress is None or ranks.rank() != 0:
        progress = Progress(quiet=True)
    out, started = Path(out), now()
    refuse_existing(out, overwrite=overwrite)
    job = prepare(options)
    require_apart(out, job.source.path)
    require_disk_space(out, job.forecast["disk_bytes"])
    record = _new_record(job, started)
    if dry_run:
        return TuneResult(None, record)
    for note in job.notes:
        progress.say(note)
    with staged(out, _fingerprint(job), device=job.device, overwrite=overwrite, resume=resume) as staging:
        history = _work(job, staging, record, list(callbacks), progress)
    return TuneResult(out, ranks.of_first(record), tuple(history))


def _new_record(job: Job, started: str) -> dict[str, Any]:
    source, told = described(job.source), ("model", "out")
    return {
        "format": RECORD_FORMAT,
        "verb": "tune",
        "started": started,
        "options": {key: value for key, value in plain(job.options).items() if key not in told},
        "source": source,
        "output": {key: source[key] for key in ("architecture", "parameters", "bytes")},
        "training": {
            "steps": job.steps,
            "examples": job.steps * job.examples_per_step,
            "examples_per_step": job.examples_per_step,
            "rows": len(job.rows),
            "trained_weights": job.forecast["trained_weights"],
            "adapters": job.lora is not None and not job.options["merge"],
            "forward_only": job.forward_only,
            "processes": ranks.world_size(),
            "dtype": job.load if job.forward_only else job.precision,
            "device": str(job.device),
        },
        "forecast": job.forecast,
        "environment": environment(),
        "notes": job.notes,
    }


def _fingerprint(job: Job) -> dict[str, Any]:
    """What determines the output."""
    return {
        "options": determining(job.options, "model", "dataset", "eval_dataset"),
        "data": identity(job.options["dataset"]),
        "eval_data": identity(job.options["eval_dataset"]) if job.options["eval_dataset"] else None,
        "model": job.source.fingerprint(),
    }


def _work(
    job: Job, staging: Staging, record: dict[str, Any], callbacks: list[TrainerCallback], progress: Progress
) -> list[dict[str, Any]]:
    """Load, train, write, publish; returns the lines of metrics.jsonl."""
    clock = time.perf_counter()
    model = load_base(job.source, job.load, job.device, lora=job.lora, trust=job.options["trust_remote_code"])
    probe = job.rows[0]["input_ids"][None, :PROBE_TOKENS].to(next(model.parameters()).device)
    require_head(model, probe)
    course = Course(
        {"examples": job.examples_per_step},
        ({} if job.options["objective"] == "loss" else {"eval_score": job.options["objective"]}) | {"eval_nll": "nll"},
    )
    build = _zeroth_order_trainer if job.forward_only else _first_order_trainer
    trainer = build(job, model, staging, record, callbacks, progress)
    trainer.add_callback(Metrics(course, staging.files / METRICS_FILE, progress))
    prepared = time.perf_counter()
    first_step = fit(trainer, staging, "tune", progress)
    trained = time.perf_counter()
    state = whole_weights(trainer, model, job.lora)
    history = course.lines(trainer.state.log_history)
    if job.options["optimizer"] == PENALISED:
        record["training"]["zeros"] = sparsity(model).share
    if ranks.rank() == 0:
        if isinstance(trainer, ZerothOrderTrainer):
            trainer.zeroth_order.end_log()
        write_trained(
            job.source,
            model,
            staging,
            lora=job.lora,
            merge=job.options["merge"],
            max_shard_size=job.options["max_shard_size"],
            state=state,
        )
        steps = max(job.steps - first_step, 1)
        record["training"] |= {
            "seconds_per_step": (trained - prepared) / steps,
            "resumed_at_step": first_step,
            **course.evaluations(history),
        }
        record["seconds"] = {
            "prepare": prepared - clock,
            "train": trained - prepared,
            "write": time.perf_counter() - trained,
        }
        left = NOT_OF_ADAPTERS if record["training"]["adapters"] else frozenset()
        finish(record, job.source, staging, model_card, device=job.device, leave=left)
    return history


def _arguments(job: Job, staging: Staging, **changes: Any) -> Any:
    return arguments(
        job.options,
        staging,
        steps=job.steps,
        warmup_steps=job.warmup_steps,
        eval_every=job.eval_every,
        checkpoint_every=job.checkpoint_every,
        device=job.device,
        precision=job.precision,
        evaluate=job.evaluation is not None,
        **changes,
    )


def _first_order_trainer(
    job: Job,
    model: nn.Module,
    staging: Staging,
    record: dict[str, Any],
    callbacks: list[TrainerCallback],
    progress: Progress,
) -> TokenTrainer:
    options = job.options
    chosen = trainer_options(
        options["optimizer"],
        model,
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        warmup_steps=job.warmup_steps,
    )
    if options["optimizer"] == PENALISED and chosen.optimizer is not None:
        chosen.optimizer[1]["penalty"] = make_penalty(options["penalty"], options["penalty_strength"])
    if chosen.routing is not None:
        progress.say(str(chosen.routing))
    return TuneTrainer(
        model,
        pad=job.pad,
        args=_arguments(job, staging),
        train_dataset=job.rows,
        eval_dataset=job.evaluation,
        callbacks=[*callbacks, *chosen.callbacks],
        optimizer_cls_and_kwargs=chosen.optimizer,
    )


def _zeroth_order_trainer(
    job: Job,
    model: nn.Module,
    staging: Staging,
    record: dict[str, Any],
    callbacks: list[TrainerCallback],
    progress: Progress,
) -> TokenTrainer:
    options, log = job.options, staging.files / TRAJECTORY_FILE
    if newest_checkpoint(staging.work) is None:
        log.unlink(missing_ok=True)  # of a run that was ended before its first checkpoint
    base = {"weights": weights_hash(job.source), "dtype": job.load, "lora": job.lora and job.lora.to_dict()}
    optimizer = zeroth_order(
        model,
        options,
        log=log if ranks.rank() == 0 else None,
        base=base,
        process_group=torch.distributed.group.WORLD if ranks.world_size() > 1 else None,
    )
    reuse = None
    if has_blocks(options["optimizer"]) and options["objective"] == "loss":
        probe = job.rows[0]["input_ids"][None, :PROBE_TOKENS].to(next(model.parameters()).device)
        reuse = prefix_reuse(model, probe)
        if reuse is None:
            record["notes"].append("every evaluation runs all layers: those of this model do not just hand on states")
            progress.say(record["notes"][-1])
    record["training"]["prefix_reuse"] = reuse is not None
    score = SCORES.get(options["objective"])
    return ZerothOrderTrainer(
        model,
        optimizer,
        pad=job.pad,
        reuse=reuse,
        score=score,
        tokenizer=job.tokenizer,
        args=_arguments(job, staging, max_grad_norm=0.0),
        train_dataset=job.rows,
        eval_dataset=job.evaluation,
        callbacks=callbacks,
    )
