"""NPO: unlearning of answers, alone and beside what must be kept."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import NonNegative, Positive
from burnish.align.objectives.sequences import logistic


def npo(logps: Tensor, ref_logps: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """-(2 / beta) ln sigma(-beta ln(pi/ref)): DPO with a rejected answer alone. Tensor [batch].

    Its gradient is that of gradient ascent times 2 sigma(beta ln(pi/ref)), 1 at the start and 0 once forgotten; for
    beta -> 0 it is gradient ascent.

    Args:
        logps: Tensor `[batch]`, float: log-probability of what is to be forgotten, summed over tokens.
        ref_logps: under the model before unlearning.
        beta: large stops early.

    Source: arXiv 2404.05868 and its code.
    """
    return (2 / beta) * logistic(-beta * (logps - ref_logps))


def npo_gd(
    logps: Tensor,
    ref_logps: Tensor,
    retain_logps: Tensor,
    retain_lengths: Tensor,
    *,
    beta: Positive = 0.1,
    forget_weight: NonNegative = 1.0,
    retain_weight: NonNegative = 1.0,
) -> Tensor:
    """forget_weight npo + retain_weight (mean negative log-likelihood per retained token): Tensor [batch].

    Args:
        logps: as in `npo`, and the one that follows.
        retain_logps: Tensor `[retained]`, float: of what is to be kept, summed over tokens; any number of answers.
        retain_lengths: Tensor `[retained]`: number of tokens.
        beta: as in `npo`.
        forget_weight: of the first term.
        retain_weight: of the second term.

    Source: NPO+RT of arXiv 2404.05868 (`npo_grad_diff` of its code).
    """
    kept = -retain_logps.sum() / retain_lengths.sum().clamp(min=1)
    return forget_weight * npo(logps, ref_logps, beta=beta) + retain_weight * kept


def npo_kl(
    logps: Tensor,
    ref_logps: Tensor,
    retain_kl: Tensor,
    *,
    beta: Positive = 0.1,
    forget_weight: NonNegative = 1.0,
    retain_weight: NonNegative = 1.0,
) -> Tensor:
    """forget_weight npo + retain_weight KL(ref || pi) per retained token: Tensor [batch].

    Args:
        logps: as in `npo`, and the one that follows.
        retain_kl: Tensor `[]`: mean over the tokens of retained answers, prompts and padding not counted.
        beta: as in `npo`.
        forget_weight: of the first term.
        retain_weight: of the second term.

    Source: NPO+KL of arXiv 2404.05868; its code averages the KL over prompts and padding, too.
    """
    return forget_weight * npo(logps, ref_logps, beta=beta) + retain_weight * retain_kl
