"""Sem-DPO: pairs whose winner has left the meaning of the prompt weigh less."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.dpo import dpo
from burnish.align.objectives.option import NonNegative, Positive


def sem_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    similarity: Tensor,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 2.0,
    normalize: bool = False,
) -> Tensor:
    """exp(-alpha (1 - similarity)) times dpo: Tensor [batch]. With alpha = 0 it is dpo.

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        similarity: Tensor `[batch]`, in [-1, 1]: cosine of the embeddings of the prompt and of the chosen answer.
        beta: as in `dpo`.
        alpha: how much a distance of 1 costs, as a power of e.
        normalize: weights are divided by their mean over the batch, so that the loss is a weighted mean.

    Source: arXiv 2507.20133: its abstract says "exponential weight" and "cosine distance between the prompt and the
    winner"; the formula is reconstructed from that, the default of alpha is ours.
    """
    weight = (-alpha * (1 - similarity.detach())).exp()
    if normalize:
        weight = weight / weight.mean()
    return weight * dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
