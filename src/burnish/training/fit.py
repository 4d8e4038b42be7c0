"""Run a trainer to its end: where it works, its arguments, its last checkpoint, and the error of a broken loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from burnish.checkpoint import Staging
from burnish.checkpoint.load import foreign_bars_hidden
from burnish.errors import TrainingError
from burnish.families.conversion import open_staging
from burnish.optim.training import training_arguments
from burnish.runs import Progress, ranks
from burnish.runs.randomness import random_state_kept
from burnish.training.course import Advance
from burnish.training.trainer import TokenTrainer


@contextmanager
def staged(
    out: Path, fingerprint: Mapping[str, Any], *, device: torch.device, overwrite: bool, resume: bool
) -> Iterator[Staging]:
    """The directory that a training works in, with all ranks joined, other libraries' progress bars hidden, and the
    global random state put back.

    Args:
        out: the output.
        fingerprint: what determines it.
        device: that is trained on.
        overwrite, resume: as for `Staging`.
    """
    if ranks.world_size() > 1:
        PartialState(cpu=device.type == "cpu")  # joins the ranks, with the backend that training will use
    staging = open_staging(out, fingerprint, overwrite=overwrite, resume=resume)
    with staging.explaining("the output"), random_state_kept(), foreign_bars_hidden():
        yield staging


def arguments(
    options: Mapping[str, Any],
    staging: Staging,
    *,
    steps: int,
    warmup_steps: int,
    eval_every: int,
    checkpoint_every: int,
    device: torch.device,
    precision: str,
    evaluate: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **changes: Any,
) -> TrainingArguments:
    """The arguments of a trainer.

    Args:
        options: of the verb: batch size, accumulation, optimizer, learning rate and schedule, decay, clipping, seed,
            reporter, and `gradient_checkpointing` where it has that.
        staging: checkpoints lie in its work directory.
        steps, warmup_steps, eval_every, checkpoint_every: in optimizer steps.
        device: where.
        precision: "bfloat16" and "float16" run the forward pass in mixed precision; anything else does not.
        evaluate: whether there is something to evaluate on.
        kind: of the arguments, where the trainer has its own.
        changes: further arguments, or other values.
    """
    chosen = {
        "output_dir": str(staging.work),
        "max_steps": steps,
        "per_device_train_batch_size": options["batch_size"],
        "per_device_eval_batch_size": options["batch_size"],
        "gradient_accumulation_steps": options["gradient_accumulation"],
        "learning_rate": options["lr"],
        **training_arguments(options["optimizer"], options["schedule"], warmup_steps),
        "weight_decay": options["weight_decay"],
        "max_grad_norm": options["max_grad_norm"],
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        "use_cpu": device.type == "cpu",
        "seed": options["seed"],
        "data_seed": options["seed"],
        "logging_steps": max(1, min(50, steps // 50)),
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_on_start": evaluate,
        "eval_steps": eval_every,
        "save_steps": checkpoint_every,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "report_to": [] if options["report_to"] == "none" else [options["report_to"]],
        "remove_unused_columns": False,
    }
    checkpointing = bool(options.get("gradient_checkpointing"))
    if checkpointing or kind is not TrainingArguments:  # others may have it on by default
        chosen["gradient_checkpointing"] = checkpointing
    return kind(**(chosen | changes))


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole: `Trainer` writes its state last."""
    whole = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def fit(trainer: TokenTrainer, staging: Staging, name: str, progress: Progress) -> int:
    """Train, from the newest checkpoint where there is one; returns the step that this began with.

    Args:
        trainer: its checkpoints lie in its output directory.
        staging: of the verb, for what TensorBoard writes.
        name: of the task that progress is shown for.
        progress: where it is shown.

    Raises:
        TrainingError: the loss or the gradient is no longer a number; names the last good checkpoint.
    """
    work = Path(trainer.args.output_dir)
    checkpoint = newest_checkpoint(work)
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # the user named no place
            callback.logging_dir = str(staging.files / "runs")
    try:
        with progress.task(name, trainer.args.max_steps, done=first_step, unit="steps") as advance:
            trainer.add_callback(Advance(advance))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except TrainingError as error:
        good = newest_checkpoint(work)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise TrainingError(f"{error}: {kept}; lower lr, and start anew with --overwrite") from None
    return first_step
