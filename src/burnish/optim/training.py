"""Hand an optimizer, chosen by name, to the Hugging Face `Trainer`; every verb that trains does it here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from burnish.optim.routing import Routing, split_parameters
from burnish.optim.table import OPTIMIZERS

if TYPE_CHECKING:
    from transformers import TrainerCallback

# What the Trainer builds itself, under shorter names; it knows more by their own.
TRAINER_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainerOptions:
    """What a `Trainer` is given for an optimizer.

    Attributes:
        optimizer: for `optimizer_cls_and_kwargs`; None where the Trainer builds it.
        callbacks: that it needs.
        routing: which tensor goes where; None where all go to one rule.
    """

    optimizer: tuple[type[Optimizer], dict[str, Any]] | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    routing: Routing | None = None


def choose_schedule(optimizer: str, schedule: str = "auto", *, forward_only: bool = False) -> str:
    """The schedule of the learning rate: "auto" is cosine, or constant for an optimizer that averages instead and for
    one of forward passes.

    Args:
        optimizer: name.
        schedule: "auto", "cosine", "linear" or "constant".
        forward_only: the verb can train without gradients.

    Raises:
        ValueError: the optimizer or the schedule is unknown, or they do not go together.
    """
    if optimizer not in (*OPTIMIZERS, *TRAINER_OPTIMIZERS):
        from transformers.training_args import OptimizerNames

        known = [str(name.value) for name in OptimizerNames]
        if optimizer not in known:
            names = ", ".join([*TRAINER_OPTIMIZERS, *OPTIMIZERS, *known])
            raise ValueError(f"optimizer={optimizer!r} is unknown: choose one of {names}")
    info = OPTIMIZERS.get(optimizer)
    averaged, gradient_free = (info.averaged, info.forward_only) if info else (False, False)
    if gradient_free and not forward_only:
        raise ValueError(f"optimizer={optimizer!r} takes no gradients: `burnish tune` trains with it")
    if schedule == "auto":
        return "constant" if averaged or gradient_free else "cosine"
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown: choose one of auto, {', '.join(SCHEDULES)}")
    if averaged and schedule != "constant":
        raise ValueError(f"schedule={schedule!r}: {optimizer} averages in place of decaying: leave the schedule out")
    return schedule


def training_arguments(optimizer: str, schedule: str, warmup_steps: int) -> dict[str, Any]:
    """The part of `TrainingArguments` that follows from an optimizer and a schedule of `choose_schedule`."""
    if optimizer not in OPTIMIZERS:
        name = TRAINER_OPTIMIZERS.get(optimizer, optimizer)
        return {"optim": name, "lr_scheduler_type": SCHEDULES[schedule], "warmup_steps": warmup_steps}
    if OPTIMIZERS[optimizer].averaged:
        return {"lr_scheduler_type": "constant"}
    return {"lr_scheduler_type": SCHEDULES[schedule], "warmup_steps": warmup_steps}


def trainer_options(
    optimizer: str, model: nn.Module, *, lr: float, weight_decay: float = 0.0, warmup_steps: int = 0
) -> TrainerOptions:
    """What `Trainer` is given besides its arguments.

    Tensors with one dimension (norms, biases) are not decayed. Optimizers that average warm up by themselves.
    """
    if optimizer not in OPTIMIZERS:
        return TrainerOptions()
    info, routing = OPTIMIZERS[optimizer], split_parameters(model)
    groups: list[dict[str, Any]] = []
    for group in routing.param_groups():
        for decayed in (True, False):
            kept = [index for index, (_, tensor) in enumerate(group["params"]) if (tensor.ndim > 1) == decayed]
            if kept:
                picked = {key: [group[key][index] for index in kept] for key in ("params", "reasons")}
                groups.append({**group, **picked, "weight_decay": weight_decay if decayed else 0.0})
    options = {"params": groups, "lr": lr, **info.options}
    if info.warmup:
        options["warmup_steps"] = max(info.least_warmup, warmup_steps)
    callbacks: tuple[TrainerCallback, ...] = ()
    if info.averaged:
        from burnish.optim.callback import AveragedWeights

        callbacks = (AveragedWeights(),)
    return TrainerOptions((info.load(), options), callbacks, routing if info.matrix_rule else None)
