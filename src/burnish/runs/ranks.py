"""The processes of a run that torchrun started: which one this is, waiting, and adding up what each saw."""

from __future__ import annotations

import os
from typing import Any, Protocol, Self, TypeVar


class Addable(Protocol):
    """A record whose sum with another is the record of both."""

    def __add__(self, other: Self) -> Self:
        """The record of both."""
        ...


R = TypeVar("R", bound=Addable)


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> None:
    """Join the process group of torchrun, unless that is done (gloo: records live on the CPU)."""
    import torch.distributed as dist

    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def leave_ranks() -> None:
    """Leave the process group, where one was joined, when every rank has come here."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every rank has come here."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


def merge_over_ranks(record: R) -> R:
    """The record of all ranks, the same on every rank: sums are added in the order of the ranks."""
    import torch.distributed as dist

    if world_size() == 1:
        return record
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, record)
    total: R = gathered[0]
    for other in gathered[1:]:
        total = total + other
    return total


def of_first(record: dict[str, Any]) -> dict[str, Any]:
    """The first rank's record, on every rank, once all have come here."""
    import torch.distributed as dist

    if world_size() == 1:
        return record
    told: list[Any] = [record]
    dist.broadcast_object_list(told, src=0)
    found: dict[str, Any] = told[0]
    return found
