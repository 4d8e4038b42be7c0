"""SGD without a schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from burnish.optim.averaging import AveragedOptimizer, Mix, averaging_options, sweep_advance
from burnish.optim.base import Live, require_number
from burnish.optim.routing import Routing


class SGDScheduleFree(AveragedOptimizer):
    """Gradient descent whose running average is the model: no decay schedule, no horizon.

    Args:
        params: a model, tensors, (name, tensor) pairs, or groups.
        lr: 10 to 50 times that of SGD with a schedule.
        momentum: beta, the weight of the average where gradients are taken, in (0, 1].
        weight_decay: taken at the parameters y, times lr.
        warmup_steps: of linear warmup; recommended.
        r, weight_lr_power: a step weighs t^r lr^power in the average.
        scheduler: "refuse" an external scheduler, or "follow" it.
        nonfinite: "raise" at a NaN in a gradient, or "skip" the step.
        maximize: go up instead of down.

    Raises:
        ValueError: an option out of range, see `RoutedOptimizer`.

    Source: arXiv 2405.15682; equal to `schedulefree.SGDScheduleFree` up to rounding.
    """

    has_matrix_rule = False

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        scheduler: Literal["refuse", "follow"] = "refuse",
        nonfinite: Literal["raise", "skip"] = "raise",
        maximize: bool = False,
    ) -> None:
        require_number("momentum", momentum, low=0, high=1, open_low=True, open_high=False)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            **averaging_options(momentum, warmup_steps, r, weight_lr_power, scheduler),
            "nonfinite": nonfinite,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        group["beta"] = group.pop("momentum", group["beta"])
        super().check_group(group)

    def move(self, group: dict[str, Any], live: list[Live], mix: Mix) -> None:
        sweep_advance(live, mix, lambda gradients: gradients, [tensor.gradient for tensor in live])
