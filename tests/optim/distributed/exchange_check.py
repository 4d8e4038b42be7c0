"""Run by torchrun on gloo: tensors go to their owners and back, and nothing is lost, moved or counted twice."""

from __future__ import annotations

from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from burnish.optim.exchange import Alone, Exchange, Sharded, Share, agree, exchange_for, process_groups, sharding

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# (shape, dimension that is cut): even, uneven, fewer rows than ranks, one row, no row, stacks, a convolution.
CUTS = [
    ((8, 6), 0), ((7, 5), 0), ((3, 5), 0), ((1, 9), 0), ((0, 4), 0), ((8, 6), 1), ((5, 7), 1), ((9, 3), -1),
    ((5, 3, 4), 0), ((5, 3, 4), 1), ((2, 3, 6), 2), ((6, 2, 3, 3), 0),
]  # fmt: skip


def numbered(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors whose elements all differ, from each other and between tensors, and that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return [one.dtype for one in found] == [one.dtype for one in expected] and all(
        torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )


def local(tensors: list[DTensor]) -> list[Tensor]:
    return [tensor.to_local() for tensor in tensors]


def owners_of(exchange: Exchange, group: dist.ProcessGroup) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(group.size())]
    dist.all_gather_object(found, exchange.owned, group=group)
    return found


def check_round_trip(mesh: DeviceMesh) -> None:
    for dtype in DTYPES:
        wholes = numbered([shape for shape, _ in CUTS], dtype)
        cut = [distribute_tensor(whole, mesh, [Shard(dim)]) for whole, (_, dim) in zip(wholes, CUTS, strict=True)]
        exchange = exchange_for(cut)
        assert isinstance(exchange, Sharded)
        owned = exchange.gather(local(cut))()
        assert equal(owned, [wholes[index] for index in exchange.owned])
        # A result that differs by tensor, is not contiguous, and travels in a dtype of its own.
        results = [(whole * (index + 2)).mT.contiguous().mT for index, whole in zip(exchange.owned, owned, strict=True)]
        for sent in (dtype, torch.float64):
            expected = [
                distribute_tensor((whole * (index + 2)).to(sent), mesh, [Shard(dim)])
                for index, (whole, (_, dim)) in enumerate(zip(wholes, CUTS, strict=True))
            ]
            assert equal(exchange.scatter(results, sent)(), local(expected))


def check_each_has_one_owner(mesh: DeviceMesh) -> None:
    cut = [distribute_tensor(whole, mesh, [Shard(0)]) for whole in numbered([(n, 4) for n in range(1, 12)])]
    costs = [float(tensor.numel()) for tensor in cut]
    for exchange in (exchange_for(cut), exchange_for(numbered([(4, n) for n in range(1, 12)]), process_group=WORLD)):
        owned = owners_of(exchange, WORLD)
        assert sorted(chain(*owned)) == list(range(11))
        work = [sum(costs[index] for index in indices) for indices in owned]
        assert max(work) - min(work) <= max(costs)
    # The owners of one exchange are spared by the next.
    loads = [0.0] * WORLD.size()
    seen = [owners_of(exchange_for(cut[:1], costs=[7.0], loads=loads), WORLD).index([0]) for _ in range(WORLD.size())]
    assert seen == list(range(WORLD.size())) and loads == [7.0] * WORLD.size()


def check_two_under_way(mesh: DeviceMesh) -> None:
    many = numbered([(6, 3), (5, 2), (3, 3)])
    others = numbered([(2, 64), (300, 40)])
    cut, other = ([distribute_tensor(whole, mesh, [Shard(0)]) for whole in group] for group in (many, others))
    first, second = exchange_for(cut), exchange_for(other)
    arrive_first, arrive_second = first.gather(local(cut)), second.gather(local(other))
    # Which one is waited for first is each rank's own affair.
    found = {}
    for name, arrive in sorted({"first": arrive_first, "second": arrive_second}.items(), reverse=bool(RANK % 2)):
        found[name] = arrive()
    back_first = first.scatter(found["first"], torch.float32)
    back_second = second.scatter(found["second"], torch.float32)
    assert equal(back_second(), local(other)) and equal(back_first(), local(cut))


def check_statistics_beside(mesh: DeviceMesh) -> None:
    shapes, dims = [(7, 5), (5, 7), (4, 2, 6)], [0, 1, 2]
    cut = [distribute_tensor(w, mesh, [Shard(dim)]) for w, dim in zip(numbered(shapes), dims, strict=True)]
    exchange = exchange_for(cut)
    rows = exchange.reshaped([(*shape[:-1], 1) for shape in exchange.shapes])
    wholes = numbered([(*shape[:-1], 1) for shape in shapes])
    statistics = [distribute_tensor(whole, mesh, [Shard(dim)]) for whole, dim in zip(wholes, dims, strict=True)]
    assert rows.owned == exchange.owned
    arrived = rows.gather(local(statistics))()
    assert equal(arrived, [wholes[index] for index in rows.owned])
    assert equal(rows.scatter(arrived, torch.float32)(), local(statistics))


def check_share() -> None:
    for dtype in DTYPES:
        wholes = numbered([(3, 4), (5, 2), (2, 2, 3), (0, 3), (64, 9)], dtype)
        exchange = exchange_for(wholes, process_group=WORLD)
        assert isinstance(exchange, Share)
        owned = exchange.gather(wholes)()
        assert equal(owned, [wholes[index] for index in exchange.owned])
        # Only the owner knows its result.
        results = [whole * (index + 2) for index, whole in zip(exchange.owned, owned, strict=True)]
        expected = [whole * (index + 2) for index, whole in enumerate(wholes)]
        assert equal(exchange.scatter(results, dtype)(), expected)
        rows = exchange.reshaped([(len(whole), 1) for whole in wholes])
        column = [torch.full((len(wholes[index]), 1), index, dtype=dtype) for index in rows.owned]
        assert equal(
            rows.scatter(column, dtype)(),
            [torch.full((len(whole), 1), index, dtype=dtype) for index, whole in enumerate(wholes)],
        )
    single = exchange_for(wholes[:1], process_group=WORLD).scatter([wholes[0]] if RANK == 0 else [], torch.bfloat16)
    assert equal(single(), [wholes[0].bfloat16()])


def check_whole_already(mesh: DeviceMesh) -> None:
    stack = numbered([(5, 3, 4)])[0]
    for placement, layout in ((Replicate(), "flatten"), (Shard(0), "batch")):
        cut = [distribute_tensor(stack, mesh, [placement])]
        assert sharding(cut[0], layout) is None
        exchange = exchange_for(cut, layout=layout)
        assert isinstance(exchange, Alone) and exchange.owned == [0]
        assert equal(exchange.scatter(exchange.gather(local(cut))(), torch.float32)(), local(cut))
    ones = init_device_mesh("cpu", (1, WORLD.size()))
    cut = [distribute_tensor(stack, ones, [Shard(1), Shard(2)])]
    assert sharding(cut[0]) == sharding(distribute_tensor(stack, ones, [Replicate(), Shard(2)]))
    exchange = exchange_for(cut)
    assert equal(exchange.gather(local(cut))(), [stack] if RANK == 0 else [])


def check_two_dimensions_of_mesh() -> None:
    """Replicas of shards, and expert parallelism under FSDP: the exchange stays inside of a row of the mesh."""
    mesh = init_device_mesh("cpu", (2, WORLD.size() // 2))
    wholes = numbered([(7, 4), (1, 3), (6, 6), (5, 4)])
    cut = [distribute_tensor(whole, mesh, [Replicate(), Shard(0)]) for whole in wholes]
    exchange = exchange_for(cut)
    group = mesh.get_group(1)
    assert isinstance(exchange, Sharded) and exchange.group is group
    assert sorted(chain(*owners_of(exchange, group))) == [0, 1, 2, 3]
    arrived = exchange.gather(local(cut))()
    assert equal(arrived, [wholes[index] for index in exchange.owned])
    assert equal(exchange.scatter(arrived, torch.float32)(), local(cut))
    assert process_groups(cut) == [mesh.get_group(0), group]

    stack = numbered([(6, 3, 5)])[0]
    cut = [distribute_tensor(stack, mesh, [Shard(0), Shard(1)])]
    exchange = exchange_for(cut, layout="batch")
    half = stack.chunk(2)[mesh.get_local_rank(0)]
    assert exchange.shapes == [half.shape]
    assert equal(exchange.gather(local(cut))(), [half] if mesh.get_local_rank(1) == 0 else [])
    result = [2 * half] if exchange.owned else []
    assert equal(exchange.scatter(result, torch.float32)(), [2 * cut[0].to_local()])


def check_modules_sharded_by_fsdp2(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7), nn.Linear(7, 1, bias=False), nn.Conv2d(6, 4, 3))
    wholes = [parameter.detach().clone() for parameter in model.parameters() if parameter.ndim > 1]
    fully_shard(model, mesh=mesh)
    cut = [parameter.detach() for parameter in model.parameters() if parameter.ndim > 1]
    exchange = exchange_for(cut)
    assert equal(exchange.gather(local(cut))(), [wholes[index] for index in exchange.owned])


def check_agreement(mesh: DeviceMesh) -> None:
    flags = [int(rank == RANK) for rank in range(WORLD.size())]
    assert agree([*flags, 0, RANK], [WORLD], "cpu") == [1] * WORLD.size() + [0, WORLD.size() - 1]
    assert agree(flags, [], "cpu") == flags
    square = init_device_mesh("cpu", (2, WORLD.size() // 2))
    groups = process_groups([distribute_tensor(torch.ones(4, 4), square, [Replicate(), Shard(0)]), torch.ones(2)])
    assert agree(flags, groups, "cpu") == [1] * WORLD.size()


def main() -> None:
    mesh = init_device_mesh("cpu", (WORLD.size(),))
    check_round_trip(mesh)
    check_each_has_one_owner(mesh)
    check_two_under_way(mesh)
    check_statistics_beside(mesh)
    check_share()
    check_whole_already(mesh)
    if WORLD.size() > 2:
        check_two_dimensions_of_mesh()
    check_modules_sharded_by_fsdp2(mesh)
    check_agreement(mesh)


dist.init_process_group("gloo")
WORLD, RANK = dist.distributed_c10d._get_default_group(), dist.get_rank()
main()
dist.barrier()
dist.destroy_process_group()
