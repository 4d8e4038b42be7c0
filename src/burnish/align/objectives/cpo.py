"""CPO: DPO with a uniform reference, held by the language-model loss of the chosen answer."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import NonNegative, Positive
from burnish.align.objectives.sequences import logistic, per_token


def cpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
    average: bool = False,
) -> Tensor:
    """-ln sigma(beta (chosen_logps - rejected_logps)) - alpha chosen_logps: Tensor [batch]; `pmle` if alpha = 0.

    Args:
        chosen_logps: Tensor `[batch]`, float: log-probability summed over tokens.
        rejected_logps: of the other answer.
        chosen_lengths: Tensor `[batch]`: number of tokens; read only with `average`.
        beta: scale of the margin.
        alpha: weight of the second term (`cpo_alpha` of TRL).
        average: the second term is per token, as in TRL, not a sum as in the paper.

    Source: arXiv 2401.08417; the first term is its Eq. 3 (after TRL).
    """
    likelihood = per_token(chosen_logps, chosen_lengths) if average else chosen_logps
    return logistic(beta * (chosen_logps - rejected_logps)) - alpha * likelihood
