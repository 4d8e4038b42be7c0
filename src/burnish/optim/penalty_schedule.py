"""How strong the penalties of `ProxGen` are as a training goes on, and when weights are rounded: a Trainer callback."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from transformers import TrainerCallback

from burnish.errors import TrainingError
from burnish.optim.base import require_number
from burnish.optim.proxgen import ProxGen
from burnish.penalties import sparsity

Shape = Literal["constant", "warmup", "linear"]


def strength_scale(progress: float, shape: Shape = "constant", *, warmup: float = 0.1, freeze_at: float = 1.0) -> float:
    """What multiplies the strength of a penalty.

    Args:
        progress: steps done over steps in all, from 0 to 1.
        shape: "constant"; "warmup", linear from 0 to 1 over the share `warmup`; "linear", from 0 to 1 until `freeze_at`
            (ProxQuant's strength is a rate times the epoch: its rate times the last epoch is our strength).
        warmup: a share of the training.
        freeze_at: a share of the training.

    Source: the homotopy of arXiv 1810.00861, by step in place of by epoch.

    Examples:
        >>> [strength_scale(progress, "linear", freeze_at=0.5) for progress in (0, 0.25, 0.5, 1)]
        [0.0, 0.5, 1.0, 1.0]
    """
    if shape == "constant":
        return 1.0
    end = warmup if shape == "warmup" else freeze_at
    return min(1.0, progress / end) if end else 1.0


class PenaltySchedule(TrainerCallback):  # type: ignore[misc]
    """Scales the penalties of `ProxGen`, rounds weights with levels at the right time, and logs what is zero.

    With every log come `sparsity`, the share of exact zeros in tensors with two dimensions or more, and `penalty`, what
    the penalties add to the loss. A resumed training has the strength of its step.

    Args:
        shape, warmup: see `strength_scale`.
        freeze_at: after this share of the steps the weights whose penalty has levels are rounded to them and train no
            further; the others go on. None leaves them.

    Raises:
        ValueError: an option out of range.
        TrainingError: the optimizer is not `ProxGen`.

    Examples:
        >>> from transformers import Trainer
        >>> from burnish.optim import ProxGen, split_parameters
        >>> from burnish.penalties import Wells
        >>> options = {"params": split_parameters(model).param_groups(), "lr": 1e-3, "penalty": Wells(1e-3)}
        ... # doctest: +SKIP
        >>> Trainer(model, arguments, optimizer_cls_and_kwargs=(ProxGen, options),
        ...         callbacks=[PenaltySchedule("linear", freeze_at=0.75)])  # doctest: +SKIP
    """

    def __init__(self, shape: Shape = "constant", *, warmup: float = 0.1, freeze_at: float | None = None) -> None:
        if shape not in get_args(Shape):
            raise ValueError(f"shape={shape!r}: choose one of {', '.join(get_args(Shape))}")
        require_number("warmup", warmup, low=0, high=1, open_high=False)
        if freeze_at is not None:
            require_number("freeze_at", freeze_at, low=0, high=1, open_low=True, open_high=False)
        self.shape, self.warmup, self.freeze_at = shape, warmup, freeze_at

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        end = 1.0 if self.freeze_at is None else self.freeze_at
        scale = strength_scale(state.global_step / state.max_steps, self.shape, warmup=self.warmup, freeze_at=end)
        find_proxgen(optimizer).scale_strength(scale)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
        found = find_proxgen(optimizer)
        thawed = any(not group["frozen"] for group in found.param_groups if found.has_levels(group))
        if self.freeze_at is not None and thawed and state.global_step >= self.freeze_at * state.max_steps:
            found.freeze()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: nn.Module | None = None,
        optimizer: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        if model is None or optimizer is None:
            return
        found = {"sparsity": sparsity(model).share, "penalty": find_proxgen(optimizer).penalty_value()}
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(found)


def find_proxgen(optimizer: Any) -> ProxGen:
    """`ProxGen` inside wrappers that keep what they wrap in `.optimizer` (Accelerate's does).

    Raises:
        TrainingError: there is none.
    """
    names = []
    while not isinstance(optimizer, ProxGen):
        names.append(type(optimizer).__name__)
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            raise TrainingError(f"no ProxGen in {' > '.join(names)}: train with it, or drop PenaltySchedule")
        optimizer = inner
    return optimizer
