"""SimPO: log-probability per token as the reward, a margin, and no reference."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import NonNegative, Positive
from burnish.align.objectives.sequences import logistic, per_token


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative | None = None,
    gamma_beta_ratio: NonNegative | None = None,
) -> Tensor:
    """-ln sigma(beta (mean logp of chosen - mean logp of rejected) - gamma): Tensor [batch].

    Args:
        chosen_logps: Tensor `[batch]`, float: log-probability summed over tokens.
        rejected_logps: of the other answer.
        chosen_lengths: Tensor `[batch]`: number of tokens.
        rejected_lengths: of the other answer.
        beta: scale of the reward per token.
        gamma: target margin of the reward; beta / 2 if neither this nor the next is given.
        gamma_beta_ratio: gamma over beta, in its place.

    Raises:
        ValueError: both are given.

    Source: arXiv 2405.14734; `gamma_beta_ratio` is the spelling of its code, `gamma` that of the paper and TRL.
    """
    if gamma is None:
        gamma = beta * (0.5 if gamma_beta_ratio is None else gamma_beta_ratio)
    elif gamma_beta_ratio is not None:
        raise ValueError(f"gamma={gamma} and gamma_beta_ratio={gamma_beta_ratio} say the same thing: give one of them")
    margin = per_token(chosen_logps, chosen_lengths) - per_token(rejected_logps, rejected_lengths)
    return logistic(beta * margin - gamma)
