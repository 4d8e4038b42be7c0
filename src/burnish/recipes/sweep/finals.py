"""The finalists of a sweep: distilled by successive halving, each evaluation deciding whether it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from burnish.densify import DensifyPlan, densify
from burnish.distill import distill
from burnish.errors import TrainingError
from burnish.recipes.sweep import store
from burnish.recipes.sweep.result import Final, Row
from burnish.runs import Progress

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

REDUCTION = 2
"""About one in this many goes on at each rung, which lies this many times farther than the one before."""


@dataclass(frozen=True)
class Budget:
    """Tokens of each finalist: in all, of one optimizer step, and between two evaluations (the first rung)."""

    tokens: int
    per_step: int
    rung: int

    @classmethod
    def of(cls, tokens: int, *, finalists: int, per_step: int) -> Budget:
        """Rungs at `tokens / 2^r`, ..., `tokens / 2`, `tokens`, so that about one of 2^r finalists goes all the way.

        >>> Budget.of(40_000, finalists=3, per_step=512)
        Budget(tokens=38912, per_step=512, rung=9728)
        """
        steps = max(1, round(tokens / per_step))
        rungs = min((finalists - 1).bit_length(), steps.bit_length() - 1)
        rung = (steps >> rungs) * per_step
        return cls(rung << rungs, per_step, rung)

    def pruner(self) -> BasePruner:
        """Asynchronous successive halving: a finalist stops unless it is in the better half of those that came so far.

        Source: Li et al., arXiv 1810.05934 (ASHA), as `optuna.pruners.SuccessiveHalvingPruner`.
        """
        import optuna

        return optuna.pruners.SuccessiveHalvingPruner(min_resource=self.rung, reduction_factor=REDUCTION)


class _Stopped(Exception):  # noqa: N818 (not an error)
    """Ends a distillation whose trial is pruned."""


class _Halving(TrainerCallback):  # type: ignore[misc]
    """Reports every evaluation to the trial, and ends the run where the pruner says so."""

    def __init__(self, trial: Trial, budget: Budget, known: dict[int, float]) -> None:
        self.trial, self.budget, self.evaluations = trial, budget, dict(known)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """One evaluation."""
        tokens = state.global_step * self.budget.per_step
        if tokens == 0 or "eval_kl" not in metrics:
            return
        if tokens not in self.evaluations:  # a run that was killed evaluates again what it had reported
            self.evaluations[tokens] = metrics["eval_kl"]
            self.trial.report(metrics["eval_kl"], tokens)
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise _Stopped


def distill_finalist(
    storage: RDBStorage,
    study: Study,
    taken: FrozenTrial,
    directory: Path,
    *,
    model: str,
    plan: DensifyPlan,
    budget: Budget,
    options: dict[str, Any],
    progress: Progress,
) -> None:
    """Write a finalist's student, distil it into `directory / "student"` and record how far it came.

    A run that was killed goes on; one that is pruned leaves nothing.
    """
    import optuna

    trial = optuna.trial.Trial(study, taken._trial_id)
    halving = _Halving(trial, budget, taken.intermediate_values)
    initial, student = directory / "initial", directory / "student"
    densify_options = {name: options[name] for name in ("seed", "device", "family", "revision")}
    try:
        if not initial.exists():
            directory.mkdir(parents=True, exist_ok=True)
            densify(model, initial, plan=plan, **densify_options, progress=progress)
        if not student.exists():
            distill(
                initial,
                student,
                teacher=model,
                dataset=options["dataset"],
                eval_dataset=options["eval_dataset"],
                eval_samples=options["eval_samples"],
                tokens=budget.tokens,
                max_length=options["max_length"],
                batch_size=options["batch_size"],
                lr=options["lr"],
                eval_every=budget.rung,
                seed=options["seed"],
                device=options["device"],
                callbacks=[halving],
                progress=progress,
            )
    except (_Stopped, TrainingError) as ended:
        if isinstance(ended, TrainingError):
            progress.say(f"{directory.name}: {ended}")
        shutil.rmtree(directory)
        store.finish(storage, taken, None, pruned=True)
    else:
        store.finish(storage, taken, max(halving.evaluations.items())[1])


def finals(results: dict[int, FrozenTrial], rows: Sequence[Row]) -> tuple[Final, ...]:
    """The finalists' records, from the trials that have an index into `rows`."""
    return tuple(
        Final(
            rows[index].configuration,
            tuple(sorted(trial.intermediate_values.items())),
            complete=trial.state.name == "COMPLETE",
        )
        for index, trial in sorted(results.items())
    )
