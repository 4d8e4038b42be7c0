"""ORPO: the language-model loss of the chosen answer, and an odds ratio, without a reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from burnish.align.objectives.option import NonNegative
from burnish.align.objectives.sequences import logistic, per_token


def orpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: NonNegative = 0.1,
) -> Tensor:
    """-p_w + beta (-ln sigma(ln odds(p_w) - ln odds(p_l))), p the mean log-probability per token. Tensor [batch].

    Args:
        chosen_logps: Tensor `[batch]`, float: log-probability summed over tokens.
        rejected_logps: of the other answer.
        chosen_lengths: Tensor `[batch]`: number of tokens.
        rejected_lengths: of the other answer.
        beta: lambda of the paper; the name is TRL's.

    Source: arXiv 2403.07691, Eq. 4 and 7 (after TRL, whose first term covers the prompt, too).
    """
    chosen, rejected = per_token(chosen_logps, chosen_lengths), per_token(rejected_logps, rejected_lengths)
    return beta * logistic(log_odds(chosen) - log_odds(rejected)) - chosen


def log_odds(logp: Tensor) -> Tensor:
    """ln(P / (1 - P)) of a log-probability; one that is 0 counts as the nearest number below, so that it is finite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # Each form loses its digits on the other's side.
    rest = torch.where(logp > -math.log(2), torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))
    return logp - rest
