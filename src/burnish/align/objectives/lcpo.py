"""LCPO (RE-PO): whether each label is right is inferred, with a reliability for every annotator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from burnish.align.objectives.pairs import PairLoss, in_both_orders
from burnish.align.objectives.sequences import logistic

CERTAIN = 1e-3
"""A reliability keeps this distance from 0 and 1, from where it could not return."""


def lcpo(loss: PairLoss) -> Callable[..., Tensor]:
    """A pair loss with one more input, `reliability` [batch]: the probability that the pair's annotator is right.

    With S = loss(rejected, chosen) - loss(chosen, rejected), so that sigma(S) is the preference that the loss implies,
    and w the posterior that the label is right, the loss is -w ln sigma(S) - (1 - w) ln sigma(-S). Its gradient is that
    of -ln(eta sigma(S) + (1 - eta) sigma(-S)). With reliability 1 and dpo it is dpo; with 1/2 it teaches nothing.

    Examples:
        >>> import torch
        >>> from burnish.align.objectives import dpo
        >>> logps = torch.tensor([[-12.0], [-14.0], [-13.0], [-13.5]])
        >>> round(lcpo(dpo)(*logps, torch.tensor([0.9])).item(), 6)
        0.63405

    Source: arXiv 2509.24159 (camera-ready), Eq. 2, 4 and 5.
    """

    def expected(kept: Tensor, flipped: Tensor, reliability: Tensor) -> Tensor:
        logit = flipped - kept
        right = posterior(logit, reliability)
        return right * logistic(logit) + (1 - right) * logistic(-logit)

    return in_both_orders(loss, "reliability", expected)


def label_posterior(loss: PairLoss) -> Callable[..., Tensor]:
    """The inputs of `lcpo(loss)` -> the posterior that each label is right: Tensor [batch], without gradient."""
    return in_both_orders(loss, "reliability", lambda kept, flipped, eta: posterior(flipped - kept, eta))


def posterior(logit: Tensor, reliability: Tensor) -> Tensor:
    """p eta / (p eta + (1 - p) (1 - eta)) with p = sigma(logit): Tensor [batch], without gradient.

    Source: arXiv 2509.24159, Eq. 4.
    """
    return torch.sigmoid(logit.detach() + reliability.logit())


def updated_reliability(reliability: Tensor, posteriors: Tensor, annotators: Tensor, *, rate: float = 0.1) -> Tensor:
    """Reliabilities after a batch: (1 - rate) eta + rate (mean posterior of their pairs). Tensor [annotators].

    Args:
        reliability: Tensor `[annotators]`, float: before the batch; 0.9 at the start, and not 1/2, where it stays.
        posteriors: Tensor `[batch]`: see `label_posterior`.
        annotators: Tensor `[batch]`, int64: whose label each is; those without one in the batch keep theirs.
        rate: alpha of the paper, in [0, 1].

    Raises:
        ValueError: the rate is outside of [0, 1].

    Source: arXiv 2509.24159, Eq. 7.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate}: expected a number in [0, 1]")
    right = posteriors.to(reliability.dtype)
    sums = torch.zeros_like(reliability).index_add(0, annotators, right)
    counts = torch.zeros_like(reliability).index_add(0, annotators, torch.ones_like(right))
    moved = torch.lerp(reliability, sums / counts.clamp(min=1), rate)
    return torch.where(counts > 0, moved, reliability).clamp(CERTAIN, 1 - CERTAIN)
