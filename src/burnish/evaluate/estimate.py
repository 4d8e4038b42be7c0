"""A mean per token with the standard error that its sequences give it. Knows no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, in the same unit; the error is NaN where one sequence is all there is."""

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
