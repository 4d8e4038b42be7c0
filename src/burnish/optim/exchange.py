"""Whole matrices of sharded tensors: each is brought to one rank, which computes with it, and the results go back.

Orthogonalising a matrix needs all of it. Instead of every rank gathering every matrix, each matrix has one owner: one
all-to-all brings the pieces to the owners, a second one brings the pieces of the results home. Replicated tensors are
there already, so that only the results travel. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

Layout = Literal["batch", "flatten"]
Arrival = Callable[[], list[Tensor]]
"""Waits for what is under way and returns it; call it once."""


@dataclass(frozen=True)
class Sharding:
    """How a tensor is cut.

    Attributes:
        mesh: of the ranks that hold it.
        mesh_dim: the dimension of the mesh over which it is cut; over the others it is replicated, or cut between whole
            matrices.
        dim: the dimension of the tensor that is cut.
    """

    mesh: DeviceMesh
    mesh_dim: int
    dim: int

    @property
    def group(self) -> ProcessGroup:
        """The ranks that together hold the tensor."""
        return self.mesh.get_group(self.mesh_dim)


def sharding(parameter: Tensor, layout: Layout = "flatten") -> Sharding | None:
    """How the matrices of a tensor are cut; None where what this rank holds of it are whole matrices.

    Args:
        parameter: Tensor, plain or a `DTensor`.
        layout: "batch": the last two dimensions are a matrix and a cut along the others leaves matrices whole;
            "flatten": the first dimension against all others is one matrix.

    Raises:
        ValueError: a matrix is cut along more than one mesh dimension (FSDP with tensor parallelism), interleaved, or
            held as partial sums.
    """
    if not isinstance(parameter, DTensor):
        return None
    mesh, found = parameter.device_mesh, None
    for mesh_dim, placement in enumerate(parameter.placements):
        dim = getattr(placement, "dim", None)
        if mesh.size(mesh_dim) == 1 or placement.is_replicate():
            continue
        if layout == "batch" and dim is not None and dim % parameter.ndim < parameter.ndim - 2:
            continue
        if found is not None or not isinstance(placement, Shard):
            raise ValueError(
                f"a tensor of shape {list(parameter.shape)} has placements {parameter.placements}, but a matrix may be"
                " cut by one Shard alone: leave out tensor parallelism, or give the tensor to the auxiliary rule"
                " (use_muon=False)"
            )
        found = Sharding(mesh, mesh_dim, placement.dim % parameter.ndim)
    return found


def process_groups(tensors: Sequence[Tensor]) -> list[ProcessGroup]:
    """Every group of ranks over which some tensor is cut or replicated, once, in the same order on all ranks."""
    found: dict[ProcessGroup, None] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            found.update((mesh.get_group(dim), None) for dim in range(mesh.ndim) if mesh.size(dim) > 1)
    return list(found)


def agree(flags: Sequence[int], groups: Sequence[ProcessGroup], device: torch.device | str = "cpu") -> list[int]:
    """The largest value of each flag on any rank, the same list on all of them.

    Args:
        flags: small integers, equally many on every rank.
        groups: in the same order on every rank; none: the flags are returned as they are.
        device: on which the groups communicate.
    """
    if not groups:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    for group in groups:
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=group)
    agreed: list[int] = votes.tolist()
    return agreed


def assign_owners(costs: Sequence[float], num_ranks: int, loads: list[float] | None = None) -> list[int]:
    """A rank for each matrix: the largest first, each to the rank with the least to do, ties to the lower index.

    The same on all ranks. Without earlier loads no two ranks differ by more than the largest cost.

    Args:
        costs: of each matrix, in any unit.
        num_ranks: how many ranks share the work.
        loads: what each rank has to do already; the new work is added to it.
    """
    loads = [0.0] * num_ranks if loads is None else loads
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[index] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


class Exchange(Protocol):
    """A plan for some tensors: which of them this rank computes with, and the way there and back."""

    @property
    def owned(self) -> list[int]:
        """Indices of the tensors that this rank computes with."""
        ...

    @property
    def shapes(self) -> list[torch.Size]:
        """Of all the tensors, made whole."""
        ...

    def gather(self, shards: Sequence[Tensor]) -> Arrival:
        """Start to bring whole tensors here.

        Args:
            shards: what this rank holds of every tensor, all of one dtype.

        Returns:
            Waits, and gives the whole tensors of `owned`.
        """
        ...

    def scatter(self, wholes: Sequence[Tensor], dtype: torch.dtype) -> Arrival:
        """Start to send results home.

        Args:
            wholes: the results for `owned`.
            dtype: in which they travel and arrive, as a rank that owns nothing cannot tell.

        Returns:
            Waits, and gives what this rank holds of the result for every tensor.
        """
        ...

    def reshaped(self, shapes: Sequence[Sequence[int]]) -> Exchange:
        """The same owners for tensors of other shapes, cut along the same dimensions: statistics [rows, 1], say."""
        ...


@dataclass(frozen=True)
class Alone:
    """Every tensor is whole here, and computed here."""

    shapes: list[torch.Size]

    @property
    def owned(self) -> list[int]:
        """All of them."""
        return list(range(len(self.shapes)))

    def gather(self, shards: Sequence[Tensor]) -> Arrival:
        """The tensors themselves."""
        return lambda: list(shards)

    def scatter(self, wholes: Sequence[Tensor], dtype: torch.dtype) -> Arrival:
        """The results themselves."""
        return lambda: [whole.to(dtype) for whole in wholes]

    def reshaped(self, shapes: Sequence[Sequence[int]]) -> Alone:
        """See `Exchange.reshaped`."""
        return Alone([torch.Size(shape) for shape in shapes])


@dataclass(frozen=True)
class Share:
    """Every rank holds a copy of every tensor and computes some; the results go to all.

    Attributes:
        group: the ranks.
        owners: rank in the group that computes each tensor.
        shapes: of the tensors.
        device: of the tensors.
    """

    group: ProcessGroup
    owners: list[int]
    shapes: list[torch.Size]
    device: torch.device

    @cached_property
    def owned(self) -> list[int]:
        """Those of this rank."""
        return _owned(self.owners, self.group)

    def gather(self, shards: Sequence[Tensor]) -> Arrival:
        """The tensors themselves: nothing travels."""
        return lambda: [shards[index] for index in self.owned]

    def scatter(self, wholes: Sequence[Tensor], dtype: torch.dtype) -> Arrival:
        """Broadcast from each owner: exact where the ranks own unequal amounts, and no rank sends padding."""
        order, layout = self._layout
        flat = torch.empty(sum(layout.splits), dtype=dtype, device=self.device)
        results: list[Tensor] = [flat] * len(order)
        for index, view in zip(order, layout.views(flat), strict=True):
            results[index] = view
        _copy([results[index] for index in self.owned], wholes)
        under_way = [
            dist.broadcast(part, group=self.group, group_src=owner, async_op=True)
            for owner, part in enumerate(flat.split_with_sizes(layout.splits))
            if len(part)
        ]

        def arrive() -> list[Tensor]:
            for work in under_way:
                work.wait()
            return results

        return arrive

    def reshaped(self, shapes: Sequence[Sequence[int]]) -> Share:
        """See `Exchange.reshaped`."""
        return replace(self, shapes=[torch.Size(shape) for shape in shapes])

    @cached_property
    def _layout(self) -> tuple[list[int], _Layout]:
        return _by_owner(self.owners, self.shapes, self.group.size())


@dataclass(frozen=True)
class Sharded:
    """Every rank holds a piece of every tensor; each is brought to its owner, and the result is sent home in pieces.

    Attributes:
        group: the ranks.
        owners: rank in the group that computes each tensor.
        shapes: of the tensors made whole.
        dims: the dimension along which each is cut, in chunks as `torch.chunk` makes them: the last ones may be short
            or empty.
        device: of the tensors.
    """

    group: ProcessGroup
    owners: list[int]
    shapes: list[torch.Size]
    dims: list[int]
    device: torch.device

    @cached_property
    def owned(self) -> list[int]:
        """Those of this rank."""
        return _owned(self.owners, self.group)

    def gather(self, shards: Sequence[Tensor]) -> Arrival:
        """One all-to-all with as many elements as there are: short and empty pieces need no padding."""
        order, here = self._pieces_here
        flat = _all_to_all([shards[index] for index in order], shards[0].dtype, here, self._pieces_of_owned, self)

        def arrive() -> list[Tensor]:
            pieces, step = flat(), len(self.owned)
            return [torch.cat(pieces[first::step], self.dims[index]) for first, index in enumerate(self.owned)]

        return arrive

    def scatter(self, wholes: Sequence[Tensor], dtype: torch.dtype) -> Arrival:
        """One all-to-all, the reverse of `gather`."""
        order, here = self._pieces_here
        ranks = range(self.group.size())
        cut = [
            whole.split_with_sizes(
                [chunk(whole.shape[self.dims[index]], len(ranks), rank) for rank in ranks], self.dims[index]
            )
            for index, whole in zip(self.owned, wholes, strict=True)
        ]
        flat = _all_to_all([pieces[rank] for rank in ranks for pieces in cut], dtype, self._pieces_of_owned, here, self)

        def arrive() -> list[Tensor]:
            by_index = dict(zip(order, flat(), strict=True))
            return [by_index[index] for index in range(len(order))]

        return arrive

    def reshaped(self, shapes: Sequence[Sequence[int]]) -> Sharded:
        """See `Exchange.reshaped`."""
        return replace(self, shapes=[torch.Size(shape) for shape in shapes])

    def piece(self, index: int, rank: int) -> torch.Size:
        """The shape of what a rank of the group holds of a tensor."""
        shape, dim = list(self.shapes[index]), self.dims[index]
        shape[dim] = chunk(shape[dim], self.group.size(), rank)
        return torch.Size(shape)

    @cached_property
    def _pieces_here(self) -> tuple[list[int], _Layout]:
        rank = dist.get_rank(self.group)
        pieces = [self.piece(index, rank) for index in range(len(self.shapes))]
        return _by_owner(self.owners, pieces, self.group.size())

    @cached_property
    def _pieces_of_owned(self) -> _Layout:
        pieces = [[self.piece(index, rank) for index in self.owned] for rank in range(self.group.size())]
        splits = [sum(map(math.prod, of_rank)) for of_rank in pieces]
        return _Layout([shape for of_rank in pieces for shape in of_rank], splits)


def exchange_for(
    parameters: Sequence[Tensor],
    *,
    layout: Layout = "flatten",
    costs: Sequence[float] | None = None,
    loads: list[float] | None = None,
    process_group: ProcessGroup | None = None,
) -> Exchange:
    """The plan for tensors of one kind, in an order that is the same on all ranks.

    Args:
        parameters: plain tensors, or `DTensor`s that are cut over the same dimension of one mesh (they may be
            replicated over another: each replica then does the same work), or `DTensor`s whose matrices are whole here.
        layout: see `sharding`.
        costs: of computing each; None: its number of elements.
        loads: see `assign_owners`; one list for the exchanges of a group balances over all of them.
        process_group: ranks with equal copies of the plain tensors, which share the work; None: each does all of it.

    Raises:
        ValueError: no tensors, tensors of different kinds, or a placement that `sharding` refuses.
    """
    cuts = [sharding(parameter, layout) for parameter in parameters]
    kinds = {(cut and (cut.mesh, cut.mesh_dim), isinstance(parameter, DTensor))
             for cut, parameter in zip(cuts, parameters, strict=True)}  # fmt: skip
    if len(kinds) != 1:
        raise ValueError(
            f"one exchange was asked for {len(parameters)} tensors of {len(kinds)} kinds: give tensors that are all"
            " plain, all whole here, or all cut over the same mesh dimension"
        )
    held = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    shapes = [tensor.shape for tensor in held]
    first = cuts[0]
    group = process_group if first is None else first.group
    if group is None or group.size() == 1 or (first is None and isinstance(parameters[0], DTensor)):
        return Alone(shapes)
    if first is not None:
        shapes = [
            torch.Size([*shape[: cut.dim], parameter.shape[cut.dim], *shape[cut.dim + 1 :]])
            for shape, cut, parameter in zip(shapes, cuts, parameters, strict=True)
            if cut is not None
        ]
    owners = assign_owners(costs or [shape.numel() for shape in shapes], group.size(), loads)
    if first is None:
        return Share(group, owners, shapes, held[0].device)
    exchange = Sharded(group, owners, shapes, [cut.dim for cut in cuts if cut is not None], held[0].device)
    for index, tensor in enumerate(held):
        expected = exchange.piece(index, dist.get_rank(group))
        if tensor.shape != expected:
            raise ValueError(
                f"this rank holds {list(tensor.shape)} of a tensor of shape {list(shapes[index])}, not"
                f" {list(expected)}: shard it by fully_shard or distribute_tensor"
            )
    return exchange


def chunk(size: int, num_chunks: int, index: int) -> int:
    """Length of one chunk of a dimension as `torch.chunk` and `DTensor` cut it: ceil(size / num_chunks) or the rest."""
    full = -(-size // num_chunks)
    return max(0, min(full, size - full * index))


@dataclass(frozen=True)
class _Layout:
    """Pieces one behind the other in a flat buffer: their shapes, and the number of elements for each rank in turn."""

    shapes: list[torch.Size]
    splits: list[int]

    def views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split_with_sizes([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _by_owner(owners: list[int], shapes: list[torch.Size], num_ranks: int) -> tuple[list[int], _Layout]:
    """Indices of the tensors sorted by owner, and their layout in that order."""
    order = sorted(range(len(owners)), key=owners.__getitem__)
    splits = [0] * num_ranks
    for owner, shape in zip(owners, shapes, strict=True):
        splits[owner] += shape.numel()
    return order, _Layout([shapes[index] for index in order], splits)


def _owned(owners: list[int], group: ProcessGroup) -> list[int]:
    rank = dist.get_rank(group)
    return [index for index, owner in enumerate(owners) if owner == rank]


def _all_to_all(pieces: list[Tensor], dtype: torch.dtype, there: _Layout, back: _Layout, plan: Sharded) -> Arrival:
    """Send pieces laid out as `there`; what arrives is laid out as `back`."""
    sent = torch.empty(sum(there.splits), dtype=dtype, device=plan.device)
    _copy(there.views(sent), pieces)
    received = torch.empty(sum(back.splits), dtype=dtype, device=plan.device)
    work = dist.all_to_all_single(received, sent, back.splits, there.splits, group=plan.group, async_op=True)

    def arrive() -> list[Tensor]:
        work.wait()
        return back.views(received)

    return arrive


def _copy(targets: list[Tensor], sources: Sequence[Tensor]) -> None:
    assert [target.shape for target in targets] == [source.shape for source in sources]
    if targets:
        torch._foreach_copy_(targets, list(sources))
