"""What completions look like to a model: mean last hidden states, and the few directions in which those of one prompt
differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.align.trees import Tree, branch_lengths, collate
from burnish.training.head import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK_TOLERANCE = 1e-6


@torch.no_grad()
def pooled_states(model: PreTrainedModel, trees: Sequence[Tree], *, pad: int) -> Tensor:
    """The last hidden states of each completion, averaged over its tokens.

    Args:
        model: a causal language model, in evaluation mode.
        trees: prompts with their completions, none of them empty: one batch.
        pad: id of the padding token.

    Returns:
        Tensor `[branches, hidden]`, float32: of all trees, in order.

    Source: arXiv 2601.08421 needs features of completions; these are ours.
    """
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in collate(trees, "padded", pad=pad).items()}
    output = decoder(model)(input_ids=batch["input_ids"], use_cache=False)
    states = output.last_hidden_state.flatten(0, 1)[batch["sources"] + 1].float()  # [tokens, hidden]
    lengths = branch_lengths(batch)
    sums = states.new_zeros(len(lengths), states.shape[1]).index_add(0, batch["owners"], states)
    means: Tensor = sums / lengths[:, None]
    return means.cpu()


@dataclass(frozen=True, eq=False)
class Projection:
    """A few orthonormal directions of a larger space.

    Attributes:
        directions: Tensor `[d, hidden]`, float64; the first is that of the largest variance, and the largest entry of
            each is positive.
        share: of the variance that was fitted.
    """

    directions: Tensor
    share: float

    def __call__(self, states: Tensor) -> Tensor:
        """Coordinates `[..., d]`, float64, of states `[..., hidden]`."""
        return states.double() @ self.directions.mT

    def save(self, file: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        partial = file.with_name(file.name + ".partial")
        share = torch.tensor(self.share, dtype=torch.float64)
        save_file({"directions": self.directions.contiguous(), "share": share}, partial)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> Projection:
        """Read what `save` wrote."""
        stored = load_file(file)
        return cls(stored["directions"], float(stored["share"]))


def principal_directions(states: Sequence[Tensor], size: int) -> Projection:
    """The directions in which completions of one prompt differ most.

    States are centred for each prompt: what all its completions share says nothing about which is preferred, and would
    take most of the directions.

    Args:
        states: for each prompt those of its completions, Tensor `[completions, hidden]`.
        size: directions; fewer where the states have no more.

    Raises:
        ValueError: `size` is below 1, or all completions of each prompt have equal states.

    Source: principal components within groups; Jolliffe, Principal Component Analysis (2nd ed., 2002), section 12.
    """
    if size < 1:
        raise ValueError(f"num_features={size}: expected 1 or more")
    centred = torch.cat([rows.double() - rows.double().mean(0) for rows in states])  # [completions, hidden]
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    scale = float(torch.cat([rows.double() for rows in states]).abs().max())
    rank = int((values > RANK_TOLERANCE * max(float(values[0]), scale)).sum())
    if rank == 0:
        raise ValueError("completions of one prompt all have equal states: nothing tells them apart")
    kept = directions[: min(size, rank)]
    largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
    share = float(values[: len(kept)].square().sum() / values.square().sum())
    return Projection(kept * largest.sign(), share)
