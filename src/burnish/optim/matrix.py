"""The matrix rule: momentum, orthogonalised; for tensors that are, or that stack, weight matrices.

How a tensor is read is said by its group:

- `layout`: "batch" (leading dimensions stack matrices, as experts do) or "flatten" (out, everything else; kernels of a
  convolution); left out, three dimensions are a stack and four or more are flattened;
- `transposed`: matrices are stored [in, out];
- `splits`: rows of the blocks that are orthogonalised on their own (a fused q, k, v), each with its own scale factor;
- `heads`: the rows are so many blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from burnish.optim.base import Live, require_number, tensor_name
from burnish.optim.elementwise import sweep
from burnish.optim.exchange import Alone, Exchange, Layout, exchange_for, sharding
from burnish.optim.orthogonalization import compute_dtype, iteration, orthogonalize
from burnish.optim.scale import scale_factor

LAYOUTS = ("batch", "flatten")
MOMENTUM_FORMS = ("ema", "accumulate")

Normalize = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ways:
    """How tensors of one shape travel, and how the statistics of their rows do."""

    matrices: Exchange
    rows: Exchange


def matrix_options(
    momentum: float,
    nesterov: bool,
    momentum_form: str,
    scale: str,
    orthogonalization: str,
    steps: int,
    dtype: torch.dtype | None,
    eps: float,
) -> dict[str, Any]:
    """Group keys of the matrix rule."""
    return {
        "momentum": momentum,
        "nesterov": nesterov,
        "momentum_form": momentum_form,
        "scale": scale,
        "orthogonalization": orthogonalization,
        "steps": steps,
        "dtype": dtype,
        "eps": eps,
        "layout": None,
        "transposed": False,
        "splits": (),
        "heads": 0,
    }


def check_matrix_group(group: dict[str, Any]) -> None:
    """Refuse options of the matrix rule that are out of range, and row splits that do not fit a tensor."""
    require_number("momentum", group["momentum"], low=0, high=1)
    require_number("eps", group["eps"], low=0, open_low=True)
    if group["momentum_form"] not in MOMENTUM_FORMS:
        raise ValueError(f"momentum_form={group['momentum_form']!r}: choose one of {', '.join(MOMENTUM_FORMS)}")
    if group["layout"] not in (None, *LAYOUTS):
        raise ValueError(f"layout={group['layout']!r}: choose one of {', '.join(LAYOUTS)}")
    if isinstance(group["dtype"], torch.dtype):
        if not group["dtype"].is_floating_point:
            raise ValueError(f"dtype={group['dtype']}: choose a floating-point type, or leave it out")
        group["dtype"] = str(group["dtype"]).removeprefix("torch.")  # distributed checkpoints cannot hold a dtype
    scale_factor(group["scale"], 1, 1)
    if group["orthogonalization"] != "svd":
        iteration(group["orthogonalization"], group["steps"])
    if not group["use_muon"]:
        return
    for position, parameter in enumerate(group["params"]):
        name, splits, heads = tensor_name(group, position), group["splits"], group["heads"]
        rows, _ = block_shapes(parameter.shape, group | {"splits": (), "heads": 0})[0]
        if splits and sum(splits) != rows:
            raise ValueError(f"splits={tuple(splits)} of {name} add up to {sum(splits)}, but it has {rows} rows")
        if heads and (splits or rows % heads):
            raise ValueError(f"heads={heads}: the {rows} rows of {name} cannot be shared among them (without splits)")
        sharding(parameter, "flatten" if _flattens(parameter.shape, group) else "batch")


def block_shapes(shape: Sequence[int], group: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns [out, in] of each kind of matrix that is orthogonalised on its own in a tensor of a shape."""
    rows, cols = (shape[0], torch.Size(shape[1:]).numel()) if _flattens(shape, group) else (shape[-2], shape[-1])
    rows, cols = (cols, rows) if group["transposed"] else (rows, cols)
    if group["heads"]:
        return [(rows // group["heads"], cols)]
    return [(split, cols) for split in group["splits"] or (rows,)]


def _flattens(shape: Sequence[int], group: dict[str, Any]) -> bool:
    # Three dimensions stack matrices (experts); four or more are kernels (out, in, height, width).
    return group["layout"] == "flatten" or (group["layout"] is None and len(shape) > 3)


def blocks(batch: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
    """The matrices that are orthogonalised on their own in tensors of one shape, as views [..., rows, cols].

    Args:
        batch: Tensor [count, *shape], or the row statistics of such tensors, where the columns are one.
        group: layout, transposed, splits and heads.
    """
    matrices = batch.flatten(2) if _flattens(batch.shape[1:], group) else batch
    matrices = matrices.mT if group["transposed"] else matrices
    if group["heads"]:
        return (torch.unflatten(matrices, -2, (group["heads"], -1)),)
    return torch.split(matrices, list(group["splits"]), dim=-2) if group["splits"] else (matrices,)


def row_shape(shape: Sequence[int], group: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one number for each row (output) of the matrices in a tensor of a shape."""
    if _flattens(shape, group):
        return (1, *shape[1:]) if group["transposed"] else (shape[0], *(1 for _ in shape[1:]))
    return (*shape[:-2], 1, shape[-1]) if group["transposed"] else (*shape[:-1], 1)


def orthogonalize_blocks(
    batch: Tensor, group: dict[str, Any], normalize: Normalize | None = None, statistics: Tensor | None = None
) -> None:
    """Replace the matrices in tensors of one shape [count, *shape] by their directions, in place.

    Row blocks whose scale factor differs from the first one's carry the ratio themselves. `normalize(directions,
    statistics)`, if given, returns new directions and updates the row statistics in place.
    """
    shapes = block_shapes(batch.shape[1:], group)
    rows = blocks(statistics, group) if statistics is not None else (None,) * len(shapes)
    for part, row, shape in zip(blocks(batch, group), rows, shapes, strict=True):
        orthogonalize(
            part, method=group["orthogonalization"], steps=group["steps"], dtype=batch.dtype, eps=group["eps"], out=part
        )
        if normalize is not None and row is not None:
            # A few at a time: it takes several float32 copies.
            for some, statistic in zip(torch.split(part, 8), torch.split(row, 8), strict=True):
                some.copy_(normalize(some, statistic))
        ratio = scale_factor(group["scale"], *shape) / scale_factor(group["scale"], *shapes[0])
        if ratio != 1:
            part.mul_(ratio)


def momentum_update(
    gradients: list[Tensor], buffers: list[Tensor], targets: list[Tensor], *, momentum: float, nesterov: bool, form: str
) -> None:
    """Update momentum buffers and write what is to be orthogonalised into `targets` (which may have another dtype).

    "ema": M += (1 - mu)(g - M), Nesterov g + mu (M - g). "accumulate": M = mu M + g, Nesterov g + mu M. The two differ
    by the factor 1 - mu, which orthogonalisation does not see.
    """
    if form == "ema":
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if nesterov else buffers
    else:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=momentum) if nesterov else buffers
    torch._foreach_copy_(targets, list(updates))


def directions(
    live: list[Live],
    group: dict[str, Any],
    *,
    process_group: ProcessGroup | None,
    exchanges: dict[Any, list[Ways]],
    normalize: Normalize | None = None,
) -> Iterator[tuple[list[Live], list[Tensor], float]]:
    """Update the momentum of a group and orthogonalise it, one shape after the other.

    Tensors of one shape are orthogonalised as one batch. A matrix that is sharded, or replicated over `process_group`,
    is computed by one rank and sent back; meanwhile the exchange of the next shape runs.

    Args:
        live: tensors of the group that take part, with "momentum_buffer" in their state, and "row_second_moment" where
            there is a `normalize`.
        group: options of the matrix rule.
        process_group: ranks with equal copies of the plain tensors.
        exchanges: plans of earlier steps, filled here.
        normalize: (directions [..., rows, cols], row statistics [..., rows, 1]) -> directions; statistics in place.

    Yields:
        Tensors of one shape; for each the direction, of the shape of `data`, in the dtype of the computation; and the
        scale factor: `data -= lr * scale * direction`.
    """
    shapes: dict[Any, list[Live]] = {}
    for tensor in live:
        # The same on every rank: what a rank holds of a tensor is not.
        parameter = tensor.parameter
        cut = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        key = (parameter.shape, cut, parameter.dtype, parameter.device)
        shapes.setdefault(key, []).append(tensor)
    plan = _plan(
        [[tensor.parameter for tensor in tensors] for tensors in shapes.values()], group, process_group, exchanges
    )
    departures = (
        (tensors, ways, _depart(tensors, ways, group, rows=normalize is not None))
        for tensors, ways in zip(shapes.values(), plan, strict=True)
    )
    alone = all(isinstance(ways.matrices, Alone) for ways in plan)
    for tensors, ways, arrive in departures if alone else _one_ahead(departures):
        batch, statistics = arrive()
        if batch is not None:
            orthogonalize_blocks(batch, group, normalize, statistics)
        returning = ways.matrices.scatter([] if batch is None else list(batch), _dtype(tensors[0], group))
        if normalize is not None:
            rows = [tensor.state["row_second_moment"] for tensor in tensors]
            updated = ways.rows.scatter([] if statistics is None else list(statistics), rows[0].dtype)
            torch._foreach_copy_(rows, updated())
        yield tensors, returning(), scale_factor(group["scale"], *block_shapes(tensors[0].parameter.shape, group)[0])


def _plan(
    shapes: list[list[Tensor]],
    group: dict[str, Any],
    process_group: ProcessGroup | None,
    exchanges: dict[Any, list[Ways]],
) -> list[Ways]:
    """One exchange for each shape; the owners are balanced over all of them."""
    key = tuple(id(parameter) for parameters in shapes for parameter in parameters)
    if key not in exchanges:
        loads: dict[Any, list[float]] = {}
        plan = []
        for parameters in shapes:
            layout: Layout = "flatten" if _flattens(parameters[0].shape, group) else "batch"
            cut = sharding(parameters[0], layout)
            ranks = process_group if cut is None else cut.group
            held = loads.setdefault(ranks, [0.0] * ranks.size()) if ranks is not None else None
            exchange = exchange_for(parameters, layout=layout, loads=held, process_group=process_group)
            plan.append(Ways(exchange, exchange.reshaped([row_shape(shape, group) for shape in exchange.shapes])))
        exchanges[key] = plan
    return exchanges[key]


def _depart(
    tensors: list[Live], ways: Ways, group: dict[str, Any], *, rows: bool
) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """Update the momentum of tensors of one shape and send it to the owners."""
    data = tensors[0].data
    batch = torch.empty((len(tensors), *data.shape), dtype=_dtype(tensors[0], group), device=data.device)
    update = functools.partial(
        momentum_update, momentum=group["momentum"], nesterov=group["nesterov"], form=group["momentum_form"]
    )
    buffers = [tensor.state["momentum_buffer"] for tensor in tensors]
    sweep(update, [tensor.gradient for tensor in tensors], buffers, list(batch))
    wholes = ways.matrices.gather(list(batch))
    statistics: Callable[[], list[Tensor]] = list
    if rows:
        statistics = ways.rows.gather([tensor.state["row_second_moment"] for tensor in tensors])

    def arrive() -> tuple[Tensor | None, Tensor | None]:
        # What never left need not be stacked again.
        here = batch if isinstance(ways.matrices, Alone) else _stack(wholes())
        return here, _stack(statistics())

    return arrive


def _dtype(tensor: Live, group: dict[str, Any]) -> torch.dtype:
    chosen: torch.dtype = getattr(torch, group["dtype"]) if group["dtype"] else compute_dtype(tensor.data.dtype)
    return chosen


def _stack(tensors: list[Tensor]) -> Tensor | None:
    return torch.stack(tensors) if tensors else None


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Yield each item after the next one has been started."""
    previous: Any = None
    for item in items:
        if previous is not None:
            yield previous
        previous = item
    if previous is not None:
        yield previous
