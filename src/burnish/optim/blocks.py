"""Which tensors are perturbed together, and which block's turn it is: pure functions of names, steps and a seed."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn

ORDERS = ("random", "ascending", "descending")
LAYER = re.compile(r"^(?:.*?\.)??\d+(?=\.|$)")
EMBEDDING = re.compile(r"(^|[._])(embed\w*|word_embeddings|wte|wpe)(\.|$)")

ENDS = ("embedding", "head")

Blocks = int | Sequence[str | Sequence[str]] | None


@dataclass(frozen=True)
class Block:
    """Tensors that are perturbed together.

    Attributes:
        name: of the layer, or the first of its tensors.
        tensors: their positions among all tensors.
        size: elements.
    """

    name: str
    tensors: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class BlockSchedule:
    """Whose turn it is.

    Each block is kept for `interval` steps. "random" goes through a new permutation of the blocks, from its end, each
    time all have had their turn; the permutation depends on `seed` and on how often that was, on nothing else.
    """

    count: int
    order: str = "random"
    interval: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: choose one of {', '.join(ORDERS)}")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: expected 1 step or more")

    def block(self, step: int) -> int:
        """Number of the block that step `step` (from 0) perturbs."""
        epoch, place = divmod(self.turn(step), self.count)
        if self.order == "ascending":
            return place
        if self.order == "descending":
            return self.count - 1 - place
        return self.permutation(epoch)[self.count - 1 - place]

    def turn(self, step: int) -> int:
        """Turns of any block before the one that step `step` belongs to; a single block has one turn without end."""
        return step // self.interval if self.count > 1 else 0

    def permutation(self, epoch: int) -> list[int]:
        """Order of block epoch `epoch`, read from its end."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        found: list[int] = torch.randperm(self.count, generator=generator).tolist()
        return found


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on all parts and looks random."""
    return xxhash.xxh64_intdigest("/".join(map(str, parts)).encode()) >> 1


def embedding_tensors(model: nn.Module) -> set[int]:
    """`id` of each tensor that an embedding table owns, tied heads among them."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def partition(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    blocks: Blocks = None,
    *,
    embeddings: set[int] | None = None,
    include_embedding: bool = False,
    include_head: bool = False,
) -> tuple[Block, ...]:
    """Split tensors into blocks; those in no block stay as they are.

    Args:
        names: of the tensors.
        tensors: Tensors of any shape.
        blocks: None for a block a layer; a number for blocks of whole consecutive tensors with at least so many
            elements; or a list with a name pattern (`*` stands for anything), or a list of them, for each block.
        embeddings: `id` of the tensors of embeddings; None goes by their names.
        include_embedding: embeddings are a block of their own.
        include_head: what is neither in a layer nor an embedding (final norm, head) is the last block.

    Raises:
        ValueError: no layers, a pattern without a tensor, a tensor in two blocks, a size below 1.

    Source: a block is a decoder layer as in the authors' development code (arXiv 2501.19099); by size and by pattern
    are ours.
    """
    if embeddings is None:
        embeddings = {id(tensor) for name, tensor in zip(names, tensors, strict=True) if EMBEDDING.search(name)}
    if blocks is not None and not isinstance(blocks, int):
        found = _by_pattern(names, blocks)
    else:
        layers = [LAYER.match(name) for name in names]
        kinds = [
            "embedding" if id(tensor) in embeddings else layer.group() if layer else "head"
            for layer, tensor in zip(layers, tensors, strict=True)
        ]
        wanted = {"embedding": include_embedding, "head": include_head}
        kept = [index for index, kind in enumerate(kinds) if wanted.get(kind, True)]
        if isinstance(blocks, int):
            found = _by_size([(index, tensors[index].numel()) for index in kept], blocks)
        else:
            if not any(layers):
                raise ValueError(
                    "blocks=None takes a block a layer, but no tensor has the number of a layer in its name: give"
                    " blocks a size in elements, or name patterns"
                )
            groups: dict[str, list[int]] = {}
            for index in kept:
                groups.setdefault(kinds[index], []).append(index)
            found = [(kind, groups[kind]) for kind in sorted(groups, key=functools.partial(_place, list(groups)))]
    if not found:
        raise ValueError("no block holds a tensor: include_embedding or include_head takes in what is left out")
    return tuple(
        Block(name or names[indices[0]], tuple(indices), sum(tensors[index].numel() for index in indices))
        for name, indices in found
    )


def _place(kinds: Sequence[str], kind: str) -> tuple[int, int, int]:
    """Layers in the order of their lists and numbers, then the embedding, then the head."""
    if kind in ENDS:
        return 1, ENDS.index(kind), 0
    stem, _, number = kind.rpartition(".")
    return 0, [other.rpartition(".")[0] for other in kinds].index(stem), int(number)


def _by_size(tensors: Sequence[tuple[int, int]], size: int) -> list[tuple[str, list[int]]]:
    if size < 1:
        raise ValueError(f"blocks={size}: expected 1 element or more a block")
    before = itertools.accumulate((elements for _, elements in tensors), initial=0)
    found: list[tuple[str, list[int]]] = []
    start = -size
    for (index, _), total in zip(tensors, before, strict=False):
        if total - start >= size:
            found.append(("", []))
            start = total
        found[-1][1].append(index)
    return found


def _by_pattern(names: Sequence[str], blocks: Sequence[str | Sequence[str]]) -> list[tuple[str, list[int]]]:
    owner: dict[int, str] = {}
    found: list[tuple[str, list[int]]] = []
    for number, patterns in enumerate(blocks):
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        indices: list[int] = []
        for pattern in patterns:
            hits = [index for index, name in enumerate(names) if name == pattern or fnmatch.fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(f"blocks[{number}]: {pattern!r} matches no tensor, such as {names[0]!r}")
            indices += [index for index in hits if index not in indices]
        for index in indices:
            if index in owner:
                raise ValueError(f"{names[index]} is in two blocks, by {owner[index]!r} and by {patterns[0]!r}")
            owner[index] = patterns[0]
        found.append((patterns[0], sorted(indices)))
    return found
