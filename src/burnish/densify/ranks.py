"""Calibration over several processes started by torchrun: each rank sees its share, and the sums add up exactly."""

from __future__ import annotations

import os
from typing import Any

from burnish.densify.statistics import RoutingStatistics


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks() -> None:
    """Join the process group of torchrun (gloo: the records live on the CPU); nothing to do for a single process."""
    import torch.distributed as dist

    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def wait_for_all() -> None:
    """Return when every rank has come here."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


def merge_over_ranks(statistics: RoutingStatistics) -> RoutingStatistics:
    """The record of all ranks' tokens, the same on every rank: sums are added in the order of the ranks."""
    import torch.distributed as dist

    if world_size() == 1:
        return statistics
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, statistics)
    total: RoutingStatistics = gathered[0]
    for other in gathered[1:]:
        total = total + other
    return total
