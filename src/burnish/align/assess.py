"""What completions say about the policy that drew them: reward, win rate, divergence, entropy, coverage.

Pure functions of what was observed. Prompts are the independent units of every error and interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.align.coverage import log_determinant, sample_covariance, spectral_coverage, trace_coverage

NORMAL_95 = 1.959963984540054
RIDGE = 0.01
"""Share of the mean variance that is added to covariances, which come from few samples."""


@dataclass(frozen=True)
class Observed:
    """Completions of some prompts, `k` of each.

    Attributes:
        lengths: Tensor `[prompts, k]`: tokens.
        ended: Tensor `[prompts, k]`, bool.
        logps: Tensor `[prompts, k]`, float64: of the policy that drew them.
        ref_logps: Tensor `[prompts, k]`, float64: of the reference.
        rewards: Tensor `[prompts, k]`, float64, or None.
        features: Tensor `[prompts, k, d]`, float64, or None.
    """

    lengths: Tensor
    ended: Tensor
    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor | None = None
    features: Tensor | None = None


def assess(policy: Observed, reference: Observed, before: Observed | None = None) -> dict[str, float]:
    """The diagnostics of a policy.

    Args:
        policy: what it drew, at temperature 1 and without a cut of the distribution for `kl` and `entropy` to be right.
        reference: what the reference drew for the same prompts.
        before: what the policy of the round before drew for the same prompts.

    Returns:
        `length`, tokens, and `ended`, a share; `kl`, KL(policy || reference), and `entropy`, nats per completion;
        `reward`, and `gain`, its difference to the reference's on the same prompts; each `NAME_error` is one standard
        error. `win_rate`, the share of pairs with a completion of the reference that the policy's wins, a tie counting
        half, from `win_rate_low` to `win_rate_high` with 95 % confidence. How the samples of others cover the policy:
        `coverage`, the largest ratio of variances, by the round before, and `reference_coverage` by the reference;
        `coverage_trace` and `reference_coverage_trace`, means over all directions; 1 is perfect, up to the noise of few
        samples, which the very first policy shows. `log_det`, that of the covariance of the policy's features over
        `RIDGE` of the reference's mean variance: variety.
    """
    found = {"length": float(policy.lengths.double().mean()), "ended": float(policy.ended.double().mean())}
    found |= _named("kl", *mean_over_prompts(policy.logps - policy.ref_logps))
    found |= _named("entropy", *mean_over_prompts(-policy.logps))
    if policy.rewards is not None and reference.rewards is not None:
        found |= _named("reward", *mean_over_prompts(policy.rewards))
        gains = policy.rewards.mean(1) - reference.rewards.mean(1)
        found |= _named("gain", *mean_over_prompts(gains[:, None]))
        rate = win_rate(policy.rewards, reference.rewards)
        low, high = wilson_interval(rate, len(gains))
        found |= {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
    if policy.features is not None and reference.features is not None:
        target, start = sample_covariance(policy.features), sample_covariance(reference.features)
        found |= _coverage("reference_coverage", start, target)
        if before is not None and before.features is not None:
            found |= _coverage("coverage", sample_covariance(before.features), target)
        found["log_det"] = float(log_determinant(target, variance_unit(start)))
    return found


def mean_over_prompts(values: Tensor) -> tuple[float, float]:
    """Mean of values `[prompts, k]`, and its standard error with prompts as the independent units; NaN for one prompt.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), section 9.2 (clusters of equal size).
    """
    means = values.double().mean(1)
    error = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(means.mean()), error


def win_rate(rewards: Tensor, others: Tensor) -> float:
    """The chance that a completion has a larger reward than another's of the same prompt; a tie counts half.

    Args:
        rewards: Tensor `[prompts, k]`.
        others: Tensor `[prompts, m]`.
    """
    difference = rewards[:, :, None] - others[:, None, :]  # [prompts, k, m]
    return float(((difference.sign().double() + 1) / 2).mean())


def wilson_interval(share: float, count: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` trials.

    Trials whose outcome lies between 0 and 1 vary less than those of 0 or 1 of the same mean, so that the interval is
    wide enough for them, too.

    >>> low, high = wilson_interval(0.5, 100)
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)

    Source: Wilson, JASA 22 (1927), 209-212.
    """
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    centre, scale = share + z**2 / (2 * count), 1 + z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def pairs_log_det(differences: Tensor, unit: float) -> float:
    """log det(1 + V / unit) of V, half of the mean of z z': as `log_det` of the sampler of independent pairs.

    Args:
        differences: z, Tensor `[pairs, d]`, float64.
        unit: of `variance_unit`.
    """
    return float(log_determinant(differences.mT @ differences / (2 * len(differences)), unit))


def variance_unit(covariance: Tensor) -> float:
    """What counts as no variance: RIDGE of the mean variance of a covariance `[d, d]`."""
    return RIDGE * float(covariance.diagonal().mean())


def finite(values: dict[str, float]) -> dict[str, Any]:
    """As JSON has them: None for what is not a finite number."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def described(line: dict[str, Any]) -> str:
    """A line of diagnostics in words."""
    parts = [f"KL {_with_error(line, 'kl')}", f"entropy {_with_error(line, 'entropy')}"]
    if "reward" in line:
        low, high = (100 * line[f"win_rate_{end}"] for end in ("low", "high"))
        parts.insert(0, f"reward {_with_error(line, 'reward')}")
        parts.append(f"wins {100 * line['win_rate']:.0f} % ({low:.0f} to {high:.0f} %) against the reference")
    return ", ".join(parts)


def _with_error(line: dict[str, Any], name: str) -> str:
    error = line[f"{name}_error"]
    return f"{line[name]:.3g}" + (f" ± {error:.2g}" if error else "")


def _named(name: str, value: float, error: float) -> dict[str, float]:
    return {name: value, f"{name}_error": error}


def _coverage(name: str, sampler: Tensor, target: Tensor) -> dict[str, float]:
    return {
        name: float(spectral_coverage(sampler, target, ridge=RIDGE)),
        f"{name}_trace": float(trace_coverage(sampler, target, ridge=RIDGE)) / len(target),
    }


def stacked(rows: Sequence[dict[str, Any]], name: str) -> Tensor | None:
    """A column of rows as a Tensor `[rows, ...]`, float64; None where the rows do not have it."""
    return torch.tensor([row[name] for row in rows], dtype=torch.float64) if name in rows[0] else None
