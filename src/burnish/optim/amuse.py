"""AMUSE: Muon on the fast sequence, and averaging whose gradients move towards the average as training goes on."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from burnish.optim.averaging import AveragedOptimizer, Mix, Tensors, averaging_options, second_moment, sweep_advance
from burnish.optim.base import Live, require_number
from burnish.optim.matrix import check_matrix_group, directions, matrix_options
from burnish.optim.muon import AUXILIARY
from burnish.optim.orthogonalization import Method
from burnish.optim.routing import Routing

INTERPOLATIONS = ("exact", "official")
AVERAGINGS = ("weighted", "uniform")
BETA_SCHEDULES = ("weights", "steps")


def beta_from_weights(share: float, warmup_share: float, *, beta1: float, rho: float) -> float:
    """beta_t = 1 - [ c (1 - c_0) / (c_0 (1 - c)) ]^rho (1 - beta_1), c_0 the share at the end of warmup.

    With it the window over which x averages the points y grows as t^(1 - rho): linearly at rho = 0, not at all at 1.

    Source: the released code, and version 2 of arXiv 2605.22432 as others quote it.
    """
    if share >= 1 or not 0 < warmup_share < 1:
        return beta1
    # A followed scheduler may raise lr after warmup: beta falls back to beta_1, not below.
    shrink = min(1.0, share * (1 - warmup_share) / (warmup_share * (1 - share)))
    return float(1 - shrink**rho * (1 - beta1))


def beta_from_steps(step: int, warmup_steps: int, *, beta1: float, rho: float) -> float:
    """beta_t = 1 - ((T_0 - 1) / (t - 1))^rho (1 - beta_1), t > T_0 counted from 1.

    Source: arXiv 2605.22432 version 1, equation 1 (as quoted by ports of it); slower than `beta_from_weights`.
    """
    return float(1 - ((warmup_steps - 1) / (step - 1)) ** rho * (1 - beta1))


class AMUSE(AveragedOptimizer):
    """Muon without a schedule: a usable model at every step, no horizon to choose.

    Weight matrices move by orthogonalised momentum, other tensors by Adam's preconditioner without first moment or by
    SGD; all of them are averaged. After `warmup_steps` the weight beta of the average in the parameters grows from
    `beta1` to 1, so that gradients are taken at the fast sequence early and at the stable average late.

    Args:
        params: a model, a `Routing`, tensors, (name, tensor) pairs, or groups (`use_muon` says which rule). Two or more
            dimensions go to the matrix rule where nothing else is said.
        lr: constant after warmup; 0.01 for language models with `match_rms_adamw`.
        warmup_steps: T_0 > 1, of linear warmup and until beta begins to grow; 5 to 12 % of a run of usual length.
        beta1: the first beta, in (0, 1]; 0.4 to 0.6 for language models.
        rho: how fast beta grows, >= 0; 0 keeps it. The released settings have 0.2 to 0.8; take less with a short
            warmup, for the window is about (T_0 / 3)^rho t^(1 - rho) steps.
        weight_decay: of the fast sequence, times lr.
        weight_decay_at_y: of the parameters, times lr, as schedule-free AdamW has it.
        momentum, nesterov, momentum_form: of the matrices.
        interpolation: "exact" recovers the average with the beta that the parameters were built with; "official" with
            the next one, as the released code does, which pulls the average towards z while beta grows.
        averaging: "weighted", c = lr^p / sum lr^p, or "uniform", c = 1 / (t + 1) as the paper's repository prints.
        beta_schedule: "weights" (released code) or "steps" (paper, version 1).
        scale: "match_rms_adamw", or "original" with `auxiliary="sgd"` (vision).
        orthogonalization, steps, dtype, eps: see `burnish.optim.orthogonalization`.
        auxiliary: "adamw" or "sgd" for the other tensors.
        auxiliary_lr: their lr; `lr` where left out.
        beta2, auxiliary_eps: of their second moment.
        r, weight_lr_power: a step weighs t^r lr^power in the average.
        scheduler: "refuse" an external scheduler, or "follow" it.
        nonfinite: "raise" at a NaN in a gradient, or "skip" the step.
        process_group: of data parallel ranks, to share the orthogonalisation.
        maximize: go up instead of down.

    Raises:
        ValueError: an option out of range, see `RoutedOptimizer`.

    Source: arXiv 2605.22432 and its code (first released version); the exact inversion and stacks of matrices are ours.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = AMUSE(layer.parameters(), lr=0.01, warmup_steps=10)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> with optimizer.averaged():
        ...     weights = layer.state_dict()
    """

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float,
        *,
        warmup_steps: int,
        beta1: float = 0.6,
        rho: float = 0.8,
        weight_decay: float = 0.0,
        weight_decay_at_y: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        momentum_form: Literal["ema", "accumulate"] = "ema",
        interpolation: Literal["exact", "official"] = "exact",
        averaging: Literal["weighted", "uniform"] = "weighted",
        beta_schedule: Literal["weights", "steps"] = "weights",
        scale: str = "match_rms_adamw",
        orthogonalization: Method = "newton-schulz",
        steps: int = 5,
        dtype: torch.dtype | None = None,
        eps: float = 1e-7,
        auxiliary: Literal["adamw", "sgd"] = "adamw",
        auxiliary_lr: float | None = None,
        beta2: float = 0.999,
        auxiliary_eps: float = 1e-10,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        scheduler: Literal["refuse", "follow"] = "refuse",
        nonfinite: Literal["raise", "skip"] = "raise",
        process_group: ProcessGroup | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "rho": rho,
            "weight_decay": weight_decay,
            "weight_decay_at_y": weight_decay_at_y,
            **matrix_options(momentum, nesterov, momentum_form, scale, orthogonalization, steps, dtype, eps),
            **averaging_options(beta1, warmup_steps, r, weight_lr_power, scheduler),
            "warmup_share": 1.0,
            "interpolation": interpolation,
            "averaging": averaging,
            "beta_schedule": beta_schedule,
            "auxiliary": auxiliary,
            "auxiliary_lr": auxiliary_lr,
            "beta2": beta2,
            "auxiliary_eps": auxiliary_eps,
            "nonfinite": nonfinite,
            "maximize": maximize,
        }
        super().__init__(params, defaults, process_group=process_group)

    def check_group(self, group: dict[str, Any]) -> None:
        require_number("beta1", group["beta1"], low=0, high=1, open_low=True, open_high=False)
        super().check_group(group)
        check_matrix_group(group)
        if group["warmup_steps"] != int(group["warmup_steps"]) or group["warmup_steps"] < 2:
            raise ValueError(
                f"warmup_steps={group['warmup_steps']}: AMUSE needs a whole number of 2 or more (5% of a run)"
            )
        require_number("rho", group["rho"], low=0)
        require_number("weight_decay_at_y", group["weight_decay_at_y"], low=0)
        require_number("beta2", group["beta2"], low=0, high=1)
        require_number("auxiliary_eps", group["auxiliary_eps"], low=0)
        choices = {
            "interpolation": INTERPOLATIONS,
            "averaging": AVERAGINGS,
            "beta_schedule": BETA_SCHEDULES,
            "auxiliary": AUXILIARY,
        }
        for name, known in choices.items():
            if group[name] not in known:
                raise ValueError(f"{name}={group[name]!r}: choose one of {', '.join(known)}")

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().create_state(parameter, group)
        if group["use_muon"]:
            state["momentum_buffer"] = torch.zeros_like(parameter.detach())
        elif group["auxiliary"] == "adamw":
            state["exp_avg_sq"] = torch.zeros_like(state["z"])
        return state

    def decays(self, group: dict[str, Any]) -> tuple[float, float]:
        return float(group["weight_decay"]), float(group["weight_decay_at_y"])

    def weight(self, group: dict[str, Any], lr: float) -> float:
        if group["averaging"] == "weighted":
            return float((group["step"] + 1) ** group["r"] * lr ** group["weight_lr_power"])
        # Counting the start makes the first share 1/2 and the t-th 1/(t + 1).
        group["weight_sum"] = group["weight_sum"] or 1.0
        return 1.0

    def beta(self, group: dict[str, Any], share: float) -> float:
        step, warmup = group["step"] + 1, group["warmup_steps"]
        if step == warmup:
            group["warmup_share"] = share
        if step <= warmup:
            return float(group["beta1"])
        if group["beta_schedule"] == "steps":
            return beta_from_steps(step, warmup, beta1=group["beta1"], rho=group["rho"])
        return beta_from_weights(share, group["warmup_share"], beta1=group["beta1"], rho=group["rho"])

    def move(self, group: dict[str, Any], live: list[Live], mix: Mix) -> None:
        if not group["use_muon"]:
            self._move_others(group, live, mix)
            return
        for tensors, orthogonal, scale in directions(
            live, group, process_group=self.process_group, exchanges=self._exchanges
        ):
            dtype = tensors[0].state["z"].dtype

            def stretch(lists: Tensors, scale: float = scale, dtype: torch.dtype = dtype) -> Tensors:
                return [direction.to(dtype).mul_(scale) for direction in lists]

            sweep_advance(tensors, mix, stretch, orthogonal)

    def _move_others(self, group: dict[str, Any], live: list[Live], mix: Mix) -> None:
        gradients = [tensor.gradient for tensor in live]
        if group["auxiliary"] == "sgd":
            sweep_advance(live, mix, lambda columns: columns, gradients)
            return
        correction = 1 - group["beta2"] ** (group["step"] + 1)
        direct = functools.partial(
            second_moment, beta2=group["beta2"], eps=group["auxiliary_eps"], correction=correction
        )
        sweep_advance(live, mix, direct, gradients, [tensor.state["exp_avg_sq"] for tensor in live])
