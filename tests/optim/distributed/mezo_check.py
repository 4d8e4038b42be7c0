"""Run by torchrun: each rank measures its part of the batch, and all take the step of the whole batch."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh

from burnish.optim import MeZOBCD
from tests.optim.test_mezo import network


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, mine = network(torch.float64), network(torch.float64)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator).double(), torch.randint(3, (40,), generator=generator)
    one = MeZOBCD(whole, lr=0.1, interval=2)
    many = MeZOBCD(mine, lr=0.1, interval=2, process_group=dist.group.WORLD)
    for _ in range(12):
        one.step(lambda: nn.functional.cross_entropy(whole(x), y))
        many.step(lambda: nn.functional.cross_entropy(mine(x[rank::size]), y[rank::size]))
    for ours, theirs in zip(mine.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        first = ours.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, ours), "ranks drifted apart"
    assert not torch.equal(mine[0].weight, network(torch.float64)[0].weight)
    sharded = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (size,)))
    with pytest.raises(ValueError, match="is sharded: a direction is drawn for whole tensors"):
        MeZOBCD([("0.w", sharded)])
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
