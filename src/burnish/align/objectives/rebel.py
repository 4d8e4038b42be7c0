"""Regression of a log-ratio on a reward: REBEL, and reward distillation with a reference that stays."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import Positive
from burnish.align.objectives.sequences import log_ratio_margin, soft_logistic


def rebel(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    eta: Positive = 1.0,
) -> Tensor:
    """(margin - eta (R(chosen) - R(rejected)))^2: Tensor [batch].

    Args:
        chosen_logps: as in `dpo`, and the three that follow; for REBEL the reference is the policy that sampled, so
            that each round sharpens the last one.
        chosen_rewards: Tensor `[batch]`.
        rejected_rewards: of the other answer.
        eta: what a unit of reward adds to a log-ratio.

    Source: arXiv 2404.16767 and its code.
    """
    margin = log_ratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (margin - eta * (chosen_rewards - rejected_rewards).detach()).square()


def reward_distillation(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    beta: Positive = 0.1,
) -> Tensor:
    """(margin - (R(chosen) - R(rejected)) / beta)^2 against one reference in all rounds: Tensor [batch].

    Zero for every pair at pi* = ref exp(R / beta) / Z, wherever the pairs come from.

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        chosen_rewards: Tensor `[batch]`.
        rejected_rewards: of the other answer.
        beta: as in `dpo`.

    Source: reconstructed; the abstract of arXiv 2601.08421 names the scheme, its update could not be read.
    """
    return rebel(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_rewards,
        rejected_rewards,
        eta=1 / beta,
    )


def reward_distillation_ce(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    beta: Positive = 0.1,
) -> Tensor:
    """Cross-entropy of sigma(beta margin) with the soft label sigma(R(chosen) - R(rejected)): Tensor [batch].

    The minimum is the one of `reward_distillation`; pairs that are far off pull with a bounded force.

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        chosen_rewards: Tensor `[batch]`.
        rejected_rewards: of the other answer.
        beta: as in `dpo`.

    Source: reconstructed, as `reward_distillation`.
    """
    margin = log_ratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return soft_logistic(beta * margin, chosen_rewards - rejected_rewards)
