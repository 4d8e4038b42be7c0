"""AdamW without a schedule."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from burnish.optim.averaging import AveragedOptimizer, Mix, averaging_options, second_moment, sweep_advance
from burnish.optim.base import Live, require_number
from burnish.optim.routing import Routing


class AdamWScheduleFree(AveragedOptimizer):
    """Adam's preconditioner on the fast sequence; its running average is the model. No first moment is kept.

    Args:
        params: a model, tensors, (name, tensor) pairs, or groups.
        lr: 1 to 10 times that of AdamW with a schedule.
        betas: the weight of the average where gradients are taken, in (0, 1] (0.9; 0.95 to 0.98 for long runs), and the
            decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: taken at the parameters y, times lr.
        warmup_steps: of linear warmup; recommended.
        r, weight_lr_power: a step weighs t^r lr^power in the average.
        scheduler: "refuse" an external scheduler, or "follow" it.
        nonfinite: "raise" at a NaN in a gradient, or "skip" the step.
        maximize: go up instead of down.

    Raises:
        ValueError: an option out of range, see `RoutedOptimizer`.

    Source: arXiv 2405.15682; equal to `schedulefree.AdamWScheduleFree` up to rounding.
    """

    has_matrix_rule = False

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float = 2.5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        scheduler: Literal["refuse", "follow"] = "refuse",
        nonfinite: Literal["raise", "skip"] = "raise",
        maximize: bool = False,
    ) -> None:
        require_number("betas[0]", betas[0], low=0, high=1, open_low=True, open_high=False)
        defaults = {
            "lr": lr,
            "beta2": betas[1],
            "eps": eps,
            "weight_decay": weight_decay,
            **averaging_options(betas[0], warmup_steps, r, weight_lr_power, scheduler),
            "nonfinite": nonfinite,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        if "betas" in group:
            group["beta"], group["beta2"] = group.pop("betas")
        super().check_group(group)
        require_number("betas[1]", group["beta2"], low=0, high=1)
        require_number("eps", group["eps"], low=0)

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().create_state(parameter, group)
        return state | {"exp_avg_sq": torch.zeros_like(state["z"])}

    def move(self, group: dict[str, Any], live: list[Live], mix: Mix) -> None:
        correction = 1 - group["beta2"] ** (group["step"] + 1)
        direct = functools.partial(second_moment, beta2=group["beta2"], eps=group["eps"], correction=correction)
        moments = [tensor.state["exp_avg_sq"] for tensor in live]
        sweep_advance(live, mix, direct, [tensor.gradient for tensor in live], moments)
