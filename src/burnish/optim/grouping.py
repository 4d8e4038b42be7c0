"""Which numbers of a tensor share a block, from its shape alone; and the way from a tensor to its blocks and back.

- "input": consecutive weights that leave one input (a column of a matrix [out, in]);
- "output": consecutive weights that enter one output (a row);
- "filter": the slice [height, width] of a kernel between one input channel and one output channel, whole;
- "fixed": consecutive numbers of the tensor as it is stored, whatever they mean;
- "diagonal": every number alone;
- "auto": "input" for matrices, "filter" for kernels, "diagonal" for vectors, for kernels of one number, for those of
  more than 32 (7 x 7), and for all where blocks have one number.

A block never holds numbers of two inputs, outputs or slices; a neuron shorter than a block is a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPINGS = ("auto", "input", "output", "filter", "fixed", "diagonal")
REMAINDERS = ("refuse", "smaller")
LARGEST_BLOCK = 1024
LARGEST_AUTOMATIC_FILTER = 32


@dataclass(frozen=True)
class Grouping:
    """How the numbers of one tensor are dealt out to blocks.

    Attributes:
        shape: of the tensor.
        order: its dimensions, those of one neuron last.
        length: numbers of one neuron.
        block: numbers of a block; what is left of a neuron, if it is not divided, is a smaller block.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    length: int
    block: int

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """How many blocks there are of which size: one pair, or a second one for the smaller blocks."""
        neurons = math.prod(self.shape) // self.length if self.length else 0
        whole, rest = divmod(self.length, self.block)
        return ((neurons * whole, self.block), (neurons, rest)) if rest else ((neurons * whole, self.block),)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The blocks [count, size] of each part of a tensor; views where the order of numbers allows it."""
        neurons = tensor.permute(self.order).reshape(-1, max(self.length, 1))  # [neurons, length]
        cut = self.length // self.block * self.block
        pieces = (neurons,) if cut == self.length else (neurons[:, :cut], neurons[:, cut:])
        return [piece.reshape(part) for piece, part in zip(pieces, self.parts, strict=True)]

    def scatter(self, blocks: Sequence[Tensor]) -> Tensor:
        """The tensor whose blocks these are: the inverse of `gather`."""
        neurons = self.parts[-1][0] if len(blocks) > 1 else -1
        whole = torch.cat([part.reshape(neurons, -1) for part in blocks], 1) if len(blocks) > 1 else blocks[0]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return whole.reshape([self.shape[dimension] for dimension in self.order]).permute(inverse)

    def split(self, flat: Tensor, width: Callable[[int], int]) -> list[Tensor]:
        """Views [count, width(size)] of numbers kept for each block, those of a part one after the other."""
        shapes = [(count, width(size)) for count, size in self.parts]
        pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def numbers(self, width: Callable[[int], int]) -> int:
        """How many numbers `split` takes."""
        return sum(count * width(size) for count, size in self.parts)


@functools.lru_cache(maxsize=65536)
def group_coordinates(
    shape: tuple[int, ...],
    rule: str,
    block_size: int,
    *,
    remainder: str = "refuse",
    kernel: bool = False,
    transposed: bool = False,
    name: str = "the tensor",
) -> Grouping:
    """Deal the numbers of a tensor out to blocks.

    Args:
        shape: matrices are [..., out, in], kernels [out, in, ...].
        rule: one of `GROUPINGS`.
        block_size: numbers of a block, for "input", "output" and "fixed".
        remainder: what to do with a neuron that the size does not divide: "refuse", or "smaller" for a smaller last
            block in each.
        kernel: a tensor of three dimensions is a kernel, not a stack of matrices; one of four or more always is.
        transposed: stored [in, out].
        name: of the tensor, for the error.

    Raises:
        ValueError: the size does not divide, "filter" for what is no kernel, or a block of more than 1,024 numbers.

    Source: arXiv 1905.10757 as its code has it, where chunks could hold numbers of two neurons; here they cannot.

    Examples:
        >>> import torch
        >>> columns = group_coordinates((4, 3), "input", 2)
        >>> columns.parts, columns.gather(torch.arange(12).view(4, 3))[0].tolist()
        (((6, 2),), [[0, 3], [6, 9], [1, 4], [7, 10], [2, 5], [8, 11]])
    """
    kernel = len(shape) > 3 or (kernel and len(shape) > 2)
    slice_length = math.prod(shape[2:]) if kernel else 0
    if rule == "auto" and block_size == 1:
        rule = "diagonal"
    if rule == "auto":
        automatic = "filter" if 1 < slice_length <= LARGEST_AUTOMATIC_FILTER else "diagonal"
        rule = automatic if kernel else "input"
    if rule != "fixed" and len(shape) < 2:
        rule = "diagonal"
    stored = tuple(range(len(shape)))
    if rule in ("diagonal", "fixed"):
        order, length, what = stored, math.prod(shape), "numbers"
    elif rule == "filter":
        if not kernel:
            raise ValueError(f"grouping='filter': {name} {list(shape)} is no kernel: choose input, output or auto")
        order, length, what = stored, slice_length, "numbers of a slice"
        block_size = slice_length
    elif (rule == "input") != transposed:
        # The neuron runs along the outputs as they are stored: the first dimension of a kernel, the last but one of
        # a matrix.
        first = 0 if kernel else len(shape) - 2
        order = (*stored[:first], *stored[first + 1 :], first)
        length, what = shape[first], f"weights of one {rule}"
    else:
        first = 1 if kernel else len(shape) - 1
        order, length, what = stored, math.prod(shape[first:]), f"weights of one {rule}"
    block = 1 if rule == "diagonal" else max(1, min(block_size, length))
    if block > LARGEST_BLOCK:
        raise ValueError(
            f"block_size={block}: the {length} {what} of {name} {list(shape)} would need an eigendecomposition of that"
            f" size: choose at most {LARGEST_BLOCK}"
        )
    if length % block and remainder == "refuse":
        below = next(size for size in range(block, 0, -1) if length % size == 0)
        above = next(size for size in range(block, length + 1) if length % size == 0)
        raise ValueError(
            f"block_size={block_size} does not divide the {length} {what} of {name} {list(shape)}: choose"
            f" {below} or {above}, or pass remainder='smaller' for a smaller last block"
        )
    return Grouping(shape, order, length, block)
