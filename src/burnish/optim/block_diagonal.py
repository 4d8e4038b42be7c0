"""Adam, Adagrad and RMSprop with the full second moment of small blocks of weights in place of its diagonal."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from burnish.optim.base import Live, RoutedOptimizer, require_number, tensor_name
from burnish.optim.grouping import GROUPINGS, LARGEST_BLOCK, REMAINDERS, Grouping, group_coordinates
from burnish.optim.inverse_root import METHODS, inverse_root, reciprocal, spectrum
from burnish.optim.routing import Routing
from burnish.optim.symmetric import add_outer_products, diagonals, fold, triangle, unfold

FORMS = ("adam", "adagrad", "rmsprop")
EPS_FORMS = ("torch", "paper")
# A block whose moments have seen fewer gradients than twice its size knows little or nothing of some directions, and
# a root kept from then on would send the next gradients far along them.
STEPS_UNTIL_KEPT = 2
# Numbers of second moments that are decomposed at once: bounds the float64 copies.
CPU_WORKING_SET = 2**18
GPU_WORKING_SET = 2**26

# What the state holds of each block of a size.
WIDTHS: dict[str, Callable[[int], int]] = {
    "second_moment": triangle,
    "exp_avg": lambda size: size,
    "inverse_root": triangle,
    "eigenvectors": lambda size: size**2,
    "roots": lambda size: size,
}
KEPT = ("inverse_root", "eigenvectors", "roots")

Rule = str | Callable[[str, Tensor], str]


@dataclass(frozen=True)
class SpectrumClip:
    """Bounds of every eigen-step that close upon one number, so that training ends as SGD with averaged momentum.

    With f = final_lr * lr / (first lr), step t: f (1 - 1 / (gamma t + 1)) and f (1 + 1 / (gamma t)).

    Attributes:
        final_lr: the lr of that SGD, while lr is the first one; the step of a constant gradient, as momentum is an
            average.
        gamma: how fast they close: at step 1 / gamma they are half and twice final_lr.

    Source: arXiv 1905.10757, the authors' code; the bounds are those of AdaBound (arXiv 1902.09843).
    """

    final_lr: float = 0.1
    gamma: float = 1e-3

    def bounds(self, step: int) -> tuple[float, float]:
        """Lowest and highest eigen-step over f, `step` counted from 1.

        Examples:
            >>> [tuple(round(bound, 3) for bound in SpectrumClip(gamma=1e-3).bounds(step)) for step in (1, 100, 10_000)]
            [(0.001, 1001.0), (0.091, 11.0), (0.909, 1.1)]
        """
        return 1 - 1 / (self.gamma * step + 1), 1 + 1 / (self.gamma * step)


@dataclass(frozen=True)
class EigenSteps:
    """From a corrected root r to the step along its eigenvector: alpha / (r + eps), within bounds.

    Attributes:
        alpha: lr, over the bias correction of momentum where there is one.
        correction: what roots of V are multiplied by before.
        eps: added to corrected roots.
        low, high: bounds.
    """

    alpha: float
    correction: float
    eps: float
    low: float = 0.0
    high: float = math.inf

    def __call__(self, roots: Tensor) -> Tensor:
        return (reciprocal(roots + self.eps) * self.alpha).clamp(self.low, self.high)


class BlockDiagonal(RoutedOptimizer):
    """Adam, Adagrad or RMSprop whose second moment is a full matrix for each small block of weights.

    A block of b weights moves by alpha (V^(1/2) + eps I)^(-1) m, V the b x b second moment of its gradient: unlike Adam
    it sees how the gradients of neighbouring weights go together. Blocks of one are the diagonal optimizer of torch,
    one block of everything is the full-matrix one. Second moments take (block_size + 1) / 2 numbers for each weight.

    Args:
        params: a model, a `Routing`, tensors, (name, tensor) pairs, or groups.
        lr: as for the diagonal optimizer.
        form: "adam": V = beta2 V + (1 - beta2) g g', momentum, both corrected; "rmsprop": V as before, no momentum, no
            correction; "adagrad": V += g g', no momentum.
        betas: of momentum and second moment.
        eps: added to the roots of V.
        weight_decay: decoupled: `p *= 1 - lr * weight_decay` before the step.
        block_size: weights of a block, 1 to 1,024.
        grouping: "auto", "input", "output", "filter", "fixed", "diagonal" (see `burnish.optim.grouping`), or a function
            of (name, tensor) that returns one of them.
        remainder: "refuse" a size that does not divide the weights of a neuron, or give each a "smaller" last block.
        update_every: steps for which an inverse root is kept once twice `block_size` steps have been taken; second
            moments are updated at each. Keeps as many numbers again, with clip twice as many.
        layers_per_step: so many tensors, drawn at random at each step, take the step of their blocks, the others that
            of the diagonals of the same second moments; None for all.
        seed: of those draws; they depend on it and on the number of the step.
        clip: a `SpectrumClip`; None for none.
        root: "eigh"; "newton-schulz" (matrix products, without clip); "auto": products on a GPU where nothing is
            clipped.
        eps_form: "torch": eps is added after the bias correction of V; "paper": before it, so that it counts
            eps / sqrt(1 - beta2^t).
        nonfinite: "raise" at a NaN in a gradient, or "skip" the step.
        maximize: go up instead of down.

    Attributes:
        fallbacks: blocks whose decomposition failed and which took the diagonal step, counted over blocks and steps.

    Raises:
        ValueError: an option out of range, a block size that does not divide, a `DTensor`, see `RoutedOptimizer`.

    Source: arXiv 1905.10757 (AdaBlock) and its code: the update, input neurons, filters, the random layers (RadaBlock)
    and clipping. Ours: neurons never share a block, the shift in `burnish.optim.inverse_root`, kept roots, `eps_form`.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1, 4))
        >>> optimizer = BlockDiagonal([weight], lr=0.1, block_size=2, grouping="output")
        >>> weight.grad = torch.tensor([[3.0, 4.0, 1.0, 0.0]])
        >>> optimizer.step()  # the first step of a block has the length lr
        >>> [round(value, 4) for value in weight[0].tolist()]
        [-0.06, -0.08, -0.1, 0.0]
    """

    has_matrix_rule = False
    fallbacks: int = 0

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float = 1e-3,
        *,
        form: Literal["adam", "adagrad", "rmsprop"] = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        block_size: int = 10,
        grouping: Rule = "auto",
        remainder: Literal["refuse", "smaller"] = "refuse",
        update_every: int = 1,
        layers_per_step: int | None = None,
        seed: int = 0,
        clip: SpectrumClip | None = None,
        root: Literal["auto", "eigh", "newton-schulz"] = "auto",
        eps_form: Literal["torch", "paper"] = "torch",
        nonfinite: Literal["raise", "skip"] = "raise",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "form": form,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "grouping": grouping,
            "remainder": remainder,
            "update_every": update_every,
            "layers_per_step": layers_per_step,
            "seed": seed,
            "draws": 0,
            "clip": clip,
            "root": root,
            "eps_form": eps_form,
            "nonfinite": nonfinite,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        if layers_per_step is not None and layers_per_step > len(self._drawable()):
            raise ValueError(
                f"layers_per_step={layers_per_step}: only {len(self._drawable())} tensors have blocks of more than one"
                " weight: choose fewer, or leave it out"
            )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        choices = {"form": FORMS, "remainder": REMAINDERS, "root": METHODS, "eps_form": EPS_FORMS}
        for name, known in choices.items():
            if group[name] not in known:
                raise ValueError(f"{name}={group[name]!r}: choose one of {', '.join(known)}")
        if len(group["betas"]) != 2:
            raise ValueError(f"betas={group['betas']}: expected two numbers")
        for index, beta in enumerate(group["betas"]):
            require_number(f"betas[{index}]", beta, low=0, high=1)
        require_number("eps", group["eps"], low=0)
        _require_whole("block_size", group["block_size"], 1, LARGEST_BLOCK)
        _require_whole("update_every", group["update_every"], 1)
        if group["layers_per_step"] is not None:
            _require_whole("layers_per_step", group["layers_per_step"], 0)
            if group["update_every"] > 1:
                raise ValueError(
                    f"layers_per_step={group['layers_per_step']} with update_every={group['update_every']}: both save"
                    " decompositions; choose one"
                )
        if group["layers_per_step"] != self.defaults["layers_per_step"]:
            raise ValueError(
                f"layers_per_step={group['layers_per_step']} of a group: it is drawn over all groups; pass it to the"
                " optimizer"
            )
        self._check_clip(group)
        rule, names = group["grouping"], [tensor_name(group, index) for index in range(len(group["params"]))]
        rules = [rule(*pair) if callable(rule) else rule for pair in zip(names, group["params"], strict=True)]
        for one in rules:
            if one not in GROUPINGS:
                raise ValueError(f"grouping={one!r}: choose one of {', '.join(GROUPINGS)}")
        # Resolved to names, which a checkpoint can hold.
        group["grouping"] = rules
        _groupings(group)

    def _check_clip(self, group: dict[str, Any]) -> None:
        clip = group["clip"]
        if clip is None:
            return
        if not isinstance(clip, SpectrumClip):
            raise ValueError(f"clip={clip!r}: expected a SpectrumClip, or None")
        require_number("final_lr", clip.final_lr, low=0, open_low=True)
        require_number("gamma", clip.gamma, low=0, open_low=True)
        if group["root"] == "newton-schulz":
            raise ValueError(
                "root='newton-schulz' with clip: products give no eigenvalues to clip: choose root='eigh', or no clip"
            )
        require_number("lr (of a group with clip)", group["lr"], low=0, open_low=True)
        # As plain numbers, which a checkpoint can hold; bounds follow lr relative to the first one.
        group["clip"] = (clip.final_lr, clip.gamma, group["lr"])

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        position = next(index for index, one in enumerate(group["params"]) if one is parameter)
        grouping = _grouping(group, position)
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{tensor_name(group, position)} is a DTensor: a block may lie on two ranks, so it takes whole tensors"
                " alone: use DDP, or an optimizer that knows shards (Muon, AMUSE, schedule-free)"
            )
        zeros = functools.partial(
            torch.zeros, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device
        )
        kept = group["update_every"] > 1 and grouping.block > 1
        names = ["second_moment", *(["exp_avg"] if group["form"] == "adam" else [])]
        names += (["eigenvectors", "roots"] if group["clip"] else ["inverse_root"]) if kept else []
        state = {name: zeros(grouping.numbers(WIDTHS[name])) for name in names}
        state["step"] = torch.zeros((), dtype=torch.float32)
        return state

    def step_group(self, group: dict[str, Any], live: list[Live]) -> None:
        groupings = dict(zip(map(id, group["params"]), _groupings(group), strict=True))
        drawn = self._draw()
        batches: dict[Any, list[tuple[Live, Grouping]]] = {}
        for tensor in live:
            tensor.state["step"] += 1
            together = drawn is None or id(tensor.parameter) in drawn
            key = (int(tensor.state["step"]), together, tensor.data.device, tensor.state["second_moment"].dtype)
            batches.setdefault(key, []).append((tensor, groupings[id(tensor.parameter)]))
        for (step, together, *_), tensors in batches.items():
            self._move(group, tensors, step, together=together)
        if group is self.param_groups[-1]:
            for each in self.param_groups:
                each["draws"] += 1

    def _drawable(self) -> list[int]:
        """Tensors, by id, that have blocks of more than one weight."""
        return [
            id(parameter)
            for group in self.param_groups
            for parameter, grouping in zip(group["params"], _groupings(group), strict=True)
            if grouping.block > 1
        ]

    def _draw(self) -> set[int] | None:
        """Tensors, by id, whose blocks are used at this step; None for all. The same for all groups of a step."""
        first = self.param_groups[0]
        if first["layers_per_step"] is None:
            return None
        drawable = self._drawable()
        # Of the number of the step alone: there is no state of a generator to save, and all ranks draw the same. The
        # factor, near 2^32 over the golden ratio, keeps seeds apart in the 32 bits that a CPU generator takes.
        draw = torch.Generator().manual_seed((first["seed"] * 2_654_435_761 + first["draws"]) % 2**32)
        return {drawable[index] for index in torch.randperm(len(drawable), generator=draw)[: first["layers_per_step"]]}

    def _move(self, group: dict[str, Any], tensors: list[tuple[Live, Grouping]], step: int, *, together: bool) -> None:
        """Take step number `step` of tensors, with their blocks or with the diagonals of these."""
        if group["weight_decay"]:
            torch._foreach_mul_([tensor.data for tensor, _ in tensors], 1 - group["lr"] * group["weight_decay"])
        # Momenta, one part for each size of block in a tensor, which become steps in place.
        moving = [(tensor, grouping, _update_moments(group, tensor, grouping)) for tensor, grouping in tensors]
        sizes: dict[int, list[tuple[Tensor, ...]]] = {}
        for tensor, grouping, parts in moving:
            names = ("second_moment", *(name for name in KEPT if name in tensor.state))
            for row in zip(parts, *(_blocks(tensor, grouping, name) for name in names), strict=True):
                sizes.setdefault(row[0].shape[1], []).append(row)
        steps = _eigen_steps(group, step)
        for size, rows in sizes.items():
            if size > 1 and together:
                for parts, moments, *cache in _pieces(rows, size):
                    self._move_blocks(group, steps, step, parts, moments, cache)
            else:
                for part, second, *_ in rows:
                    part.mul_(steps(diagonals(second, size).sqrt() * steps.correction))
        for tensor, grouping, parts in moving:
            tensor.data.sub_(grouping.scatter(parts))

    def _move_blocks(
        self,
        group: dict[str, Any],
        steps: EigenSteps,
        step: int,
        parts: list[Tensor],
        moments: list[Tensor],
        cache: list[list[Tensor]],
    ) -> None:
        """Turn the momenta of some blocks of one size [count, size] into steps."""
        size = parts[0].shape[1]
        fresh = step <= STEPS_UNTIL_KEPT * size or (step - 1) % group["update_every"] == 0
        momentum = torch.cat(parts).double().unsqueeze(-1)  # [count, size, 1]
        if group["clip"]:
            if fresh:
                vectors, roots, failed = spectrum(unfold(torch.cat(moments), size))
                roots.mul_(steps.correction)
                self._keep(cache, vectors.flatten(1), roots)
                self._report(failed, len(momentum))
            else:
                vectors, roots = (torch.cat(views).double() for views in cache)
                vectors = vectors.view(-1, size, size)
            moved = vectors @ (steps(roots).unsqueeze(-1) * (vectors.mT @ momentum))
        else:
            if fresh:
                products = group["root"] == "newton-schulz" or (group["root"] == "auto" and momentum.is_cuda)
                inverse, failed = inverse_root(
                    unfold(torch.cat(moments), size),
                    scale=steps.correction,
                    eps=steps.eps,
                    method="newton-schulz" if products else "eigh",
                )
                self._keep(cache, fold(inverse))
                self._report(failed, len(momentum))
            else:
                inverse = unfold(torch.cat(cache[0]), size).double()
            moved = (inverse @ momentum).mul_(steps.alpha)
        _deal(moved.squeeze(-1), parts)

    def _keep(self, cache: list[list[Tensor]], *factors: Tensor) -> None:
        if cache:
            for factor, views in zip(factors, cache, strict=True):
                _deal(factor, views)

    def _report(self, failed: int, count: int) -> None:
        if failed and not self.fallbacks:
            warnings.warn(
                f"{failed} of {count} blocks have no eigendecomposition (gradients too large for their dtype?): they"
                " take the diagonal step; BlockDiagonal.fallbacks counts them",
                stacklevel=8,
            )
        self.fallbacks += failed


def state_bytes(params: nn.Module | Routing | Iterable[Any], **options: Any) -> int:
    """Bytes of the state of `BlockDiagonal(params, **options)`, without making it.

    For float32 tensors and the Adam form 4 (1 + (block_size + 1) / 2) for each weight, where Adam has 8; with
    `update_every` above 1 another 4 (block_size + 1) / 2, or 4 (block_size + 1) if clipped.

    Examples:
        >>> state_bytes(nn.Linear(64, 64, bias=False), block_size=8) - 4  # one number counts the steps
        90112
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = BlockDiagonal(params, **options).state
        return sum(value.nbytes for values in state.values() for value in values.values())


def _require_whole(name: str, value: Any, low: int, high: float = math.inf) -> None:
    if value != int(value) or not low <= value <= high:
        upper = f"to {high}" if high < math.inf else "on"
        raise ValueError(f"{name}={value}: choose a whole number from {low} {upper}")


def _grouping(group: dict[str, Any], position: int) -> Grouping:
    return group_coordinates(
        tuple(group["params"][position].shape),
        group["grouping"][position],
        int(group["block_size"]),
        remainder=group["remainder"],
        kernel=group.get("layout") == "flatten",
        transposed=bool(group.get("transposed", False)),
        name=tensor_name(group, position),
    )


def _groupings(group: dict[str, Any]) -> list[Grouping]:
    """The grouping of each tensor of a group."""
    return [_grouping(group, position) for position in range(len(group["params"]))]


def _eigen_steps(group: dict[str, Any], step: int) -> EigenSteps:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    corrected = group["form"] == "adam"
    alpha = lr / (1 - beta1**step) if corrected else lr
    correction = 1 / math.sqrt(1 - beta2**step) if corrected else 1.0
    eps = group["eps"] * correction if group["eps_form"] == "paper" else group["eps"]
    if not group["clip"]:
        return EigenSteps(alpha, correction, eps)
    final_lr, gamma, first_lr = group["clip"]
    low, high = SpectrumClip(final_lr, gamma).bounds(step)
    limit = final_lr * lr / first_lr
    return EigenSteps(alpha, correction, eps, limit * low, limit * high)


def _update_moments(group: dict[str, Any], tensor: Live, grouping: Grouping) -> list[Tensor]:
    """Update both moments with the gradient; copies of the momentum, as blocks [count, size]."""
    gradients = grouping.gather(tensor.gradient.to(tensor.state["second_moment"].dtype))
    beta1, beta2 = group["betas"]
    kept, taken = (1.0, 1.0) if group["form"] == "adagrad" else (beta2, 1 - beta2)
    for moments, gradient in zip(_blocks(tensor, grouping, "second_moment"), gradients, strict=True):
        add_outer_products(moments, gradient, kept=kept, taken=taken)
    if group["form"] != "adam":
        return [gradient.clone() for gradient in gradients]
    momenta = _blocks(tensor, grouping, "exp_avg")
    torch._foreach_lerp_(momenta, gradients, 1 - beta1)
    return [momentum.clone() for momentum in momenta]


def _blocks(tensor: Live, grouping: Grouping, name: str) -> list[Tensor]:
    """What the state holds for the blocks of each part, as views."""
    return grouping.split(tensor.state[name], WIDTHS[name])


def _pieces(rows: list[tuple[Tensor, ...]], size: int) -> Iterator[tuple[list[Tensor], ...]]:
    """Rows of tensors of one length each, cut and put together to bounded batches of blocks; a list for each column."""
    limit = max(1, (CPU_WORKING_SET if rows[0][0].device.type == "cpu" else GPU_WORKING_SET) // size**2)
    batch: list[tuple[Tensor, ...]] = []
    count = 0
    for row in rows:
        for views in zip(*(torch.split(tensor, limit) for tensor in row), strict=True):
            if batch and count + len(views[0]) > limit:
                yield tuple(map(list, zip(*batch, strict=True)))
                batch, count = [], 0
            batch.append(views)
            count += len(views[0])
    if count:
        yield tuple(map(list, zip(*batch, strict=True)))


def _deal(rows: Tensor, targets: list[Tensor]) -> None:
    """Copy consecutive rows to tensors that hold so many of them together."""
    for target, values in zip(targets, torch.split(rows, [len(target) for target in targets]), strict=True):
        target.copy_(values)
