"""Compose model, reference, data and trainer into one alignment; the only file that knows all the others."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig

from burnish.align.card import model_card
from burnish.align.online import StepSampler
from burnish.align.policy import Policy
from burnish.align.prepare import Job, Rows, prepare, reads_reference
from burnish.align.reference import ReferenceLogps, computed
from burnish.align.reward import Reward, load_reward, rewards_of
from burnish.align.rounds import OnPolicyRounds, Start
from burnish.align.sample import text_of
from burnish.align.trainer import PreferenceTrainer, with_mismatched
from burnish.checkpoint import Checkpoint, Staging
from burnish.checkpoint.staging import refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.data.packed import identity
from burnish.data.preferences import Preference
from burnish.families.conversion import RECORD_FORMAT, now
from burnish.optim.training import trainer_options
from burnish.runs import Progress, environment, ranks, write_json
from burnish.training.adapters import NOT_OF_ADAPTERS
from burnish.training.base import load_base, weights_hash, write_trained
from burnish.training.course import METRICS_FILE, Course, Metrics
from burnish.training.fit import arguments, fit, staged
from burnish.training.options import EVALUATIONS, determining, plain, steps_of
from burnish.training.output import described, finish

ROUNDS = "rounds"
EVALUATED = {
    "eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin",
    "eval_rewards": "log-ratio", "eval_reward": "reward", "eval_kl": "KL to the reference",
}  # fmt: skip
NAMES = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "rewards": "log_ratio", "kl": "reference_kl"}
"""What lines of metrics.jsonl call values that the trainer logs under TRL's names."""
MEASURED = {Course({}, names=NAMES).named(key): name for key, name in EVALUATED.items()}


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
        run = _Run(job, staging, record, list(callbacks), progress)
        history, told = run.rounds() if job.mode == "rounds" else (run.steps(), [])
    return AlignResult(out, record, tuple(history), tuple(told))


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


class _Run:
    """One run: what its parts share."""

    def __init__(
        self,
        job: Job,
        staging: Staging,
        record: dict[str, Any],
        callbacks: list[TrainerCallback],
        progress: Progress,
    ) -> None:
        self.job, self.staging, self.record = job, staging, record
        self.callbacks, self.progress = callbacks, progress
        self.course = Course({"examples": job.rows_per_step}, EVALUATED, NAMES)
        self.clock = time.perf_counter()

    def steps(self) -> list[dict[str, Any]]:
        """Load, train, write, publish; returns the lines of metrics.jsonl."""
        job = self.job
        rows, evaluation = self._with_rewards(job.rows, "rewards"), job.evaluation
        if evaluation is not None:
            evaluation = self._with_rewards(evaluation, "eval-rewards")
        model, data, held_out = self._with_reference(rows, evaluation)
        reward = self._reward() if job.mode == "online" else None
        read = job.rows.read
        if evaluation is not None and held_out is not None:  # its rows count on from those that are trained on
            places = [len(read) + place for place in held_out["row"]]
            held_out = held_out.remove_columns("row").add_column("row", places)
            read = [*read, *evaluation.read]
        trainer = self._trainer(model, data, held_out, self._rollout(read, reward), job.steps)
        trainer.add_callback(Metrics(self.course, self.staging.files / METRICS_FILE, self.progress))
        prepared = time.perf_counter()
        first_step = fit(trainer, self.staging, "align", self.progress)
        trained = time.perf_counter()
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if job.lora is None else None
        history = self.course.lines(trainer.state.log_history)
        if ranks.rank() == 0:
            steps = max(job.steps - first_step, 1)
            self.record["training"] |= {
                "seconds_per_step": (trained - prepared) / steps,
                "resumed_at_step": first_step,
                **self.course.evaluations(history),
            }
            self._publish(model, prepared, trained, state)
        return history

    def _with_rewards(self, rows: Rows, name: str) -> Rows:
        """Completions of the data with the reward model's scores, where an objective asks for them."""
        job = self.job
        if job.mode != "offline" or job.options["reward_model"] is None:
            return rows
        file = self.staging.work / f"{name}.json"
        if not file.exists() and ranks.rank() == 0:
            branches = [(rows.read[row["row"]].prompt, branch) for row in rows.data for branch in row["branch_ids"]]
            texts = [text_of(job.tokenizer, branch) for _, branch in branches]
            self.progress.say(f"{len(texts)} completions are scored")
            write_json(file, rewards_of(self._reward(), [prompt for prompt, _ in branches], texts).tolist())
        ranks.wait_for_all()
        scores = iter(json.loads(file.read_bytes()))
        found = [[next(scores) for _ in row] for row in rows.data["branch_ids"]]
        kept = rows.data.remove_columns([column for column in ("rewards",) if column in rows.data.column_names])
        return replace(rows, data=kept.add_column("rewards", found))

    def _with_reference(self, rows: Rows, evaluation: Rows | None) -> tuple[Any, Dataset, Dataset | None]:
        """The policy, and the rows with the reference's log-probabilities, where these can be looked up."""
        job, held_out = self.job, None if evaluation is None else evaluation.data
        data = rows.data
        if "kl" in job.objective.inputs:
            data, held_out = with_mismatched(data), None if held_out is None else with_mismatched(held_out)
        needed = (
            job.objective.needs_reference and job.mode == "offline" and not reads_reference(job.objective, job.mode)
        )
        model = None if needed and job.guide is not None else self._policy()
        if needed:
            file = Path(job.options["reference_logps"] or self.staging.work / "reference.safetensors")
            parts = [data] if held_out is None else [data, held_out]
            known = self._reference_logps(file, parts, model)
            data, *more = (part.add_column("ref_logps", known.of(part, file)) for part in parts)
            held_out = more[0] if more else None
        return self._policy() if model is None else model, data, held_out

    def _reference_logps(self, file: Path, parts: list[Dataset], model: Any) -> ReferenceLogps:
        """Read from a file, or computed by the reference, which is freed, and written."""
        job = self.job
        source = job.guide or job.source
        settings = job.settings | {"weights": weights_hash(source)}
        if file.exists():
            known = job.stored or ReferenceLogps.load(file)
            known.require_settings(settings, file)
            return known
        if model is None:
            model = self._reference_model()
        with self.progress.task("reference", sum(map(len, parts)), unit="rows") as advance:
            known = computed(
                model, parts, settings, pad=job.pad, batch_size=job.options["batch_size"], dtype=job.precision,
                advance=advance,
            )  # fmt: skip
        if ranks.rank() == 0:
            known.save(file)
        ranks.wait_for_all()
        return known

    def _policy(self) -> Any:
        job = self.job
        return load_base(job.source, job.load, job.device, lora=job.lora, trust=job.options["trust_remote_code"])

    def _reference_model(self) -> Any:
        job = self.job
        source = job.guide or job.source
        return load_base(source, job.load, job.device, lora=None, trust=job.options["trust_remote_code"])

    def _reward(self) -> Reward:
        options = self.job.options
        return load_reward(
            options["reward_model"],
            device=self.job.device,
            batch_size=2 * options["batch_size"],
            trust_remote_code=options["trust_remote_code"],
        )

    def _rollout(self, rows: Sequence[Preference], reward: Reward | None) -> StepSampler | None:
        """What draws completions in a step, where something does."""
        job = self.job
        if job.mode != "online" and not job.objective.kl:
            return None
        return StepSampler(
            job.tokenizer, [row.prompt for row in rows], job.sampling, reward,
            batch_size=job.options["batch_size"] * job.sampling.samples_per_prompt,
        )  # fmt: skip

    def _trainer(
        self,
        model: Any,
        data: Dataset,
        held_out: Dataset | None,
        rollout: StepSampler | None,
        steps: int,
        reference: Any = None,
        **changes: Any,
    ) -> PreferenceTrainer:
        job, options = self.job, self.job.options
        chosen = trainer_options(
            options["optimizer"],
            model,
            lr=options["lr"],
            weight_decay=options["weight_decay"],
            warmup_steps=job.warmup_steps(steps),
        )
        if chosen.routing is not None:
            self.progress.say(str(chosen.routing))
        own = job.guide is not None or job.lora is None  # otherwise it is the model without its adapters
        if reference is None and own and reads_reference(job.objective, job.mode):
            reference = self._reference_model()
        trainer = PreferenceTrainer(
            model,
            job.objective,
            ref_model=reference,
            args=arguments(
                options,
                self.staging,
                steps=steps,
                warmup_steps=job.warmup_steps(steps),
                eval_every=job.eval_every,
                checkpoint_every=job.checkpoint_every,
                device=job.device,
                precision=job.precision,
                evaluate=held_out is not None,
                kind=DPOConfig,
                **{"max_length": options["max_length"], **changes},
            ),
            train_dataset=data,
            eval_dataset=held_out,
            retain_dataset=None if job.retained is None else job.retained.data,
            processing_class=job.tokenizer,
            layout=options["layout"],
            rollout=rollout,
            callbacks=[*self.callbacks, *chosen.callbacks],
            optimizer_cls_and_kwargs=chosen.optimizer,
        )
        if "ref" in getattr(model, "peft_config", {}):
            # TRL copies adapters that it is given as the reference; the reference here is the model without them.
            model.delete_adapter("ref")
        return trainer

    def rounds(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Load, draw, label and train in turns, write, publish; returns the lines of metrics.jsonl, rounds.jsonl."""
        job, options = self.job, self.job.options
        model = self._policy()
        guide = None if job.guide is None else self._reference_model()
        policy = Policy(model, job.tokenizer, reference=guide, batch_size=2 * options["batch_size"])
        directory = self.staging.files / ROUNDS
        work = OnPolicyRounds(
            directory,
            policy,
            functools.partial(self._fit_round, policy),
            job.rows.kept,
            options=job.sampling,
            reward=None if options["reward_model"] is None else self._reward(),
            eval_prompts=None if job.evaluation is None else job.evaluation.kept,
            progress=self.progress,
        )
        prepared = time.perf_counter()
        told = work.run(options["rounds"])
        trained = time.perf_counter()
        for weights in directory.glob("round-*/weights"):
            shutil.rmtree(weights)  # checkpoints of the work, as those of a training
        history = _read_lines(self.staging.files / METRICS_FILE)
        self.record["training"] |= {
            "examples": history[-1]["examples"],
            "first_evaluation": None,
            "last_evaluation": None,
            "rounds": told,
        }
        self._publish(model, prepared, trained, None)
        return history, told

    def _fit_round(self, policy: Policy, rows: list[dict[str, Any]], number: int, start: Start) -> dict[str, float]:
        """Train on the rows of a round; its lines of metrics.jsonl follow those of the rounds before it."""
        file, steps = self.staging.files / METRICS_FILE, steps_of(self.job.options, len(rows))
        with _forward_kept(policy.model, policy.reference):
            trainer = self._trainer(
                policy.model,
                Dataset.from_list(rows),
                None,
                self._rollout(self.job.rows.read, None),
                steps,
                policy.reference,
                output_dir=str(start.work),
                save_steps=max(1, steps // EVALUATIONS) if self.job.options["checkpoint_every"] is None
                else self.job.checkpoint_every,
                seed=self.job.options["seed"] + number,
            )  # fmt: skip
            trainer.add_callback(Metrics(self.course, start.work / METRICS_FILE, self.progress))
            fit(trainer, self.staging, f"round {number}", self.progress)
        earlier = [line for line in _read_lines(file) if line["round"] < number]
        done = earlier[-1] if earlier else {"step": 0, "examples": 0}
        lines = [
            {**line, "step": done["step"] + line["step"], "examples": done["examples"] + line["examples"],
             "round": number}
            for line in self.course.lines(trainer.state.log_history)
        ]  # fmt: skip
        file.write_text("".join(json.dumps(line) + "\n" for line in [*earlier, *lines]), encoding="utf-8")
        last = next(line for line in reversed(lines) if "loss" in line)
        told = ("loss", "margin", "accuracy", "reference_kl")
        return {"steps": steps} | {name: last[name] for name in told if name in last}

    def _publish(self, model: Any, prepared: float, trained: float, state: dict[str, torch.Tensor] | None) -> None:
        """Write the model and all that lies beside it, and give the output its name."""
        job = self.job
        write_trained(
            job.source,
            model,
            self.staging,
            lora=job.lora,
            merge=job.options["merge"],
            max_shard_size=job.options["max_shard_size"],
            state=state,
        )
        self.record["seconds"] = {
            "prepare": prepared - self.clock,
            "train": trained - prepared,
            "write": time.perf_counter() - trained,
        }
        left = NOT_OF_ADAPTERS if self.record["training"]["adapters"] else frozenset()
        finish(self.record, job.source, self.staging, model_card, device=job.device, leave=left)


@contextmanager
def _forward_kept(*models: Any) -> Iterator[None]:
    """A trainer lets models take other inputs; behind it they are as they were."""
    plain = [model.get_base_model() for model in models if hasattr(model, "get_base_model")]
    kept = [(model, vars(model).get("forward")) for model in (*models, *plain) if model is not None]
    try:
        yield
    finally:
        for model, forward in kept:
            vars(model).pop("forward", None)
            if forward is not None:
                model.forward = forward


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
