"""Estimates with the standard error that independent units of data give them. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, in the same unit; the error is NaN where one unit of data is all there is."""

    value: float
    standard_error: float


def mean_per_token(sums: Tensor, counts: Tensor) -> Estimate:
    r"""Mean per token over sequences, and its standard error with sequences as the independent units.

    Tokens of one sequence are correlated, so the error is that of the ratio of two sums over sequences:
    $R = \sum_i s_i / \sum_i n_i$ and $\mathrm{SE}^2 = \frac{m}{m-1} \sum_i (s_i - R n_i)^2 / (\sum_i n_i)^2$.
    A paired difference of two models on the same tokens is the same formula over $s_i = s_{i,B} - s_{i,A}$.

    Args:
        sums: Tensor `[num_sequences]`, float64; any quantity summed over the tokens of a sequence.
        counts: Tensor `[num_sequences]`, int64; tokens of each sequence.

    Raises:
        ValueError: no token at all.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), section 6.4; for language-model evaluation Miller,
    arXiv:2411.00640 (clustered errors, paired differences).
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("no predicted token: give sequences of at least two tokens")
    mean = float(sums.sum()) / total
    num_sequences = len(sums)
    if num_sequences == 1:
        return Estimate(mean, math.nan)
    residual = float((sums - mean * counts).square().sum())
    return Estimate(mean, math.sqrt(residual * num_sequences / (num_sequences - 1)) / total)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of independent samples and its standard error: `mean_per_token` with one token a sample."""
    return mean_per_token(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.int64))


def jackknife(statistic: Callable[[Sequence[int]], float], num_samples: int, *, num_groups: int = 100) -> Estimate:
    r"""Any statistic of independent samples, and its standard error without one random draw.

    $\mathrm{SE}^2 = \frac{g-1}{g} \sum_j (\theta_{(j)} - \bar\theta)^2$, where $\theta_{(j)}$ leaves out the samples
    $j, j + g, j + 2g, \ldots$ With one sample a group and a mean as the statistic it is the error that `mean` gives.

    Args:
        statistic: of the samples with these indices, in ascending order.
        num_samples: how many there are.
        num_groups: g, at most `num_samples`.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 11.2; leaving out groups: Shao and
    Tu, The Jackknife and Bootstrap (1995), section 2.3.
    """
    value = statistic(range(num_samples))
    groups = min(num_groups, num_samples)
    if groups < 2:
        return Estimate(value, math.nan)
    left_out = [statistic([i for i in range(num_samples) if i % groups != j]) for j in range(groups)]
    center = sum(left_out) / groups
    return Estimate(value, math.sqrt((groups - 1) / groups * sum((theta - center) ** 2 for theta in left_out)))


def weighted_mean(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    r"""Mean of independent estimates: $\sum_t w_t v_t$ with $\mathrm{SE}^2 = \sum_t w_t^2 \mathrm{SE}_t^2$, where the
    weights are first divided by their sum.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), section 5.4 (strata).
    """
    shares = [weight / sum(weights) for weight in weights]
    pairs = list(zip(shares, estimates, strict=True))
    return Estimate(
        sum(share * estimate.value for share, estimate in pairs),
        math.hypot(*(share * estimate.standard_error for share, estimate in pairs)),
    )
