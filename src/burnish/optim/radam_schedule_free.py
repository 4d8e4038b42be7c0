"""RAdam without a schedule: the rectification takes the place of warmup."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from burnish.optim.adamw_schedule_free import AdamWScheduleFree
from burnish.optim.averaging import Mix, accumulate_second_moment, sweep_advance
from burnish.optim.base import Live
from burnish.optim.routing import Routing


def rectification(step: int, beta2: float, *, silent: bool = True) -> tuple[float, bool]:
    """The factor of the learning rate at a step (from 1), and whether the second moment may be divided by.

    While the variance of the second moment is not defined (rho_t <= 4, the first four steps at 0.999) the step is left
    out ("silent") or is plain SGD. Source: Liu et al., arXiv 1908.03265, in the form of the `schedulefree` package.
    """
    power = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * power / (1 - power)
    if length <= 4:
        return (0.0 if silent else 1.0), False
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return math.sqrt(ratio), True


class RAdamScheduleFree(AdamWScheduleFree):
    """Schedule-free AdamW whose learning rate is rectified in the first steps, so that no warmup has to be chosen.

    Args:
        params, lr, betas, eps, weight_decay, r, weight_lr_power, scheduler, nonfinite, maximize: as
            `AdamWScheduleFree`.
        silent_sgd_phase: leave out the steps before the rectification is defined, else take them as SGD.

    Source: as `schedulefree.RAdamScheduleFree`, equal up to rounding.
    """

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float = 2.5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        scheduler: Literal["refuse", "follow"] = "refuse",
        nonfinite: Literal["raise", "skip"] = "raise",
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            r=r,
            weight_lr_power=weight_lr_power,
            scheduler=scheduler,
            nonfinite=nonfinite,
            maximize=maximize,
        )
        # Only steps read it, so it may come after the groups.
        self.defaults["silent_sgd_phase"] = silent_sgd_phase
        for group in self.param_groups:
            group.setdefault("silent_sgd_phase", silent_sgd_phase)

    def scheduled_lr(self, group: dict[str, Any]) -> float:
        factor, _ = rectification(group["step"] + 1, group["beta2"], silent=group["silent_sgd_phase"])
        return float(group["lr"] * factor)

    def move(self, group: dict[str, Any], live: list[Live], mix: Mix) -> None:
        _, adaptive = rectification(group["step"] + 1, group["beta2"])
        if adaptive:
            super().move(group, live, mix)
            return
        moments = [tensor.state["exp_avg_sq"] for tensor in live]
        direct = functools.partial(accumulate_second_moment, beta2=group["beta2"])
        sweep_advance(live, mix, direct, [tensor.gradient for tensor in live], moments)
