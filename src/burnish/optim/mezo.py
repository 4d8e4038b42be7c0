"""MeZO: fine-tune with forward passes only, in the memory of inference.

    z ~ N(0, I) from a seed;   g = (L(theta + eps z) - L(theta - eps z)) / (2 eps);   theta <- theta - lr g z

A step is measured (`measure`: evaluations at displaced weights, which give a record of a few numbers) and then applied
(`apply`: the weights follow from the record alone). That is why a run can be replayed from its log of scalars.

Source: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, arXiv 2305.17333; the released code for
the order of operations. Exact restoring, the log and the other estimates are ours where nothing else is said.
"""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from burnish.errors import TrainingError
from burnish.optim.base import NONFINITE, require_number, tensor_name
from burnish.optim.blocks import Block, BlockSchedule, derived_seed, embedding_tensors
from burnish.optim.perturbation import Direction, Gaussian, Perturbation, Row, noise_layout, row
from burnish.optim.random_state import RandomState
from burnish.optim.trajectory import FORMAT, Header, Record, TrajectoryWriter, fingerprint

UPDATES = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
ESTIMATES = ("central", "forward", "leave-one-out")
RANDOMNESS = ("refuse", "common")

Closure = Callable[[], Any]


class MeZO(Optimizer):
    """Zeroth-order optimizer: it needs a function that returns a loss, and no gradient.

    `step(closure)` calls the closure two times or more and moves the weights. The loss may be anything that is a
    number: accuracy, F1 of generated text. Dropout must be off (`model.eval()`).

    Args:
        params: a model (its tensors that require grad; those of one dimension are not decayed), (name, tensor) pairs,
            tensors, or groups.
        lr: 1e-7 to 1e-6 for all weights of a large model, 1e-5 to 1e-4 for LoRA.
        eps: how far the weights are displaced; 1e-3 for all weights, 1e-2 for LoRA.
        update: "sgd" as in the paper, "momentum" or "adam"; the latter two keep one and two float32 numbers a weight.
        momentum: of "momentum".
        betas, adam_eps: of "adam".
        weight_decay: decoupled, times lr.
        queries: directions a step, whose estimates are averaged.
        estimate: "central" looks both ways along each direction (2 evaluations a query); "forward" looks one way and
            once at the weights themselves (1 a query, and 1); "leave-one-out" compares the queries with one another
            (1 a query, 2 queries or more).
        perturbation: how directions are drawn, see `burnish.optim.perturbation`.
        copy: keep a copy of the weights in float32 (float64), from which they are displaced, updated and restored
            exactly. Without it weights are moved there and back in place, as published: the memory of inference, exact
            up to rounding, which in half precision is larger than the steps. "auto" copies for half precision only.
        keep_noise: hold the numbers of a step instead of drawing them again for each pass (one float32 number a
            perturbed weight and query).
        clip: largest magnitude of g; None leaves it.
        seed: all directions follow from it, the step and the query; no global random state is read or changed.
        randomness: a closure that draws random numbers compares two different draws: "refuse" it, or give all
            evaluations of a step "common" numbers.
        nonfinite: "raise" where a loss is NaN or infinite (the weights stay), or "skip" the step.
        log: file that gets one JSON line a step, see `burnish.optim.trajectory`; it continues a file that is there.
        base: what the untouched rest of the model is, for the header of the log (a checkpoint's hash).
        process_group: losses are averaged over its ranks, which hold equal weights: data parallel at the price of one
            number.

    Raises:
        ValueError: an option out of range; a tensor that is integer, complex, sparse or a `DTensor`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        update: Literal["sgd", "momentum", "adam"] = "sgd",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        queries: int = 1,
        estimate: Literal["central", "forward", "leave-one-out"] = "central",
        perturbation: Perturbation | None = None,
        copy: bool | Literal["auto"] = "auto",
        keep_noise: bool = False,
        clip: float | None = None,
        seed: int = 0,
        randomness: Literal["refuse", "common"] = "refuse",
        nonfinite: Literal["raise", "skip"] = "raise",
        log: str | os.PathLike[str] | None = None,
        base: str = "",
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.options: dict[str, Any] = {
            "eps": eps,
            "update": update,
            "momentum": momentum,
            "betas": list(betas),
            "adam_eps": adam_eps,
            "queries": queries,
            "estimate": estimate,
            "copy": copy,
            "keep_noise": keep_noise,
            "clip": clip,
            "seed": seed,
        }
        self._check_options(randomness, nonfinite)
        self.perturbation = Gaussian() if perturbation is None else perturbation
        if copy is False and self.perturbation.unperturbed:
            raise ValueError(
                f"copy=False: {self.perturbation} looks at the weights while they are displaced: leave copy out"
            )
        self.randomness, self.nonfinite = randomness, nonfinite
        self.process_group, self.base = process_group, base
        self._log = None if log is None else TrajectoryWriter(log)
        self._bases: dict[int, tuple[int, tuple[Tensor, ...]]] = {}
        self._pending: Record | None = None
        self._displaced: tuple[Direction, float] | None = None
        self._directions: list[Direction] = []
        self._embeddings = embedding_tensors(params) if isinstance(params, nn.Module) else None
        if isinstance(params, nn.Module):
            params = _model_groups(params, weight_decay)
        defaults = {"lr": lr, "weight_decay": weight_decay, "step": 0, "algorithm": type(self).__name__}
        super().__init__(cast(Any, params), defaults)
        self.blocks = self._partition()
        self.schedule = self._schedule()
        self._turn: int | None = None
        self._versions: dict[int, int] = {}

    def _check_options(self, randomness: str, nonfinite: str) -> None:
        options = self.options
        for name, known in (("update", tuple(UPDATES)), ("estimate", ESTIMATES)):
            if options[name] not in known:
                raise ValueError(f"{name}={options[name]!r}: choose one of {', '.join(known)}")
        for name, value, known in (("randomness", randomness, RANDOMNESS), ("nonfinite", nonfinite, NONFINITE)):
            if value not in known:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(known)}")
        require_number("eps", options["eps"], low=0, open_low=True)
        require_number("momentum", options["momentum"], low=0, high=1)
        for index, beta in enumerate(options["betas"]):
            require_number(f"betas[{index}]", beta, low=0, high=1)
        require_number("adam_eps", options["adam_eps"], low=0)
        if options["copy"] not in (True, False, "auto"):
            raise ValueError(f"copy={options['copy']!r}: choose True, False or 'auto'")
        if options["clip"] is not None:
            require_number("clip", options["clip"], low=0, open_low=True)
        least = 2 if options["estimate"] == "leave-one-out" else 1
        if options["queries"] < least:
            raise ValueError(f"queries={options['queries']}: expected {least} or more for {options['estimate']!r}")

    def _partition(self) -> tuple[Block, ...]:
        tensors = self.tensors()
        return (Block("all", tuple(range(len(tensors))), sum(tensor.numel() for tensor in tensors)),)

    def _schedule(self) -> BlockSchedule:
        return BlockSchedule(len(self.blocks), "ascending", 1, self.options["seed"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only while the optimizer is built, because blocks follow from all tensors."""
        if hasattr(self, "blocks"):
            raise ValueError("blocks follow from all tensors: give all groups when the optimizer is built")
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        require_number("lr", group["lr"], low=0)
        require_number("weight_decay", group["weight_decay"], low=0)
        for position, tensor in enumerate(group["params"]):
            if isinstance(tensor, DTensor):
                raise ValueError(
                    f"{tensor_name(group, position, number)} is sharded: a direction is drawn for whole tensors; use"
                    " data parallel replicas (process_group) instead"
                )
            if not tensor.is_floating_point() or tensor.layout != torch.strided:
                raise ValueError(
                    f"{tensor_name(group, position, number)} is {tensor.dtype} {tensor.layout}: real dense floating"
                    " point is expected"
                )

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which blocks count them."""
        return [tensor for group in self.param_groups for tensor in group["params"]]

    def names(self) -> list[str]:
        """Their names, or places."""
        return [
            tensor_name(group, position, None if len(self.param_groups) == 1 else number)
            for number, group in enumerate(self.param_groups)
            for position in range(len(group["params"]))
        ]

    @property
    def next_step(self) -> int:
        """Number of the step that comes next, from 0."""
        return int(self.param_groups[0]["step"])

    @property
    def active_block(self) -> Block:
        """The block that the next step perturbs."""
        return self.blocks[self.schedule.block(self.next_step)]

    def fingerprint(self) -> str:
        """Hash of the tensors as they are now: names, shapes, types and every bit."""
        return fingerprint(zip(self.names(), self.tensors(), strict=True))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model on one batch and returns the loss, a number or a tensor of one; it is called
                as often as the estimate asks. None applies what `measure` found.

        Returns:
            The mean of the evaluated losses, near the loss at the weights; None without a closure.

        Raises:
            TrainingError: a loss is not finite and `nonfinite` is "raise"; the weights are as before.
            ValueError: the closure changed the random state.
            RuntimeError: no closure, and nothing was measured.
        """
        loss = None
        if closure is not None:
            loss = self.measure(closure, restore=False).loss
        if self._pending is None:
            raise RuntimeError("nothing was measured: call step(closure), or measure(closure) before step()")
        self.apply(self._pending)
        return loss

    @torch.no_grad()
    def measure(self, closure: Closure, *, restore: bool = True) -> Record:
        """Evaluate the loss at displaced weights.

        A second call before `apply` looks along the same directions and averages, as a larger batch would.

        Args:
            closure: as in `step`.
            restore: put the weights back; False leaves that to `apply`, which must be next and saves a pass.

        Returns:
            What `apply` needs.
        """
        step = self.next_step
        number = self.schedule.block(step)
        if self._log is not None:
            self._log.begin(self.header, step)
        seed = derived_seed(self.options["seed"], step)
        if self._pending is None or not self._directions:
            self._directions = self._draw(seed, step)
        rows = self._enter(number)
        random_state = RandomState({device for device in map(_device, rows) if device.type != "cpu"})
        losses: list[float] = []

        def evaluate() -> float:
            if losses and self.randomness == "common":
                random_state.restore()
            losses.append(self._agreed(float(closure())))
            if self.randomness == "refuse" and random_state.changed():
                raise ValueError(
                    "the closure changed the random state (dropout, sampling), so that two evaluations differ by"
                    ' chance: call model.eval(), or pass randomness="common" to give both the same numbers'
                )
            return losses[-1]

        try:
            gradients = self._estimate(evaluate, rows)
            finite = all(map(math.isfinite, losses))
            if not finite:
                self._refuse_nonfinite(losses, step)
            if restore:
                self._restore(rows)
        except BaseException:
            self._restore(rows)
            raise
        lr = tuple(float(group["lr"]) for group in self.param_groups)
        found = (tuple(gradients), lr, statistics.fmean(losses)) if finite else ((), lr, None)
        record = Record(step, number, seed, *found)
        self._pending = record if self._pending is None else self._pending.merged(record)
        return self._pending

    @torch.no_grad()
    def apply(self, record: Record, *, replay: bool = False) -> None:
        """Take the step of a record.

        Args:
            record: of `measure`, or of a log; its step must be the next.
            replay: nothing was measured. Where weights are displaced in place, which rounds, that is repeated.

        Raises:
            ValueError: the record is of another step, block or number of queries.
        """
        step = self.next_step
        number = self.schedule.block(step)
        if (record.step, record.block) != (step, number):
            raise ValueError(
                f"this record is of step {record.step} and block {record.block}, but step {step} and block {number}"
                " come next"
            )
        if len(record.gradients) not in (0, self.options["queries"]):
            raise ValueError(f"this record has {len(record.gradients)} queries, not {self.options['queries']}")
        rows = self._enter(number)
        directions = self._draw(record.seed, step) if replay or not self._directions else self._directions
        moves = self._moves(record.repeats) if replay else self._way_back(directions)
        self._update(record, rows, directions, [] if _copied(rows) else moves)
        self._pending, self._displaced, self._directions = None, None, []
        self._remember(rows)
        for group in self.param_groups:
            group["step"] = step + 1
        if self._log is not None and not replay:
            self._log.append(record)

    def _enter(self, number: int) -> list[Row]:
        """Give the tensors of a block their state and take it from the others; returns the block's rows."""
        tensors = self.tensors()
        active = {index: tensors[index] for index in self.blocks[number].tensors}
        turn = self.schedule.turn(self.next_step)
        if self._turn != turn:
            self._turn = turn
            self._bases.clear()
            for tensor in tensors:
                for key in self.state[tensor].keys() - {"threshold"}:
                    del self.state[tensor][key]
                if self.next_step == 0:
                    self.state[tensor].update(self.perturbation.prepare(tensor))
        buffers = UPDATES[self.options["update"]]
        copied = self._needs_copy(active.values())
        rows = []
        for index, tensor in active.items():
            state, dtype = self.state[tensor], torch.promote_types(tensor.dtype, torch.float32)
            if copied and "copy" not in state:
                state["copy"] = tensor.detach().to(dtype, copy=True)
            elif copied and self._displaced is None and self._versions.get(index) != tensor._version:
                self._require_unchanged(index, tensor)
            for key in buffers:
                if key not in state:
                    state[key] = torch.zeros_like(tensor, dtype=dtype)
            target = tensor.detach()
            columns = [state["copy"] if copied else target, target, *(state[key] for key in buffers)]
            rows.append(row(index, columns, state, split=self.perturbation.elementwise))
        return rows

    def _require_unchanged(self, index: int, tensor: Tensor) -> None:
        """Somebody wrote to the tensor: refuse to overwrite other weights with those of the copy."""
        if not torch.equal(self.state[tensor]["copy"].to(tensor.dtype), tensor):
            raise RuntimeError(
                f"{self.names()[index]} was changed since the last step: build a new optimizer for the new weights"
            )

    def _needs_copy(self, tensors: Iterable[Tensor]) -> bool:
        if self.options["copy"] == "auto":
            halves = any(tensor.dtype.itemsize < 4 for tensor in tensors)
            return halves or len(self.blocks) > 1 or self.perturbation.unperturbed
        return bool(self.options["copy"])

    def _draw(self, seed: int, step: int) -> list[Direction]:
        slow = derived_seed(self.options["seed"], "slow", step // self.perturbation.epoch_length)
        seeds = [seed, *(derived_seed(seed, query) for query in range(1, self.options["queries"]))]
        keep = bool(self.options["keep_noise"])
        return [Direction(self.perturbation, one, slow, self._bases, keep=keep) for one in seeds]

    def _estimate(self, evaluate: Callable[[], float], rows: list[Row]) -> list[float]:
        """g along each direction: (L(+) - L(-)) / 2 eps, (L(+) - L(0)) / eps, or (L(+) - mean of the others) / eps."""
        eps, clip, directions = self.options["eps"], self.options["clip"], self._directions

        def at(direction: Direction, distance: float) -> float:
            self._displace(rows, direction, distance)
            return evaluate()

        if self.options["estimate"] == "central":
            gradients = [(at(direction, eps) - at(direction, -eps)) / (2 * eps) for direction in directions]
        elif self.options["estimate"] == "forward":
            here = evaluate()
            gradients = [(at(direction, eps) - here) / eps for direction in directions]
        else:
            ahead = [at(direction, eps) for direction in directions]
            total, others = math.fsum(ahead), len(ahead) - 1
            gradients = [(loss - (total - loss) / others) / eps for loss in ahead]
        return gradients if clip is None else [max(-clip, min(clip, gradient)) for gradient in gradients]

    def _displace(self, rows: list[Row], direction: Direction, distance: float) -> None:
        """Put the weights of the model at `distance` along a direction."""
        before = 0.0
        if self._displaced is not None:
            if self._displaced[0] is direction:
                before = self._displaced[1]
            else:
                self._restore(rows)
        self._displaced = (direction, distance)
        copied = _copied(rows)
        for (weights, target, *_), noise in zip(_pieces(rows), direction.walk(rows), strict=True):
            if copied:
                torch.add(weights, noise, alpha=distance, out=target)
            else:
                target.add_(noise, alpha=distance - before)

    def _restore(self, rows: list[Row]) -> None:
        """Put the weights of the model back."""
        if self._displaced is None:
            return
        direction, distance = self._displaced
        if _copied(rows):
            for weights, target, *_ in _pieces(rows):
                target.copy_(weights)
        else:
            for (_, target, *_), noise in zip(_pieces(rows), direction.walk(rows), strict=True):
                target.add_(noise, alpha=-distance)
        self._displaced = None
        self._remember(rows)

    def _remember(self, rows: Sequence[Row]) -> None:
        """Know the weights again, so that a change by somebody else is noticed."""
        tensors = self.tensors()
        self._versions = {one.index: tensors[one.index]._version for one in rows}

    def _moves(self, repeats: int) -> list[tuple[int, float]]:
        """(query, distance) of each time that measuring in place moves the weights along a direction, and back."""
        eps = self.options["eps"]
        path = (eps, -2 * eps, eps) if self.options["estimate"] == "central" else (eps, -eps)
        return [(query, part) for query in range(self.options["queries"]) for part in path] * repeats

    def _way_back(self, directions: Sequence[Direction]) -> list[tuple[int, float]]:
        if self._displaced is None:
            return []
        return [(query, -self._displaced[1]) for query, one in enumerate(directions) if one is self._displaced[0]]

    def _update(
        self, record: Record, rows: list[Row], directions: Sequence[Direction], moves: Sequence[tuple[int, float]]
    ) -> None:
        """Move back what is displaced, then take the step: one pass over the weights, one over the noise."""
        tensors, groups = self.tensors(), {}
        for number, group in enumerate(self.param_groups):
            for tensor in group["params"]:
                groups[id(tensor)] = (record.lr[number], group["weight_decay"])
        copied, count = _copied(rows), record.step + 1 - self.schedule.turn(record.step) * self.schedule.interval
        shares = [gradient / len(record.gradients) for gradient in record.gradients]
        options = [groups[id(tensors[one.index])] for one in rows for _ in one.pieces]
        walks = [direction.walk(rows) for direction in directions]
        for (weights, target, *buffers), (lr, decay), *noises in zip(_pieces(rows), options, *walks, strict=True):
            for query, distance in moves:
                target.add_(noises[query], alpha=distance)
            if shares:
                gradient = noises[0] * shares[0]
                for noise, share in zip(noises[1:], shares[1:], strict=True):
                    gradient.add_(noise, alpha=share)
                if decay:
                    weights.mul_(1 - lr * decay)
                weights.add_(self._step_along(gradient, buffers, count), alpha=-lr)
            if copied:
                target.copy_(weights)

    def _step_along(self, gradient: Tensor, buffers: Sequence[Tensor], count: int) -> Tensor:
        if self.options["update"] == "momentum":
            return buffers[0].mul_(self.options["momentum"]).add_(gradient)
        if self.options["update"] == "adam":
            (beta1, beta2), (first, second) = self.options["betas"], buffers
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = (second / (1 - beta2**count)).sqrt_().add_(self.options["adam_eps"])
            gradient = (first / (1 - beta1**count)).div_(scale)
        return gradient

    def _agreed(self, loss: float) -> float:
        """The mean over the ranks."""
        if self.process_group is None:
            return loss
        total = torch.tensor(loss, dtype=torch.float64, device=self.tensors()[0].device)
        dist.all_reduce(total, group=self.process_group)
        return float(total) / self.process_group.size()

    def _refuse_nonfinite(self, losses: Sequence[float], step: int) -> None:
        seen = ", ".join(f"{loss:.4g}" for loss in losses)
        if self.nonfinite == "raise":
            raise TrainingError(
                f"the losses of step {step} are {seen}; the weights are as before: lower lr or eps, or pass"
                ' nonfinite="skip" to leave such steps out'
            )
        warnings.warn(f"step {step} left out: its losses are {seen}", stacklevel=4)

    def end_log(self) -> None:
        """Write the hash of the weights as they are now as the log's last line."""
        if self._log is not None:
            self._log.begin(self.header, self.next_step)
            self._log.end(self.fingerprint())

    def header(self) -> Header:
        """What a log starts with: all that a replay needs besides the weights as they are now."""
        names = iter(self.names())
        return Header(
            format=FORMAT,
            optimizer=type(self).__name__,
            options=self.options,
            perturbation=self.perturbation.describe(),
            groups=[
                {"names": [next(names) for _ in group["params"]], "weight_decay": group["weight_decay"]}
                for group in self.param_groups
            ],
            blocks=[[self.names()[index] for index in block.tensors] for block in self.blocks],
            noise=noise_layout(self.tensors()[0].device),
            torch=torch.__version__,
            fingerprint=self.fingerprint(),
            base=self.base,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of the same optimizer for the same blocks, with the weights that belong to it.

        Raises:
            ValueError: the state was written by another kind of optimizer.
        """
        written = {group.get("algorithm", "another library") for group in state_dict["param_groups"]}
        if written != {type(self).__name__}:
            raise ValueError(
                f"this state was written by {', '.join(sorted(written))}, not by {type(self).__name__}: build the same"
                " optimizer as before, or start without its state"
            )
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        # torch casts state to the dtype of the parameter: the float32 copy of a half-precision tensor would be rounded.
        for number, tensor in zip(saved, self.tensors(), strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[tensor][key] = value.to(tensor.device, copy=True)
        self._turn = self.schedule.turn(self.next_step - 1) if self.next_step else None
        self._pending, self._displaced, self._directions = None, None, []


def _model_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Tensors to tune with their names; those of one dimension (norms, biases) are not decayed."""
    named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    if not named:
        raise ValueError("no tensor of the model requires grad: there is nothing to tune")
    if not weight_decay:
        return [{"params": named}]
    groups = [
        {"params": [(name, tensor) for name, tensor in named if (tensor.ndim > 1) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def _pieces(rows: Sequence[Row]) -> Iterator[tuple[Tensor, ...]]:
    return (columns for one in rows for columns in one.pieces)


def _copied(rows: Sequence[Row]) -> bool:
    return rows[0].copied


def _device(one: Row) -> torch.device:
    return one.pieces[0][0].device
