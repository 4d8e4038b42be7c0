"""Preference distillation: the preferences of a reward model, in full, into the model."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import Positive
from burnish.align.objectives.sequences import soft_logistic


def preference_distillation(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    gamma: Positive = 0.1,
    reward_scale: Positive = 1.0,
    reward_clip: Positive | None = None,
) -> Tensor:
    """Cross-entropy of sigma(gamma (ln pi(a) - ln pi(b))) with the label sigma(scale (R(a) - R(b))): Tensor [batch].

    The same for either order of the two answers. Least where ln pi(a) - ln pi(b) = scale (R(a) - R(b)) / gamma.

    Args:
        chosen_logps: Tensor `[batch]`, float: log-probability of one answer, summed over tokens.
        rejected_logps: of the other answer.
        chosen_rewards: Tensor `[batch]`: its reward.
        rejected_rewards: of the other answer.
        gamma: as in `pmle`.
        reward_scale: a reward model's unit; how soft the labels are depends on it.
        reward_clip: each reward is clamped to [-clip, clip] first.

    Source: arXiv 2506.01523 v2, Eq. 11, up to the entropy of the label, which has no gradient. Scale and clip are ours.
    """
    if reward_clip is not None:
        chosen_rewards = chosen_rewards.clamp(-reward_clip, reward_clip)
        rejected_rewards = rejected_rewards.clamp(-reward_clip, reward_clip)
    target = reward_scale * (chosen_rewards - rejected_rewards)
    return soft_logistic(gamma * (chosen_logps - rejected_logps), target)
