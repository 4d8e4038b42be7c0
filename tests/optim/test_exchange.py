"""Who computes which matrix, what is refused, and (in processes of their own) that tensors come back whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from burnish.optim.exchange import (
    Alone,
    Sharding,
    agree,
    assign_owners,
    chunk,
    exchange_for,
    process_groups,
    sharding,
)

FOLDER = Path(__file__).parent / "distributed"


@pytest.mark.parametrize("ranks", [2, 4])
def test_u7_2_tensors_reach_their_owners_and_come_back_over_gloo(ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    done = subprocess.run(
        [*command, str(FOLDER / "exchange_check.py")], capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


COSTS = st.lists(st.integers(0, 1000).map(float), max_size=40)


@given(costs=COSTS, num_ranks=st.integers(1, 9))
def test_each_matrix_has_one_owner_and_ranks_differ_by_no_more_than_the_largest(
    costs: list[float], num_ranks: int
) -> None:
    loads = [0.0] * num_ranks
    owners = assign_owners(costs, num_ranks, loads)
    work = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    assert len(owners) == len(costs) and loads == work
    assert max(work) - min(work) <= max(costs, default=0.0)
    assert owners == assign_owners(costs, num_ranks)


def test_owners_of_known_costs() -> None:
    # 9 | 7 | 6, then 4 to the rank with 6, 3 to the one with 7, 2 to the first: of 9, 10, 10 it has the least.
    assert assign_owners([4, 9, 6, 2, 7, 3], 3) == [2, 0, 2, 0, 1, 1]
    assert assign_owners([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert assign_owners([5, 5], 3, loads := [1.0, 0.0, 3.0]) == [1, 0] and loads == [6.0, 5.0, 3.0]


@given(size=st.integers(0, 50), num_chunks=st.integers(1, 9))
def test_chunks_are_those_of_torch(size: int, num_chunks: int) -> None:
    lengths = [chunk(size, num_chunks, index) for index in range(num_chunks)]
    assert lengths == [Shard.local_shard_size_and_offset(size, num_chunks, rank)[0] for rank in range(num_chunks)]
    pieces = [len(piece) for piece in torch.empty(size).chunk(num_chunks)]
    assert lengths == pieces + [0] * (num_chunks - len(pieces))


def test_one_process_keeps_what_it_has() -> None:
    tensors = [torch.randn(3, 2), torch.randn(4, 4)]
    exchange = exchange_for(tensors)
    assert isinstance(exchange, Alone) and exchange.owned == [0, 1]
    gathered = exchange.gather(tensors)()
    assert all(one is other for one, other in zip(gathered, tensors, strict=True))
    back = exchange.scatter([tensor.double() for tensor in tensors], torch.float32)()
    assert all(torch.equal(one, other) for one, other in zip(back, tensors, strict=True))
    assert exchange.reshaped([(3, 1), (4, 1)]).shapes == [(3, 1), (4, 1)]
    assert agree([1, 0, 2], [], "cpu") == [1, 0, 2]
    assert process_groups(tensors) == []


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """2 x 2 ranks, seen from the first, that never communicate."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    dist.destroy_process_group()


def cut(shape: tuple[int, ...], mesh: DeviceMesh, *placements: Placement) -> DTensor:
    local = list(shape)
    for placement in placements:
        if isinstance(placement, Shard | _StridedShard):
            local[placement.dim] = chunk(local[placement.dim], 2, 0)
    whole = torch.empty(shape)
    return DTensor.from_local(
        torch.zeros(local), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def test_a_cut_is_read_from_the_placements(mesh: DeviceMesh) -> None:
    assert sharding(torch.zeros(4, 4)) is None
    assert sharding(cut((4, 4), mesh, Replicate(), Replicate())) is None
    found = sharding(cut((4, 4), mesh, Replicate(), Shard(1)))
    assert found == Sharding(mesh, 1, 1) and found.group is mesh.get_group("shard")
    assert sharding(cut((4, 4), mesh, Shard(0), Replicate())) == Sharding(mesh, 0, 0)


def test_a_stack_cut_between_its_matrices_is_whole_as_a_batch_alone(mesh: DeviceMesh) -> None:
    stack = cut((6, 4, 4), mesh, Replicate(), Shard(0))
    assert sharding(stack, "batch") is None and sharding(stack, "flatten") == Sharding(mesh, 1, 0)
    assert isinstance(exchange_for([stack], layout="batch"), Alone)
    assert sharding(cut((6, 4, 4), mesh, Replicate(), Shard(1)), "batch") == Sharding(mesh, 1, 1)
    assert sharding(cut((6, 4, 4), mesh, Replicate(), Shard(2)), "batch") == Sharding(mesh, 1, 2)
    # Expert parallelism with FSDP over the same dimension, and over a dimension of the matrices.
    assert sharding(cut((8, 4, 4), mesh, _StridedShard(0, split_factor=2), Shard(0)), "batch") is None
    assert sharding(cut((8, 4, 4), mesh, Shard(0), Shard(1)), "batch") == Sharding(mesh, 1, 1)


@pytest.mark.parametrize(
    "placements",
    [(Shard(0), Shard(1)), (_StridedShard(0, split_factor=2), Shard(0)), (Replicate(), Partial())],
    ids=["two dimensions", "interleaved", "partial sums"],
)
def test_bad_input_placements_without_whole_matrices_on_one_rank(
    placements: tuple[Placement, ...], mesh: DeviceMesh
) -> None:
    parameter = cut((4, 4), mesh, *placements)
    with pytest.raises(ValueError, match=r"shape \[4, 4\] has placements .* leave out tensor parallelism"):
        sharding(parameter, "batch")
    with pytest.raises(ValueError, match=r"use_muon=False"):
        exchange_for([parameter])


def test_bad_input_tensors_of_different_kinds_in_one_exchange(mesh: DeviceMesh) -> None:
    sharded, across, plain = (
        cut((4, 4), mesh, Replicate(), Shard(0)),
        cut((4, 4), mesh, Shard(0), Replicate()),
        torch.ones(4, 4),
    )
    for kinds in ([sharded, plain], [sharded, across], [cut((4, 4), mesh, Replicate(), Replicate()), plain], []):
        with pytest.raises(ValueError, match=rf"{len(kinds)} tensors of {len(kinds)} kinds"):
            exchange_for(kinds)


def test_bad_input_pieces_that_are_not_chunks(mesh: DeviceMesh) -> None:
    odd = DTensor.from_local(
        torch.zeros(1, 4), mesh, [Replicate(), Shard(0)], run_check=False, shape=torch.Size([4, 4]), stride=(4, 1)
    )
    with pytest.raises(ValueError, match=r"holds \[1, 4\] of a tensor of shape \[4, 4\], not \[2, 4\]"):
        exchange_for([odd])


def test_exchange_for_plain_tensors_shares_only_with_a_group(mesh: DeviceMesh) -> None:
    tensors = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 1)]
    assert exchange_for(tensors).owned == [0, 1, 2]
    assert exchange_for(tensors, process_group=mesh.get_group("shard")).owned == [0, 2]
    assert exchange_for(tensors, costs=[1, 1, 9], process_group=mesh.get_group("shard")).owned == [2]
