"""The act of an alignment: load, look up the reference, train in steps or in rounds, write."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig

from burnish.align.card import model_card
from burnish.align.online import StepSampler
from burnish.align.policy import Policy
from burnish.align.prepare import Job, Rows, reads_reference
from burnish.align.reference import ReferenceLogps, computed
from burnish.align.reward import Reward, load_reward, rewards_of
from burnish.align.rounds import OnPolicyRounds, Start
from burnish.align.sample import text_of
from burnish.align.trainer import PreferenceTrainer, with_mismatched
from burnish.checkpoint import Staging
from burnish.data.preferences import Preference
from burnish.optim.training import trainer_options
from burnish.runs import Progress, ranks, write_json
from burnish.training.adapters import NOT_OF_ADAPTERS
from burnish.training.base import load_base, weights_hash, whole_weights, write_trained
from burnish.training.course import METRICS_FILE, Course, Metrics
from burnish.training.fit import arguments, fit
from burnish.training.options import EVALUATIONS, steps_of
from burnish.training.output import finish

ROUNDS = "rounds"
EVALUATED = {
    "eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin",
    "eval_rewards": "log-ratio", "eval_reward": "reward", "eval_kl": "KL to the reference",
}  # fmt: skip
NAMES = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "rewards": "log_ratio", "kl": "reference_kl"}
"""What lines of metrics.jsonl call values that the trainer logs under TRL's names."""
MEASURED = {Course({}, names=NAMES).named(key): name for key, name in EVALUATED.items()}


class Run:
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
        state = whole_weights(trainer, model, job.lora)
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
            # A rank's share of an evaluation may be one row more; all ranks have to draw equally often.
            batch_size=(job.options["batch_size"] + 1) * job.sampling.samples_per_prompt,
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
