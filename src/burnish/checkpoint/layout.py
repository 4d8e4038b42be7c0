"""Plan an output before a byte of it is written: names, shapes, types and the shards that hold them."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from burnish.checkpoint.tensors import num_bytes


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the output: `copy_of` names the source tensor whose bytes it takes; None means computed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    copy_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the output and its tensors, in the order of their bytes."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def header(self) -> bytes:
        """The safetensors header: 8 bytes of length, then JSON padded to a multiple of 8 bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in self.tensors:
            span = [position, position + tensor.nbytes]
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
            position = span[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def plan_shards(tensors: Iterable[PlannedTensor], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors over shards of at most `max_shard_bytes` (a single larger tensor gets its own).

    Tensors are ordered by name with numbers compared as numbers, so that a layer lies together and the same input
    always gives the same files.

    Raises:
        ValueError: two tensors of one name.
    """
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    seen: set[str] = set()
    for tensor in sorted(tensors, key=lambda tensor: (natural_key(tensor.name), tensor.name)):
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name} is planned twice")
        seen.add(tensor.name)
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    total = len(groups)
    return tuple(
        Shard(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(group)) for number, group in enumerate(groups, 1)
    )


def index_json(shards: Iterable[Shard]) -> dict[str, object]:
    """The content of `model.safetensors.index.json`."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    return {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": weight_map}


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that orders `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
