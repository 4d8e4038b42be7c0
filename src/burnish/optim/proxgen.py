"""ProxGen: a step of SGD, Adam or their kin, then the exact proximal map of a penalty in the metric of that step.

    v     = theta - lr m / d                                    the optimizer's own step, in torch's own code
    theta = argmin_x  strength R(x) + sum d (x - v)^2 / (2 lr)  the proximal map with kappa = lr strength / d

Weights become exactly zero (or fall exactly onto a level) while training, where a penalty added to the loss leaves them
small. The gradient is of the loss alone.

Source: arXiv 2007.07484 (NeurIPS 2021) and the authors' code, of which we take the order of operations; its penalties
are separate optimizers with approximate maps, ours are exact and chosen by argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from burnish.optim.base import HALF_PRECISION, Live, RoutedOptimizer, require_number, tensor_name
from burnish.optim.elementwise import local, sweep
from burnish.optim.routing import Routing, route_tensors
from burnish.penalties import Lq, Penalty, restore

METRICS = ("preconditioner", "euclidean")
LASSO = Lq(1.0, 1e-4)
Columns = dict[str, list[Tensor]]
Group = Mapping[str, Any]


@dataclass(frozen=True)
class Preconditioner:
    """A way to step.

    Attributes:
        state: what is kept beside the step count.
        step: moves tensors by gradients, in place.
        scale: the state from which d is computed; empty where d is a number.
        corrected: d divides out the bias of an average that began at zero.
        decoupled: what torch does with weight decay.
    """

    state: tuple[str, ...]
    step: Callable[[Group, list[Tensor], list[Tensor], Columns], None]
    scale: str = ""
    corrected: bool = False
    decoupled: bool = False


def _adam(group: Group, data: list[Tensor], gradients: list[Tensor], state: Columns) -> None:
    adam(
        data,
        gradients,
        state["exp_avg"],
        state["exp_avg_sq"],
        state.get("max_exp_avg_sq", []),
        state["step"],
        foreach=not _fused(data),
        fused=_fused(data),
        amsgrad="max_exp_avg_sq" in state,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _sgd(group: Group, data: list[Tensor], gradients: list[Tensor], state: Columns) -> None:
    torch._foreach_add_(state["step"], 1)
    sgd(
        data,
        gradients,
        state.get("momentum_buffer", [None] * len(data)),  # type: ignore[arg-type]
        foreach=not _fused(data),
        fused=_fused(data),
        weight_decay=group["weight_decay"],
        momentum=group["momentum"] if "momentum_buffer" in state else 0.0,
        lr=group["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _adagrad(group: Group, data: list[Tensor], gradients: list[Tensor], state: Columns) -> None:
    adagrad(
        data,
        gradients,
        state["sum"],
        state["step"],
        foreach=not _fused(data),
        fused=_fused(data),
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        lr_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


def _rmsprop(group: Group, data: list[Tensor], gradients: list[Tensor], state: Columns) -> None:
    rmsprop(
        data,
        gradients,
        state["square_avg"],
        [],
        [],
        state["step"],
        foreach=True,
        lr=group["lr"],
        alpha=group["alpha"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        momentum=0.0,
        centered=False,
    )


def _fused(data: list[Tensor]) -> bool:
    # torch's fused kernels want the step count on the device elsewhere, where lists are fast enough.
    return data[0].device.type == "cpu"


PRECONDITIONERS: dict[str, Preconditioner] = {
    "sgd": Preconditioner((), _sgd),
    "momentum": Preconditioner(("momentum_buffer",), _sgd),
    "adam": Preconditioner(("exp_avg", "exp_avg_sq"), _adam, "exp_avg_sq", corrected=True),
    "adamw": Preconditioner(("exp_avg", "exp_avg_sq"), _adam, "exp_avg_sq", corrected=True, decoupled=True),
    "amsgrad": Preconditioner(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _adam, "max_exp_avg_sq", corrected=True),
    "adagrad": Preconditioner(("sum",), _adagrad, "sum"),
    "rmsprop": Preconditioner(("square_avg",), _rmsprop, "square_avg"),
}


class ProxGen(RoutedOptimizer):
    """Trains weights that are exactly zero, or exactly on a level: a gradient step, then a proximal map in its metric.

    Without a penalty it takes bit for bit the steps of `torch.optim.AdamW`, `Adam` (also `amsgrad=True`), `SGD` (also
    with momentum), `Adagrad` or `RMSprop`.

    Which tensors are penalised: a group with a key `penalty` says so itself (None: not at all). Of a model, those that
    `split_parameters` takes for weight matrices: linear, attention, convolution and expert weights, not embeddings,
    output heads, norms, biases. Of bare tensors, those with two dimensions or more. `print(optimizer.routing_table())`
    shows it.

    Args:
        params: a model, a `Routing`, tensors, (name, tensor) pairs, or groups.
        lr: the step; the metric d comes from the preconditioner.
        penalty: from `burnish.penalties`, or None. Its strength is beside the loss as you compute it, usually a mean
            (see `mean_loss_strength`).
        preconditioner: "adamw", "adam", "amsgrad", "rmsprop", "adagrad", "sgd" or "momentum". Heavy-ball momentum sums
            gradients, so that its d is 1 - momentum.
        betas: of the averages of Adam.
        momentum: of "momentum".
        alpha: of "rmsprop".
        eps: added to d.
        weight_decay: as torch has it: decoupled for "adamw", added to the gradient for the others.
        decoupled: for any of them, `p *= 1 - lr * weight_decay` before the step (True), or in the gradient (False).
        metric: "preconditioner", or "euclidean" for kappa = lr strength without d, as in the original ProxQuant.
        min_denominator: least d in kappa. Where a gradient was always zero (dead inputs, unused rows) d is eps, so that
            any penalty zeroes the weight at once; this bounds it.
        nonfinite: "raise" at a NaN in a gradient, or "skip" the step.
        maximize: go up instead of down, the penalty still goes down.

    A bfloat16 parameter has a float32 copy in the state (12 more bytes a number with Adam), so that small steps and
    small shrinkage are not rounded away; zero there is zero in the parameter. Sharded tensors (FSDP2) are treated shard
    by shard where the penalty allows it (`Penalty.splits_along`) and refused where not.

    Raises:
        ValueError: an option out of range, a penalty without a map in the metric, see also `RoutedOptimizer`.

    Source: arXiv 2007.07484. Ours: the metric of momentum, `min_denominator`.

    Examples:
        >>> import torch
        >>> from burnish.penalties import Lq
        >>> weight = torch.nn.Parameter(torch.tensor([[0.5, -0.02, 0.3]]))
        >>> optimizer = ProxGen([weight], lr=0.1, penalty=Lq(0.5, 0.05), weight_decay=0.0)
        >>> weight.grad = torch.tensor([[0.1, 0.0, -2.0]])
        >>> optimizer.step()
        >>> print(weight.tolist())
        [[0.3582..., 0.0, 0.3980...]]
    """

    has_matrix_rule = False

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float = 1e-3,
        *,
        penalty: Penalty | None = LASSO,
        preconditioner: Literal["adamw", "adam", "amsgrad", "rmsprop", "adagrad", "sgd", "momentum"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.9,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decoupled: bool | None = None,
        metric: Literal["preconditioner", "euclidean"] = "preconditioner",
        min_denominator: float = 0.0,
        nonfinite: Literal["raise", "skip"] = "raise",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "penalty": _plain(penalty),
            "strength_scale": 1.0,
            "frozen": False,
            "preconditioner": preconditioner,
            "betas": betas,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "metric": metric,
            "min_denominator": min_denominator,
            "nonfinite": nonfinite,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without a `penalty` its tensors are told apart as said above, perhaps into two groups."""
        groups = [param_group]
        tensors = param_group["params"]
        if "penalty" not in param_group and self.defaults["penalty"] and not isinstance(tensors, set):
            if "reasons" not in param_group:
                tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
                names = param_group.get("param_names")
                routed = route_tensors(zip(names, tensors, strict=True) if names else tensors).param_groups()
                shared = {key: value for key, value in param_group.items() if key not in ("params", "param_names")}
                groups = [{**group, **shared, "use_muon": group["use_muon"]} for group in routed] or groups
            groups = [group if group.get("use_muon", True) else {**group, "penalty": None} for group in groups]
        count = len(self.param_groups)
        try:
            for group in groups:
                super().add_param_group(group)
                if reasons := group.get("reasons"):
                    self._reasons[-1] = list(reasons)
        except ValueError:
            del self.param_groups[count:], self._reasons[count:]
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["preconditioner"] not in PRECONDITIONERS:
            raise ValueError(f"preconditioner={group['preconditioner']!r}: choose one of {', '.join(PRECONDITIONERS)}")
        if group["metric"] not in METRICS:
            raise ValueError(f"metric={group['metric']!r}: choose one of {', '.join(METRICS)}")
        if len(group["betas"]) != 2:
            raise ValueError(f"betas={group['betas']}: expected two numbers")
        for index, beta in enumerate(group["betas"]):
            require_number(f"betas[{index}]", beta, low=0, high=1)
        for name in ("momentum", "alpha"):
            require_number(name, group[name], low=0, high=1)
        for name in ("eps", "min_denominator", "strength_scale"):
            require_number(name, group[name], low=0)
        group["penalty"] = _plain(group["penalty"])
        if (penalty := penalty_of(group)) and not penalty.diagonal and _has_diagonal_metric(group):
            raise ValueError(
                f"{penalty} has no proximal map in the metric of {group['preconditioner']}: pass metric='euclidean', or"
                " preconditioner='sgd' or 'momentum'"
            )

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        self._refuse_shards(parameter, group)
        value = parameter.detach()
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for name in PRECONDITIONERS[group["preconditioner"]].state:
            state[name] = torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
        if parameter.dtype in HALF_PRECISION:
            state["master"] = value.to(dtype).contiguous()
        return state

    def _refuse_shards(self, parameter: Tensor, group: dict[str, Any]) -> None:
        penalty = penalty_of(group)
        if penalty is None or penalty.elementwise or not isinstance(parameter, DTensor):
            return
        for placement in parameter.placements:
            whole = type(placement) is Shard and penalty.splits_along(placement.dim, parameter.ndim)
            if not (whole or isinstance(placement, Replicate)):
                position = next(index for index, one in enumerate(group["params"]) if one is parameter)
                raise ValueError(
                    f"{tensor_name(group, position)} is sharded as {placement}, which cuts what {penalty} needs as a"
                    " whole: penalise it with Lq, or with GroupLasso along the sharded dimension"
                )

    def routing_table(self) -> Routing:
        """Which tensor has which penalty, and why; print it."""
        table = super().routing_table()
        penalties = [str(penalty_of(group) or "no penalty") for group in self.param_groups for _ in group["params"]]
        reasons = [reason for group in self._reasons for reason in group]
        routes = [
            replace(route, reason=f"{penalty}: {reason}" if reason else penalty)
            for route, penalty, reason in zip(table.routes, penalties, reasons, strict=True)
        ]
        return replace(table, routes=tuple(routes))

    def step_group(self, group: dict[str, Any], live: list[Live]) -> None:
        if group["frozen"]:
            return
        # Half-precision tensors one by one: their gradients are cast.
        for half in (False, True):
            rows = [tensor for tensor in live if ("master" in tensor.state) == half]
            for batch in [[row] for row in rows] if half else [rows] if rows else []:
                self._step_batch(group, batch)

    def _step_batch(self, group: dict[str, Any], batch: list[Live]) -> None:
        rule = PRECONDITIONERS[group["preconditioner"]]
        for one in batch:
            if "master" in one.state and not one.state["step"]:
                # The parameters may have been loaded since construction.
                one.state["master"].copy_(one.data)
        data = [one.state.get("master", one.data).contiguous() for one in batch]
        gradients = [one.gradient.to(moved.dtype).contiguous() for one, moved in zip(batch, data, strict=True)]
        state = {name: [one.state[name] for one in batch] for name in ("step", *rule.state)}
        decoupled = rule.decoupled if group["decoupled"] is None else group["decoupled"]
        if decoupled and group["weight_decay"]:
            torch._foreach_mul_(data, 1 - group["lr"] * group["weight_decay"])
        rule.step({**group, "weight_decay": 0.0} if decoupled else group, data, gradients, state)
        if penalty := penalty_of(group):
            self._shrink(penalty, group, data, state)
        for one, moved in zip(batch, data, strict=True):
            if moved is not one.data:
                one.data.copy_(moved)

    def _shrink(self, penalty: Penalty, group: dict[str, Any], data: list[Tensor], state: Columns) -> None:
        rule = PRECONDITIONERS[group["preconditioner"]]
        step = group["lr"] * group["strength_scale"]
        if group["metric"] == "euclidean" or not rule.scale:
            if group["metric"] != "euclidean" and "momentum_buffer" in rule.state:
                step = step / max(1 - group["momentum"], group["min_denominator"])
            elif group["metric"] != "euclidean":
                step = step / max(1.0, group["min_denominator"])
            _in_pieces(penalty, lambda tensors: penalty.prox_(tensors, step), data)
            return
        for count, rows in _by_count(state["step"]):
            # d = (sqrt(v) + eps root) / root: the division goes to the step.
            root = (1 - group["betas"][1] ** count) ** 0.5 if rule.corrected else 1.0

            def shrink(tensors: list[Tensor], scales: list[Tensor], root: float = root) -> None:
                # The root; on a CPU this is vectorised, and torch's own root takes twice as long.
                metric = torch._foreach_pow(scales, -0.5)
                torch._foreach_reciprocal_(metric)
                torch._foreach_add_(metric, group["eps"] * root)
                if group["min_denominator"]:
                    torch._foreach_clamp_min_(metric, group["min_denominator"] * root)
                penalty.prox_(tensors, step * root, metric)

            _in_pieces(penalty, shrink, [data[row] for row in rows], [state[rule.scale][row] for row in rows])

    @torch.no_grad()
    def penalty_value(self) -> float:
        """What the penalties add to the loss, with the strengths as they are scaled now; infinite where a constraint is
        not met. Of a sharded tensor, that of this rank's part."""
        self.complete_state()
        total = 0.0
        for group in self.param_groups:
            if (penalty := penalty_of(group)) and not group["frozen"]:
                values = [float(penalty.value(local(parameter))) for parameter in group["params"]]
                total += group["strength_scale"] * sum(values)
        return total

    def scale_strength(self, scale: float) -> None:
        """Multiply the strengths of all penalties by a number, which replaces the last one; for schedules.

        Raises:
            ValueError: it is negative.
        """
        require_number("scale", scale, low=0)
        for group in self.param_groups:
            group["strength_scale"] = float(scale)

    def has_levels(self, group: Group) -> bool:
        """Whether the penalty of a group has levels that its weights can be rounded to."""
        return hasattr(penalty_of(group), "rounded")

    @torch.no_grad()
    def freeze(self) -> int:
        """Round the tensors whose penalty has levels (`Wells`, `NearQuantized`) and train them no further.

        Returns:
            How many tensors were rounded.

        Raises:
            ValueError: no penalty has levels.
        """
        groups = [group for group in self.param_groups if self.has_levels(group)]
        if not groups:
            raise ValueError("no penalty has levels to round to: use Wells or NearQuantized")
        self.complete_state()
        for group in groups:
            penalty: Any = penalty_of(group)
            for parameter in [] if group["frozen"] else group["params"]:
                held = self.state[parameter].get("master", parameter.detach())
                local(held).copy_(penalty.rounded(local(held)))
                parameter.copy_(held)
            group["frozen"] = True
        return sum(len(group["params"]) for group in groups)


def penalty_of(group: Group) -> Penalty | None:
    """The penalty of a group of `ProxGen`, where it is written as plain numbers so that a state can hold it."""
    return restore(group["penalty"]) if group["penalty"] else None


def _plain(penalty: Any) -> dict[str, Any] | None:
    if penalty is None or isinstance(penalty, Mapping):
        return None if penalty is None else restore(penalty).to_dict()
    if not isinstance(penalty, Penalty):
        raise ValueError(f"penalty={penalty!r}: expected one of burnish.penalties, such as Lq(0.5, 1e-4), or None")
    if type(penalty).shrink_ is Penalty.shrink_:
        raise ValueError(f"{type(penalty).__name__} has no proximal map: define its shrink_")
    return penalty.to_dict()


def _has_diagonal_metric(group: Group) -> bool:
    return group["metric"] == "preconditioner" and bool(PRECONDITIONERS[group["preconditioner"]].scale)


def _in_pieces(penalty: Penalty, kernel: Callable[..., None], *columns: list[Tensor]) -> None:
    """Pieces that fit the cache where numbers are independent; else tensor by tensor, so that one has a copy."""
    if penalty.elementwise:
        sweep(kernel, *columns)
        return
    for row in zip(*columns, strict=True):
        kernel(*([tensor] for tensor in row))


def _by_count(steps: list[Tensor]) -> Iterator[tuple[int, list[int]]]:
    """Positions of tensors by how many steps they have taken; those without a gradient stay behind."""
    counts: dict[int, list[int]] = {}
    for row, step in enumerate(steps):
        counts.setdefault(int(step), []).append(row)
    yield from counts.items()
