"""MeZO-BCD: perturb and update one block of weights at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from burnish.optim.blocks import Block, Blocks, BlockSchedule, partition
from burnish.optim.mezo import MeZO


class MeZOBCD(MeZO):
    """MeZO on one block of weights, a decoder layer, for `interval` steps, then on the next.

    A step draws noise for, reads and writes one block instead of all weights: that is where its speed comes from. What
    a block needs besides (a float32 copy, which makes restoring exact and half precision safe, and noise) is given up
    when the next block begins, and so is the state of "momentum" and "adam". At equal progress a step takes a learning
    rate about as many times MeZO's as there are blocks.

    Args:
        params: a model, (name, tensor) pairs or groups with names.
        lr: 5e-6 to 5e-5 for all weights of a large model.
        blocks: None for a block a layer, a number of elements, or name patterns; see `burnish.optim.blocks.partition`.
        order: "random" (a new permutation each time all blocks have had their turn), "ascending" or "descending".
        interval: steps on a block.
        include_embedding: embeddings are a block too.
        include_head: what is neither a layer nor an embedding is a block too.
        copy: True as described; False moves weights there and back in place.
        keep_noise: hold the numbers of a step.
        options: of `MeZO`.

    Raises:
        ValueError: as `MeZO`, and as `partition`.

    Source: arXiv 2501.19099; blocks, orders and defaults are those of the authors' development code. There a block's
    momentum and moments are kept for its next turn; here they are dropped, for memory.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-5,
        *,
        blocks: Blocks = None,
        order: Literal["random", "ascending", "descending"] = "random",
        interval: int = 100,
        include_embedding: bool = False,
        include_head: bool = False,
        copy: bool = True,
        keep_noise: bool = True,
        **options: Any,
    ) -> None:
        self._split = functools.partial(
            partition, blocks=blocks, include_embedding=include_embedding, include_head=include_head
        )
        self.order, self.interval = order, interval
        super().__init__(params, lr, copy=copy, keep_noise=keep_noise, **options)
        self.options |= {"order": order, "interval": interval}

    def _partition(self) -> tuple[Block, ...]:
        return self._split(self.names(), self.tensors(), embeddings=self._embeddings)

    def _schedule(self) -> BlockSchedule:
        return BlockSchedule(len(self.blocks), self.order, self.interval, self.options["seed"])
