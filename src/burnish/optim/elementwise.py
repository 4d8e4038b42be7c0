"""Run a kernel of elementwise operations over many tensors at the speed of one pass over memory.

A kernel takes lists of tensors (`torch._foreach_*`) and is written once. On an accelerator it gets whole lists: a few
launches for all tensors. On a CPU it gets pieces that fit in the cache, so that ten operations read and write main
memory as one would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Elements of a piece: large enough to hide the calls, small enough that half a dozen tensors of it stay in the cache.
PIECE = 2**17


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the tensor itself, or the shard of a `DTensor` (the same memory)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sweep(kernel: Callable[..., None], *columns: Sequence[Tensor]) -> None:
    """Call `kernel(*lists)` until each row of the columns has been seen once.

    Args:
        kernel: changes tensors in place, elementwise, and treats every element alike.
        columns: lists of equal length; the tensors of a row have one shape.
    """
    if not columns or not columns[0]:
        return
    if columns[0][0].device.type != "cpu":
        kernel(*(list(column) for column in columns))
        return
    batch: list[tuple[Tensor, ...]] = []
    size = 0
    for row in zip(*columns, strict=True):
        if row[0].numel() > PIECE and all(tensor.is_contiguous() for tensor in row):
            for pieces in zip(*(tensor.view(-1).split(PIECE) for tensor in row), strict=True):
                kernel(*([piece] for piece in pieces))
            continue
        batch.append(row)
        size += row[0].numel()
        if size >= PIECE:
            kernel(*map(list, zip(*batch, strict=True)))
            batch, size = [], 0
    if batch:
        kernel(*map(list, zip(*batch, strict=True)))


def first_nonfinite(tensors: Sequence[Tensor]) -> int | None:
    """Position of the first tensor that holds a NaN or an infinity, or None; one pass and one wait for the device."""
    filled = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    if not filled:
        return None
    # A sum or norm is not finite if a term is not; it may also overflow, so that a suspect is looked at closely. Norms
    # take one launch for all tensors on an accelerator; sums are ten times as fast on a CPU.
    held = [tensors[index] for index in filled]
    totals = [tensor.sum() for tensor in held] if held[0].device.type == "cpu" else torch._foreach_norm(held)
    if torch.stack([total.to(totals[0].device) for total in totals]).isfinite().all():
        return None
    return next((index for index in filled if not tensors[index].isfinite().all()), None)
