"""Objectives of samples from the policy: reverse KL to the target, RLHF, and the KL to the reference.

Each value estimates the objective itself, and each gradient is the score-function one, without bias: its mean over
samples is the gradient of the expectation. Backpropagation through a sampled log-ratio has mean 0 instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.align.objectives.option import NonNegative


def rkl(
    sample_logps: Tensor,
    ref_sample_logps: Tensor,
    sample_rewards: Tensor,
    *,
    gamma: NonNegative = 0.01,
    beta: NonNegative = 0.05,
) -> Tensor:
    """-E[R] - gamma H(pi) + beta KL(pi || ref), with H the entropy of whole answers: Tensor [prompts].

    For beta = 0 it is gamma KL(pi || exp(R / gamma) / Z) up to a constant; for gamma = 0 it is RLHF.

    Args:
        sample_logps: Tensor `[prompts, k]`, float: log-probabilities of k answers of the policy, summed over tokens.
        ref_sample_logps: under the reference.
        sample_rewards: their rewards.
        gamma: weight of the entropy, the temperature of the target.
        beta: weight of the KL to the reference.

    Raises:
        ValueError: k is 1; the baseline of an answer is the mean over the others.

    Source: arXiv 2506.01523 v2, Eq. 15. The estimator is ours; the paper trains with PPO.
    """
    logps = sample_logps.detach()
    score = sample_rewards.detach() - gamma * logps - beta * (logps - ref_sample_logps.detach())
    return _value_with_gradient(-score.mean(-1), -(leave_one_out(score) * sample_logps).mean(-1))


def rlhf(sample_logps: Tensor, ref_sample_logps: Tensor, sample_rewards: Tensor, *, beta: NonNegative = 0.05) -> Tensor:
    """-E[R] + beta KL(pi || ref): `rkl` without the entropy, RLOO with the KL in the reward. Tensor [prompts].

    Args:
        sample_logps: as in `rkl`, and the two that follow.
        beta: weight of the KL to the reference.

    Raises:
        ValueError: one sample for a prompt.

    Source: RLOO, arXiv 2402.14740.
    """
    return rkl(sample_logps, ref_sample_logps, sample_rewards, gamma=0.0, beta=beta)


def rkl_token(
    sample_token_logps: Tensor,
    ref_sample_logps: Tensor,
    sample_rewards: Tensor,
    *,
    gamma: NonNegative = 0.01,
    beta: NonNegative = 0.05,
) -> Tensor:
    """`rkl` whose entropy bonus looks no further than the token itself, the usual shortcut of PPO: Tensor [prompts].

    The value is that of `rkl`; the gradient leaves out that a token changes the entropy of what follows it.

    Args:
        sample_token_logps: Tensor `[prompts, k, tokens]`, float: log-probability of each token; 0 on padding.
        ref_sample_logps: Tensor `[prompts, k]`: of whole answers under the reference.
        sample_rewards: Tensor `[prompts, k]`.
        gamma: weight of the entropy.
        beta: weight of the KL to the reference.

    Raises:
        ValueError: one sample for a prompt.

    Source: the practice of PPO; ours for the estimator.
    """
    regularised = rlhf(sample_token_logps.sum(-1), ref_sample_logps, sample_rewards, beta=beta)
    return regularised - gamma * token_entropy(sample_token_logps)


def on_policy_kl(sample_logps: Tensor, ref_sample_logps: Tensor) -> Tensor:
    """KL(pi || ref), estimated on answers of the policy: Tensor [prompts].

    The regulariser of PMLE and PD (arXiv 2506.01523 v2, Eq. 5 and 12).

    Args:
        sample_logps: Tensor `[prompts, k]`, float: log-probabilities of k answers of the policy, summed over tokens.
        ref_sample_logps: under the reference.

    Raises:
        ValueError: one sample for a prompt.

    Source: the score-function gradient E[ln(pi/ref) grad ln pi], with a leave-one-out baseline.
    """
    return rlhf(sample_logps, ref_sample_logps, torch.zeros_like(sample_logps), beta=1.0)


def token_entropy(sample_token_logps: Tensor) -> Tensor:
    """Entropy of whole answers, with the gradient of each token's own entropy alone: Tensor [prompts].

    Args:
        sample_token_logps: Tensor `[prompts, k, tokens]`, float: 0 on padding.
    """
    own = sample_token_logps.detach() * sample_token_logps
    return _value_with_gradient(-sample_token_logps.sum(-1).mean(-1), -own.sum(-1).mean(-1))


def leave_one_out(scores: Tensor) -> Tensor:
    """Each score less the mean of the others of its prompt: Tensor [prompts, k].

    Raises:
        ValueError: k is less than 2.
    """
    k = scores.shape[-1]
    if k < 2:
        raise ValueError(f"num_samples={k}: the baseline of an answer is the mean over the others, so draw 2 or more")
    return (scores - scores.mean(-1, keepdim=True)) * (k / (k - 1))


def _value_with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one, the gradient of the other."""
    return value.detach() + (surrogate - surrogate.detach())
