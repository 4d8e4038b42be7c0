"""Schedule-free averaging: a fast sequence z, its average x (the model to ship), and gradients taken between them.

    y_t     = (1 - beta_t) z_t + beta_t x_t                   the parameters while training
    z_{t+1} = z_t - lr_t (d_t + decay)                        d_t: whatever direction the rule gives at y_t
    x_{t+1} = (1 - c_{t+1}) x_t + c_{t+1} z_{t+1}             the parameters while `averaged()`

Only z is kept beside the parameter: x = z + (y - z) / beta gives the average back. A bfloat16 parameter cannot hold
that difference, so for it z and x are both kept in float32.

Source: Defazio et al., The Road Less Scheduled, arXiv 2405.15682; the x-free form is algebra.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.optim.base import HALF_PRECISION, Live, RoutedOptimizer, require_number
from burnish.optim.elementwise import local, sweep

TRAINING, AVERAGED = "training", "averaged"
SCHEDULERS = ("refuse", "follow")

Tensors = list[Tensor]
Direct = Callable[..., Tensors]


@dataclass(frozen=True)
class Mix:
    """The numbers of one step.

    Attributes:
        lr: with warmup.
        share: c, what the new z weighs in the average.
        beta_before: with which the parameters were built.
        beta: with which they are built now.
        decay_z, decay_y: weight decay, taken at the fast sequence and at the parameters.
        stale: recover x with `beta` in place of `beta_before`, as the released AMUSE does.
    """

    lr: float
    share: float
    beta_before: float
    beta: float
    decay_z: float = 0.0
    decay_y: float = 0.0
    stale: bool = False


def advance(y: Tensors, z: Tensors, direction: Tensors, mix: Mix) -> None:
    """One step of y and z in place; x stays implicit."""
    keep = mix.beta * (1 - mix.share)
    step = _step(y, z, direction, mix)
    torch._foreach_lerp_(y, z, 1 - keep / (mix.beta if mix.stale else mix.beta_before))
    torch._foreach_add_(y, step, alpha=mix.lr * (keep - 1))
    torch._foreach_add_(z, step, alpha=-mix.lr)


def advance_stored(parameters: Tensors, z: Tensors, x: Tensors, direction: Tensors, mix: Mix) -> None:
    """The same for half-precision parameters, with z and x in float32."""
    y = torch._foreach_lerp(z, x, mix.beta_before) if mix.decay_y else []
    step = _step(list(y), z, [value.float() for value in direction], mix)
    if mix.stale:
        torch._foreach_lerp_(x, z, 1 - mix.beta_before / mix.beta)
    torch._foreach_add_(z, step, alpha=-mix.lr)
    torch._foreach_lerp_(x, z, mix.share)
    torch._foreach_copy_(parameters, list(torch._foreach_lerp(z, x, mix.beta)))


def sweep_advance(live: Sequence[Live], mix: Mix, direct: Direct, *inputs: Sequence[Tensor]) -> None:
    """Advance tensors by `direct(*inputs) -> directions`, computed piece by piece with the step itself.

    Args:
        live: the tensors.
        mix: the numbers of the step.
        direct: takes the columns of `inputs` and may change them in place (second moments).
        inputs: columns as long as `live`, of the tensors' shapes.
    """
    for stored, kernel in ((False, advance), (True, advance_stored)):
        rows = [index for index, tensor in enumerate(live) if ("x" in tensor.state) == stored]
        kept = ["z", "x"] if stored else ["z"]
        columns = [[live[index].data for index in rows], *([live[index].state[key] for index in rows] for key in kept)]

        def run(*lists: Tensors, kernel: Callable[..., None] = kernel, held: int = len(columns)) -> None:
            kernel(*lists[:held], direct(*lists[held:]), mix)

        sweep(run, *columns, *([column[index] for index in rows] for column in inputs))


def accumulate_second_moment(gradients: Tensors, moments: Tensors, *, beta2: float) -> Tensors:
    """v <- beta2 v + (1 - beta2) g^2 in place; returns the gradients in the dtype of v."""
    if gradients[0].dtype != moments[0].dtype:
        gradients = [gradient.to(moments[0].dtype) for gradient in gradients]
    torch._foreach_mul_(moments, beta2)
    torch._foreach_addcmul_(moments, gradients, gradients, value=1 - beta2)
    return gradients


def second_moment(gradients: Tensors, moments: Tensors, *, beta2: float, eps: float, correction: float) -> Tensors:
    """g / (sqrt(v / correction) + eps), v updated in place."""
    gradients = accumulate_second_moment(gradients, moments, beta2=beta2)
    scale = torch._foreach_div(moments, correction)
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, eps)
    return list(torch._foreach_div(gradients, scale))


def _step(y: Tensors, z: Tensors, direction: Tensors, mix: Mix) -> Tensors:
    if mix.decay_y:
        # Decay at y is taken off z first, then z decays by itself.
        direction = list(torch._foreach_add(direction, y, alpha=mix.decay_y * (1 - mix.lr * mix.decay_z)))
    if mix.decay_z:
        direction = list(torch._foreach_add(direction, z, alpha=mix.decay_z))
    return direction


class AveragedOptimizer(RoutedOptimizer):
    """An optimizer whose parameters are y while training and the average x inside `averaged()`.

    It starts in training mode. The mode is part of every group, hence of `state_dict`: a state saved inside
    `averaged()` belongs to weights saved inside `averaged()`.
    """

    def beta(self, group: dict[str, Any], share: float) -> float:
        """The weight of x in the parameters after this step; it does not change unless a method says so."""
        return float(group["beta"])

    def decays(self, group: dict[str, Any]) -> tuple[float, float]:
        """Weight decay at the fast sequence and at the parameters; schedule-free optimizers decay at the parameters."""
        return 0.0, float(group["weight_decay"])

    def move(self, group: dict[str, Any], live: list[Live], mix: Mix) -> None:
        """Advance the tensors that have a gradient."""
        raise NotImplementedError

    def scheduled_lr(self, group: dict[str, Any]) -> float:
        """The learning rate of this step: linear warmup to `lr`, then constant."""
        return float(group["lr"] * min(1.0, (group["step"] + 1) / max(1, group["warmup_steps"])))

    def weight(self, group: dict[str, Any], lr: float) -> float:
        """What the next z weighs in the average, before normalisation: t^r times the largest lr so far to a power."""
        group["lr_max"] = max(lr, group["lr_max"])
        return float((group["step"] + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"])

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["scheduler"] not in SCHEDULERS:
            raise ValueError(f"scheduler={group['scheduler']!r}: choose one of {', '.join(SCHEDULERS)}")
        require_number("warmup_steps", group["warmup_steps"], low=0)
        require_number("beta", group["beta"], low=0, high=1, open_low=True, open_high=False)
        require_number("weight_lr_power", group["weight_lr_power"], low=0)
        if not math.isfinite(group["r"]):
            raise ValueError(f"r={group['r']}: expected a finite number")
        group.setdefault("base_lr", group["lr"])
        if len({other["mode"] for other in (*self.param_groups, group)}) > 1:
            group["mode"] = self.param_groups[0]["mode"]

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """z, and x where the parameter is half precision: both in float32 then."""
        value = parameter.detach()
        if parameter.dtype in HALF_PRECISION:
            return {"z": value.float(), "x": value.float()}
        return {"z": value.clone(memory_format=torch.preserve_format)}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Raises:
            RuntimeError: the parameters are the average now.
            ValueError: an external scheduler changed lr, and `scheduler="refuse"`.
            TrainingError: a gradient is not finite and `nonfinite="raise"`.
        """
        for group in self.param_groups:
            if group["mode"] != TRAINING:
                raise RuntimeError(
                    f"{type(self).__name__}.step() while the parameters are the average: call optimizer.train() first,"
                    " or take the step outside of `with optimizer.averaged()`"
                )
            if group["scheduler"] == "refuse" and group["lr"] != group["base_lr"]:
                raise ValueError(
                    f"lr went from {group['base_lr']} to {group['lr']}: a scheduler is attached to"
                    f" {type(self).__name__}, which needs none: remove it (Trainer: lr_scheduler_type='constant'), or"
                    " pass scheduler='follow' to honour it"
                )
        return super().step(closure)

    def step_group(self, group: dict[str, Any], live: list[Live]) -> None:
        if group["step"] == 0:
            # The parameters may have been loaded since construction: all sequences start from what they are now.
            for parameter in group["params"]:
                for key in ("z", "x"):
                    if key in self.state[parameter]:
                        self.state[parameter][key].copy_(parameter)
        lr = self.scheduled_lr(group)
        weight = self.weight(group, lr)
        group["weight_sum"] += weight
        share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        before, beta = group["beta"], self.beta(group, share)
        stale = group.get("interpolation") == "official"
        mix = Mix(lr, share, before, beta, *self.decays(group), stale)
        self.move(group, live, mix)
        if beta != before:
            # A tensor without a gradient keeps z and x, and its parameters follow beta; where the released code is
            # matched the parameters stay, so that x, read off them, follows.
            moved = {id(tensor.parameter) for tensor in live}
            idle = [parameter for parameter in group["params"] if id(parameter) not in moved]
            if not stale:
                self._swap(idle, 1 - beta / before, beta)
            for state in (self.state[parameter] for parameter in idle if stale and "x" in self.state[parameter]):
                local(state["x"]).lerp_(local(state["z"]), 1 - before / beta)
        group["beta"], group["scheduled_lr"] = beta, lr
        group["step"] += 1

    def _swap(self, parameters: Sequence[Tensor], weight: float, beta: float) -> None:
        """Go from one mixture of z and x to another: `weight` of z for parameters that hold x implicitly, `beta` of x
        for those that store it."""
        rows = [(local(p.detach()), {k: local(v) for k, v in self.state[p].items()}) for p in parameters]
        implicit = [(data, state["z"]) for data, state in rows if "x" not in state]
        if implicit:
            sweep(lambda y, z: torch._foreach_lerp_(y, z, weight), *map(list, zip(*implicit, strict=True)))
        for data, state in rows:
            if "x" in state:
                data.copy_(torch.lerp(state["z"], state["x"], beta))

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the parameters; does nothing if it is there."""
        self.complete_state()
        for group in self.param_groups:
            if group["mode"] == TRAINING and group["step"]:
                self._swap(group["params"], 1 - 1 / group["beta"], 1.0)
            group["mode"] = AVERAGED

    @torch.no_grad()
    def train(self) -> None:
        """Put y, where gradients are taken, into the parameters; does nothing if it is there."""
        self.complete_state()
        for group in self.param_groups:
            if group["mode"] == AVERAGED and group["step"]:
                self._swap(group["params"], 1 - group["beta"], group["beta"])
            group["mode"] = TRAINING

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model to evaluate, save and ship, for the length of a `with` block.

        Examples:
            >>> import torch
            >>> from burnish.optim import SGDScheduleFree
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = SGDScheduleFree([weight], lr=0.5)
            >>> for _ in range(2):
            ...     weight.square().sum().mul(0.5).backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            >>> with optimizer.averaged():
            ...     print(weight.tolist())
            [0.375, 0.375]
            >>> print(weight.tolist())
            [0.3625..., 0.3625...]
        """
        modes = {group["mode"] for group in self.param_groups}
        self.eval()
        try:
            yield
        finally:
            if modes == {TRAINING}:
                self.train()


def averaging_options(
    beta: float, warmup_steps: int, r: float, weight_lr_power: float, scheduler: str
) -> dict[str, Any]:
    """Group keys that every averaged optimizer has: its options, and its counters (which `state_dict` keeps)."""
    return {
        "beta": beta,
        "warmup_steps": warmup_steps,
        "r": r,
        "weight_lr_power": weight_lr_power,
        "scheduler": scheduler,
        "mode": TRAINING,
        "step": 0,
        "weight_sum": 0.0,
        "lr_max": 0.0,
        "scheduled_lr": 0.0,
    }
