"""One alignment: checked, recorded, and handed to `burnish.align.run`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from burnish.align.prepare import Job, prepare
from burnish.align.reward import Reward
from burnish.align.run import MEASURED, Run
from burnish.checkpoint import Checkpoint
from burnish.checkpoint.staging import refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.data.packed import identity
from burnish.families.conversion import RECORD_FORMAT, now
from burnish.runs import Progress, environment, ranks
from burnish.training.fit import staged
from burnish.training.options import determining, plain
from burnish.training.output import described


@dataclass(frozen=True)
class AlignResult:
    """What an alignment did.

    Attributes:
        out: the written directory; None for a dry run.
        record: the run record, as in `burnish.json`.
        history: lines of `metrics.jsonl`: training lines (`loss`) and evaluations (`eval_loss`).
        rounds: lines of `rounds/rounds.jsonl`, where there were rounds.
    """

    out: Path | None
    record: dict[str, Any]
    history: tuple[dict[str, Any], ...] = ()
    rounds: tuple[dict[str, Any], ...] = ()

    def summary(self) -> str:
        """A few lines for people: what was trained on what, and what it brought or would take."""
        training, needs = self.record["training"], self.record["forecast"]
        rounds = f"{self.record['options']['rounds']} rounds of " if training["mode"] == "rounds" else ""
        lines = [
            f"{self.record['source']['name']}: {training['objective']}, {needs['trained_weights']:,} weights,"
            f" {rounds}{training['steps']:,} steps of {training['rows_per_step']} rows"
        ]
        if self.out is None:
            lines.append(
                f"dry run, nothing written: {needs['memory_bytes'] / 1e9:.2f} GB of memory, one pass on top;"
                f" free disk needed {needs['disk_bytes'] / 1e9:.2f} GB"
            )
            return "\n".join([*lines, *self.record["notes"]])
        first, last = training["first_evaluation"], training["last_evaluation"]
        for key, name in MEASURED.items():
            if first and last and key in first:
                lines.append(f"held-out {name} {first[key]:.4f} -> {last[key]:.4f}")
        lines.append(
            f"train {self.record['seconds']['train']:.1f} s; peak memory {self.record['peak_rss_bytes'] / 1e9:.2f} GB"
        )
        lines.append(f"wrote {self.out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out) if self.out else None, **self.record}


def align(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    objective: str = "dpo",
    dataset: str | os.PathLike[str] | None = None,
    split: str = "train",
    eval_dataset: str | os.PathLike[str] | None = None,
    eval_samples: int = 256,
    retain_dataset: str | os.PathLike[str] | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    kl: float | None = None,
    options: Mapping[str, Any] | None = None,
    reference: str | os.PathLike[str] | None = None,
    reference_logps: str | os.PathLike[str] | None = None,
    reward_model: str | os.PathLike[str] | Reward | None = None,
    samples_per_prompt: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    reward_scale: float | None = None,
    reward_clip: Sequence[float] | None = None,
    missing_end_penalty: float | None = None,
    labels: str | None = None,
    label_scale: float | None = None,
    rounds: int = 0,
    sampler: str | Sequence[str] | None = None,
    accumulate: bool | None = None,
    warm_start: bool | None = None,
    prompts_per_round: int | None = None,
    num_features: int | None = None,
    eval_prompts: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    layout: str = "auto",
    optimizer: str = "adamw",
    lr: float | None = None,
    schedule: str = "auto",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
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
) -> AlignResult:
    """Align a model with preferences: from pairs, from judged completions, or from what it draws itself and a reward.

    Where completions come from follows from the data: pairs and judged completions are in them; for prompts alone the
    policy draws completions in each step, or with `rounds` before each of so many trainings, and a reward model judges
    them.

    Args:
        model: directory or hub name.
        out: directory to write; it appears complete or not at all.
        objective: a name of `burnish.align.objectives.OBJECTIVES`: "dpo", "pd", "pmle", "rkl", "simpo", "kto", ...
        dataset: rows with `prompt`, `chosen`, `rejected`; for kto with `prompt`, `completion`, `label`; for npo without
            a label; or with `prompt` alone; see `burnish.data.preferences`.
        split: of a Hub data set.
        eval_dataset: held-out rows of the same kind; None evaluates nothing.
        eval_samples: rows of it.
        retain_dataset: npo-gd and npo-kl: what unlearning is to keep, `prompt` and `completion`.
        beta, gamma, kl: options of the objective, where it has them; None is its default.
        options: its other options, by name.
        reference: a model in the place of `model` as the reference (Pre-DPO: a model that was trained on the data).
        reference_logps: file of the reference's log-probabilities: read where it is there, else written.
        reward_model: directory or hub name of a sequence classifier with one output, `module:function`, or
            `path/file.py:function`; or a Python function of prompts and completions.
        samples_per_prompt: completions that are drawn; None is 2, or 4 where an objective takes all of them.
        max_new_tokens, temperature, top_p: of a drawn completion; None is 64, 1 and 1.
        reward_scale, reward_clip, missing_end_penalty: what is made of rewards of drawn completions; see
            `burnish.align.reward.Shaping`.
        labels: of drawn pairs: "hard" (the larger reward), "soft" (its Bradley-Terry probability), "sampled" (drawn
            with it), "best-worst" (one pair a prompt), or with rounds "ask" (people, by a file); None is hard.
        label_scale: of rewards, for soft and sampled labels.
        rounds: trainings, each on completions drawn from the policy before it; 0 draws none, or in each step.
        sampler: rounds: "policy", "reference", "design", "hybrid", or one for each round; None is policy.
        accumulate: rounds: train on the rows of all rounds so far.
        warm_start: rounds: go on from the policy as it is (None), or begin each training from `model` (False).
        prompts_per_round: rounds: None is all.
        num_features, eval_prompts: rounds: see `burnish.align.rounds.RoundOptions`.
        steps: optimizer steps (of each round); None follows from `epochs`.
        epochs: passes over the rows, in place of `steps`; 1 where both are None.
        max_length: tokens of a prompt with a completion; completions lose their end, prompts that do not fit are
            dropped. None is 1024, or what the model has.
        batch_size: rows per process and forward pass.
        gradient_accumulation: passes per step.
        layout: how a batch is laid out: "auto", "padded", "shared" (prompts once) or "packed".
        optimizer: as in `burnish.tune`.
        lr: peak learning rate; None is 1e-6, LoRA 1e-5.
        schedule: "cosine", "linear" or "constant" after a linear warm-up; "auto" is cosine, or constant for an
            optimizer that averages.
        warmup: share of the steps.
        weight_decay: decoupled.
        max_grad_norm: gradients are clipped to it; None is 1.
        lora: train adapters; the reference is then the model without them.
        lora_rank, lora_alpha, lora_dropout: of the adapters; None is 16, twice the rank, and 0.
        lora_targets: endings of the names of modules that get one; None is all linear layers but the head.
        merge: write the model with the adapters added to its weights, in place of the adapters.
        eval_every: steps between evaluations; None is a tenth of all.
        checkpoint_every: steps between checkpoints; None is a tenth of all.
        gradient_checkpointing: recompute activations in the backward pass.
        dtype: "auto", "float32", "bfloat16" or "float16" of the forward pass (auto: bfloat16 on a GPU that has it).
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
        BurnishError: the input cannot be used, the output cannot be written, or the loss is no longer a number;
            `LabelsNeededError` where people have to label pairs.
        ValueError: an option is out of range, or has no effect with the others.

    Source: alignment as distribution learning arXiv 2506.01523, on-policy rounds arXiv 2601.08421, Pre-DPO arXiv
        2504.15843; of each objective see `burnish.align.objectives`.

    Examples:
        >>> from burnish import align
        >>> align("Qwen/Qwen3-0.6B", "aligned", objective="dpo", dataset="pairs.jsonl", lora=True)  # doctest: +SKIP
    """
    given = {name: value for name, value in locals().items() if name not in ("callbacks", "progress")}
    if progress is None or ranks.rank() != 0:
        progress = Progress(quiet=True)
    out, started = Path(out), now()
    refuse_existing(out, overwrite=overwrite)
    job = prepare(given)
    require_apart(out, job.source.path)
    require_disk_space(out, job.forecast["disk_bytes"])
    record = _new_record(job, started)
    if dry_run:
        return AlignResult(None, record)
    for note in job.notes:
        progress.say(note)
    with staged(out, _fingerprint(job), device=job.device, overwrite=overwrite, resume=resume) as staging:
        run = Run(job, staging, record, list(callbacks), progress)
        history, told = run.rounds() if job.mode == "rounds" else (run.steps(), [])
    return AlignResult(out, ranks.of_first(record), tuple(history), tuple(told))


def _new_record(job: Job, started: str) -> dict[str, Any]:
    source, told = described(job.source), ("model", "out")
    return {
        "format": RECORD_FORMAT,
        "verb": "align",
        "started": started,
        "options": {key: value for key, value in _plain(job.options).items() if key not in told},
        "source": source,
        "output": {key: source[key] for key in ("architecture", "parameters", "bytes")},
        "training": {
            "objective": job.objective.name,
            "objective_options": dict(job.objective.options),
            "mode": job.mode,
            "steps": job.steps,
            "examples": job.steps * job.rows_per_step,
            "rows_per_step": job.rows_per_step,
            "rows": len(job.rows.data),
            "trained_weights": job.forecast["trained_weights"],
            "adapters": job.lora is not None and not job.options["merge"],
            "needs_reference": job.objective.needs_reference,
            "processes": ranks.world_size(),
            "dtype": job.precision,
            "device": str(job.device),
        },
        "forecast": job.forecast,
        "environment": environment(),
        "notes": job.notes,
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON has them; a reward function by its name."""
    reward = options["reward_model"]
    named = f"{reward.__module__}:{reward.__qualname__}" if callable(reward) else reward
    return plain({**options, "reward_model": named})


def _fingerprint(job: Job) -> dict[str, Any]:
    """What determines the output."""
    options = job.options
    told = ("model", "dataset", "eval_dataset", "retain_dataset", "reference", "reference_logps", "reward_model")
    data = {name: identity(options[name]) for name in told[1:4] if options[name] is not None}
    return {
        "options": determining(_plain(options), *told),
        "data": data,
        "model": job.source.fingerprint(),
        "reference": job.guide.fingerprint() if job.guide else None,
        "reward": _reward_identity(options["reward_model"]),
    }


def _reward_identity(reward: Any) -> Any:
    if reward is None or callable(reward):
        return None if reward is None else f"{reward.__module__}:{reward.__qualname__}"
    if Path(reward).is_dir():
        return Checkpoint.open(reward).fingerprint()
    file = Path(os.fspath(reward).rpartition(":")[0])
    return identity(file) if file.is_file() else os.fspath(reward)
