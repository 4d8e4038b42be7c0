"""What all optimizers here share: groups by rule, complete state from the start, gradients that are looked at first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from burnish.errors import TrainingError
from burnish.optim.elementwise import first_nonfinite, local
from burnish.optim.exchange import agree, process_groups
from burnish.optim.routing import Route, Routing, route_tensors, split_parameters

NONFINITE = ("raise", "skip")
HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Live:
    """One tensor that takes part in a step, as this rank holds it.

    Attributes:
        parameter: as the optimizer was given it.
        data, gradient: what this rank holds of it: the whole of a plain tensor, the shard of a `DTensor`.
        state: of the optimizer for it, also as this rank holds it.
    """

    parameter: Tensor
    data: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class RoutedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose groups go to the matrix rule (`use_muon`) or to the auxiliary rule.

    State is complete when the constructor returns, with the same keys on every rank, so that checkpoints do not depend
    on which tensor has had a gradient. A group may carry keys that are not ours (`initial_lr`).

    Args:
        params: a model (routed by `split_parameters`), a `Routing`, tensors or (name, tensor) pairs, or groups. Where
            no `use_muon` says otherwise, tensors of two dimensions or more go to the matrix rule.
        defaults: of the group's options.
        process_group: ranks that hold equal copies of the plain tensors (data parallel): each matrix is then
            orthogonalised by one of them and sent to the others. Leave it out for one process, and for sharded tensors.

    Raises:
        ValueError: an option out of range, a tensor twice, a tensor that is float16, complex, sparse or not floating
            point.
    """

    has_matrix_rule: ClassVar[bool] = True

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        defaults: dict[str, Any],
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.process_group = process_group
        self._reasons: list[list[str]] = []
        self._exchanges: dict[Any, Any] = {}
        if isinstance(params, nn.Module):
            params = split_parameters(params)
        self._routing = params if isinstance(params, Routing) else Routing(())
        if isinstance(params, Routing):
            params = params.param_groups()
        super().__init__(cast(Any, params), {**defaults, "algorithm": type(self).__name__})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch comes here for a copy, and for each state that is loaded: only a copy has lost what is no state.
        if "process_group" not in self.__dict__:
            # A process group cannot be copied; a copy of the optimizer works alone until it is given one.
            self.process_group = None
            self._reasons = [["" for _ in group["params"]] for group in state["param_groups"]]
            self._routing = Routing(())
            self._exchanges = {}
        super().__setstate__(state)

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse options out of range; called for each group with the defaults filled in."""
        require_number("lr", group["lr"], low=0)
        require_number("weight_decay", group["weight_decay"], low=0)
        if group["nonfinite"] not in NONFINITE:
            raise ValueError(f"nonfinite={group['nonfinite']!r}: choose one of {', '.join(NONFINITE)}")

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of one tensor before its first step."""
        raise NotImplementedError

    def step_group(self, group: dict[str, Any], live: list[Live]) -> None:
        """Take one step with the tensors of a group that have a gradient."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without `use_muon` its tensors are routed by their dimensions, perhaps into two groups."""
        groups = [param_group]
        if self.has_matrix_rule and "use_muon" not in param_group and not isinstance(param_group["params"], set):
            tensors = param_group["params"]
            tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            names = param_group.get("param_names")
            named = list(zip(names, tensors, strict=True)) if names else tensors
            shared = {key: value for key, value in param_group.items() if key not in ("params", "param_names")}
            groups = [group | shared for group in route_tensors(named).param_groups()] or [param_group]
        count = len(self.param_groups)
        try:
            for group in groups:
                self._add_group({"use_muon": False, **group})
        except ValueError:
            del self.param_groups[count:], self._reasons[count:]
            raise

    def _add_group(self, group: dict[str, Any]) -> None:
        reasons = group.pop("reasons", None)
        if not self.has_matrix_rule:
            group, reasons = group | {"use_muon": False}, None
        if not group["use_muon"] and "lr" not in group and self.defaults.get("auxiliary_lr") is not None:
            group["lr"] = self.defaults["auxiliary_lr"]
        self._refuse_second_group(group)
        super().add_param_group(group)
        added = self.param_groups[-1]
        self._check_tensors(added)
        self.check_group(added)
        default = "its group says so" if self.has_matrix_rule else "the only rule"
        self._reasons.append(reasons or [default] * len(added["params"]))
        for parameter in added["params"]:
            self.state[parameter] = self.create_state(parameter, added)

    def _refuse_second_group(self, group: dict[str, Any]) -> None:
        taken = {id(tensor): tensor_name(other, position, number) for number, other in enumerate(self.param_groups)
                 for position, tensor in enumerate(other["params"])}  # fmt: skip
        tensors = group["params"] if isinstance(group["params"], (list, tuple)) else [group["params"]]
        for one in tensors:
            if name := taken.get(id(one[1] if isinstance(one, tuple) else one)):
                raise ValueError(f"{name} is given again in another group: give each tensor to one group")

    def _check_tensors(self, group: dict[str, Any]) -> None:
        seen: set[int] = set()
        for position, parameter in enumerate(group["params"]):
            name = tensor_name(group, position)
            if id(parameter) in seen:
                raise ValueError(f"{name} is twice in one group: give each tensor once")
            seen.add(id(parameter))
            if parameter.is_complex() or not parameter.is_floating_point() or parameter.layout != torch.strided:
                raise ValueError(
                    f"{name} is {parameter.dtype} {parameter.layout}: real dense floating point is expected"
                )
            if parameter.dtype == torch.float16:
                raise ValueError(
                    f"{name} is float16, where small updates round away: keep float32 parameters and use autocast"
                    " (Trainer: fp16=True), or bfloat16 parameters"
                )
            if group["use_muon"] and parameter.ndim < 2:
                raise ValueError(
                    f"{name} has shape {list(parameter.shape)}: the matrix rule needs two dimensions or more"
                )

    def routing_table(self) -> Routing:
        """Which tensor goes to which rule, and why; print it."""
        routes = [
            Route(
                tensor_name(group, position, number),
                parameter,
                "matrix" if group["use_muon"] else "auxiliary",
                reason,
                group.get("layout", "batch"),
                group.get("transposed", False),
                tuple(group.get("splits", ())),
            )
            for number, (group, reasons) in enumerate(zip(self.param_groups, self._reasons, strict=True))
            for position, (parameter, reason) in enumerate(zip(group["params"], reasons, strict=True))
        ]
        return replace(self._routing, routes=tuple(routes))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            TrainingError: a gradient is not finite and the group says `nonfinite="raise"`; nothing was changed.
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.complete_state()
        live = self._gather_live()
        if live is not None:
            for group, tensors in zip(self.param_groups, live, strict=True):
                self.step_group(group, tensors)
        return loss

    def complete_state(self) -> None:
        """Give state to tensors that took the place of others since construction (a wrapper sharded the model), or that
        moved to another device, and forget what belonged to the others."""
        present = {parameter for group in self.param_groups for parameter in group["params"]}
        for orphan in [parameter for parameter in self.state if parameter not in present]:
            del self.state[orphan]
            self._exchanges.clear()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(self.create_state(parameter, group))
                for key, value in state.items():
                    if value.device != parameter.device and value.ndim:
                        state[key] = value.to(parameter.device)

    def _gather_live(self) -> list[list[Live]] | None:
        """Tensors with a gradient, by group; None where the step is to be skipped. Ranks of a group agree."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [None if parameter.grad is None else local(parameter.grad) for parameter in parameters]
        for gradient in gradients:
            if gradient is not None and gradient.layout != torch.strided:
                raise RuntimeError(f"a gradient is {gradient.layout}: only dense gradients are supported")
        groups = process_groups(parameters) + ([self.process_group] if self.process_group is not None else [])
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        bad = first_nonfinite([gradients[index] for index in there])  # type: ignore[misc]
        flags = [int(gradient is not None) for gradient in gradients]
        *present, broken = agree([*flags, int(bad is not None)], groups, parameters[0].device)
        if broken:
            self._refuse_nonfinite(None if bad is None else there[bad])
            return None
        live, start = [], 0
        for group in self.param_groups:
            rows = []
            for parameter, offset in zip(group["params"], range(start, start + len(group["params"])), strict=True):
                if present[offset]:
                    data, gradient = local(parameter.detach()), gradients[offset]
                    # Another rank has a gradient for its share of this tensor: here it is zero.
                    gradient = torch.zeros_like(data) if gradient is None else gradient.detach()
                    state = {key: local(value) for key, value in self.state[parameter].items()}
                    rows.append(Live(parameter, data, gradient.neg() if group["maximize"] else gradient, state))
            start += len(group["params"])
            live.append(rows)
        return live

    def _refuse_nonfinite(self, index: int | None) -> None:
        names = [tensor_name(group, position, number) for number, group in enumerate(self.param_groups)
                 for position in range(len(group["params"]))]  # fmt: skip
        where = "of another rank" if index is None else f"of {names[index]}"
        if any(group["nonfinite"] == "raise" for group in self.param_groups):
            raise TrainingError(
                f"the gradient {where} holds a NaN or an infinity; nothing was changed: lower lr, clip gradients, or"
                ' pass nonfinite="skip" to leave such steps out'
            )
        warnings.warn(f"step left out: the gradient {where} holds a NaN or an infinity", stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """State and options, complete from construction on; see `torch.optim.Optimizer.state_dict`."""
        self.complete_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of the same kind of optimizer.

        Raises:
            ValueError: the state was written by another kind of optimizer, or for other tensors.
        """
        written = {group.get("algorithm", "another library") for group in state_dict["param_groups"]}
        if written - {type(self).__name__}:
            raise ValueError(
                f"this state was written by {', '.join(sorted(written))}, not by {type(self).__name__}: build the same"
                " optimizer as before, or start without its state"
            )
        self.complete_state()
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        fresh = [dict(self.state[parameter]) for parameter in parameters]
        for number, mine in zip(saved, fresh, strict=False):
            if (keys := state_dict["state"].get(number, {}).keys()) != mine.keys():
                raise ValueError(
                    f"the state of tensor {number} holds {', '.join(sorted(keys))}, but {', '.join(sorted(mine))} is"
                    " expected: build the same optimizer for weights of the same dtype as before, or start without it"
                )
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of the parameter: the float32 average of a bfloat16 tensor would be rounded.
        for number, parameter, mine in zip(saved, parameters, fresh, strict=True):
            for key, value in state_dict["state"][number].items():
                if self.state[parameter][key].dtype != mine[key].dtype:
                    self.state[parameter][key] = value.to(mine[key], copy=True)


def require_number(
    name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = True
) -> None:
    """Refuse a number outside of an interval.

    Raises:
        ValueError: naming the option, the value and the interval.
    """
    inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    if not inside:
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise ValueError(f"{name}={value}: expected a number in {interval}")


def tensor_name(group: dict[str, Any], position: int, number: int | None = None) -> str:
    """The name a tensor was given with, or its place."""
    names: Sequence[str] = group.get("param_names") or ()
    if names:
        return names[position]
    return f"tensor {position}" + ("" if number is None else f" of group {number}")
