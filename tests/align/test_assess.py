"""Diagnostics: hand-made numbers, scipy's interval, and limits where a measure must be 0, a half or 1."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from burnish.align.assess import (
    RIDGE,
    Observed,
    assess,
    described,
    finite,
    mean_over_prompts,
    pairs_log_det,
    stacked,
    variance_unit,
    wilson_interval,
    win_rate,
)
from burnish.align.coverage import sample_covariance


def observed(seed: int, scale: float = 1.0, **changes: Tensor) -> Observed:
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "lengths": torch.tensor([[2, 4]] * 50),
        "ended": torch.tensor([[True, False]] * 50),
        "logps": -torch.rand(50, 2, generator=generator, dtype=torch.float64),
        "ref_logps": -torch.rand(50, 2, generator=generator, dtype=torch.float64),
        "rewards": torch.randn(50, 2, generator=generator, dtype=torch.float64),
        "features": scale * torch.randn(50, 2, 3, generator=generator, dtype=torch.float64),
    }
    return Observed(**parts | changes)


def test_errors_take_prompts_as_the_units() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0], [0.0, 2.0]])  # means 2, 6, 1
    mean, error = mean_over_prompts(values)
    assert mean == 3.0 and error == pytest.approx(math.sqrt(7 / 3))  # variance (1 + 9 + 4) / 2
    assert math.isnan(mean_over_prompts(values[:1])[1])


def test_a_win_rate_counts_all_pairs_of_a_prompt_and_ties_half() -> None:
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, -1.0]])
    assert win_rate(ours, theirs) == ((0.5 + 1 + 1 + 1) + (0 + 1 + 0 + 1)) / 8
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == 1
    assert win_rate(ours, ours) == 0.5


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (7, 10), (10, 10), (450, 1000)])
def test_the_interval_is_wilsons(wins: int, count: int) -> None:
    expected = binomtest(wins, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(wins / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_policy_that_is_its_reference() -> None:
    same = observed(0)
    same = observed(0, ref_logps=same.logps)
    found = assess(same, same, same)
    assert found["kl"] == found["kl_error"] == found["gain"] == found["gain_error"] == 0.0
    assert found["win_rate"] == pytest.approx(win_rate(same.rewards, same.rewards))  # type: ignore[arg-type]
    for name in ("coverage", "coverage_trace", "reference_coverage", "reference_coverage_trace"):
        assert found[name] == pytest.approx(1.0)


def test_what_is_told_of_a_policy() -> None:
    policy, reference, before = observed(1, scale=2.0), observed(2), observed(3, scale=0.5)
    found = assess(policy, reference, before)
    assert (found["length"], found["ended"]) == (3.0, 0.5)
    assert found["kl"] == pytest.approx(float((policy.logps - policy.ref_logps).mean()))
    assert found["entropy"] == pytest.approx(-float(policy.logps.mean())) and found["entropy"] > 0
    assert policy.rewards is not None and reference.rewards is not None
    assert found["reward"] == pytest.approx(float(policy.rewards.mean()))
    gains = policy.rewards.mean(1) - reference.rewards.mean(1)
    assert found["gain"] == pytest.approx(float(gains.mean()))
    assert found["gain_error"] == pytest.approx(float(gains.std()) / math.sqrt(50))
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]
    assert (found["win_rate_low"], found["win_rate_high"]) == wilson_interval(found["win_rate"], 50)


def test_coverage_is_large_where_others_rarely_went() -> None:
    """Features of twice and of half the size: ratios of variances around 4 and 16, by the reference and before."""
    features = observed(1).features
    assert features is not None
    policy, reference, before = (observed(1, features=scale * features) for scale in (2.0, 1.0, 0.5))
    found = assess(policy, reference, before)
    ridged = (4 + 4 * RIDGE) / (1 + 4 * RIDGE)  # the ridge is a share of the target's mean variance
    assert found["reference_coverage_trace"] == pytest.approx(ridged, rel=0.02)
    assert found["coverage_trace"] == pytest.approx((16 + 16 * RIDGE) / (1 + 16 * RIDGE), rel=0.05)
    assert found["coverage"] > found["reference_coverage"] > 1
    turned = assess(reference, policy, policy)
    assert turned["coverage"] < 1 and turned["log_det"] < found["log_det"]


def test_log_determinants_of_pairs_and_of_policies_have_one_unit() -> None:
    """Independent pairs of the policy have differences of twice its covariance."""
    features = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = variance_unit(sample_covariance(features))
    assert unit == pytest.approx(RIDGE, rel=0.05)
    told = assess(observed(1, features=features), observed(1, features=features))
    assert pairs_log_det(features[:, 0] - features[:, 1], unit) == pytest.approx(told["log_det"], abs=1e-6)
    assert told["log_det"] == pytest.approx(3 * math.log(1 + 1 / RIDGE), rel=0.01)


def test_what_was_not_observed_is_not_told() -> None:
    bare = observed(0)
    bare = Observed(bare.lengths, bare.ended, bare.logps, bare.ref_logps)
    assert list(assess(bare, bare, bare)) == ["length", "ended", "kl", "kl_error", "entropy", "entropy_error"]
    assert "coverage" not in assess(observed(0), observed(1))


def test_lines_in_json_and_in_words() -> None:
    assert finite({"a": 1.0, "b": math.nan, "c": math.inf}) == {"a": 1.0, "b": None, "c": None}
    line = {"kl": 2.0, "kl_error": 0.125, "entropy": 30.25, "entropy_error": None}
    assert described(line) == "KL 2 ± 0.12, entropy 30.2"
    line |= {"reward": 0.5, "reward_error": 0.01, "win_rate": 0.75, "win_rate_low": 0.6, "win_rate_high": 0.87}
    assert described(line) == (
        "reward 0.5 ± 0.01, KL 2 ± 0.12, entropy 30.2, wins 75 % (60 to 87 %) against the reference"
    )
    assert stacked([{"x": [1]}, {"x": [2]}], "x").tolist() == [[1], [2]]  # type: ignore[union-attr]
    assert stacked([{"x": 1}], "y") is None
