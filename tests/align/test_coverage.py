"""Coverage: by hand, by enumeration, its characterisation, its invariance, and the bound on how fast it changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from burnish.align.coverage import (
    growth_bound,
    log_determinant,
    relative_variances,
    sample_covariance,
    sampling_covariance,
    spectral_coverage,
    trace_coverage,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, dimension: int = 4) -> Tensor:
    root = seeded(dimension, dimension + 2, seed=seed)
    return root @ root.mT


def test_two_actions_by_hand() -> None:
    probabilities = torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=torch.float64)
    features = torch.tensor([[[0.0], [1.0]], [[5.0], [9.0]]], dtype=torch.float64)
    assert float(sampling_covariance(probabilities, features)) == pytest.approx((0.21 + 4) / 2)


def test_it_is_half_the_mean_square_of_differences_and_blind_to_what_a_context_adds() -> None:
    probabilities, features = seeded(3, 5).softmax(-1), seeded(3, 5, 2, seed=1)
    found = sampling_covariance(probabilities, features)
    differences = features.unsqueeze(1) - features.unsqueeze(2)  # [contexts, actions, actions, d]
    both = probabilities.unsqueeze(1) * probabilities.unsqueeze(2) / 3
    torch.testing.assert_close(found, torch.einsum("xab,xabd,xabe->de", both, differences, differences) / 2)
    torch.testing.assert_close(found, sampling_covariance(probabilities, features + seeded(3, 1, 2, seed=2)))


def test_policies_in_leading_dimensions() -> None:
    probabilities, features = seeded(2, 4, 3, 5).softmax(-1), seeded(3, 5, 2, seed=1)
    found = sampling_covariance(probabilities, features)
    torch.testing.assert_close(found[1, 2], sampling_covariance(probabilities[1, 2], features))


def test_samples_estimate_it_without_bias() -> None:
    """The mean over every outcome of three draws, weighted by its probability."""
    probabilities, features = seeded(1, 3).softmax(-1), seeded(1, 3, 2, seed=1)
    mean = torch.zeros(2, 2, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=3):
        mean += probabilities[0, list(drawn)].prod() * sample_covariance([features[0, list(drawn)]])
    torch.testing.assert_close(mean, sampling_covariance(probabilities, features))


def test_prompts_weigh_the_same_and_single_responses_do_not_count() -> None:
    first, second = seeded(2, 3), seeded(5, 3, seed=1)
    expected = (sample_covariance([first]) + sample_covariance([second])) / 2
    torch.testing.assert_close(sample_covariance([first, seeded(1, 3), second]), expected)
    with pytest.raises(ValueError, match="at least 2 samples"):
        sample_covariance(seeded(4, 1, 3))


def test_axes_by_hand() -> None:
    sampler, target = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([2.0, 2.0]))
    assert relative_variances(sampler, target).tolist() == pytest.approx([0.5, 2.0])
    assert float(spectral_coverage(sampler, target)) == pytest.approx(2)
    assert float(trace_coverage(sampler, target)) == pytest.approx(2.5)
    # the mean variance of the target is 2: a ridge of 1/2 adds 1 to everything
    assert relative_variances(sampler, target, ridge=0.5).tolist() == pytest.approx([3 / 5, 3 / 2])


def test_a_sampler_covers_itself_once() -> None:
    assert float(spectral_coverage(covariance(0), covariance(0))) == pytest.approx(1)
    assert float(trace_coverage(covariance(0), covariance(0))) == pytest.approx(4)


def test_an_invertible_map_of_the_features_changes_nothing() -> None:
    turn, sampler, target = seeded(4, 4, seed=9), covariance(0), covariance(1)
    turned = relative_variances(turn @ sampler @ turn.mT, turn @ target @ turn.mT)
    torch.testing.assert_close(turned, relative_variances(sampler, target))


def test_it_is_the_least_constant_for_every_direction() -> None:
    sampler, target = covariance(0), covariance(1)
    directions = seeded(4000, 4, seed=2)
    ratios = ((directions @ target) * directions).sum(1) / ((directions @ sampler) * directions).sum(1)
    largest = float(spectral_coverage(sampler, target))
    assert 0.9 * largest < float(ratios.max()) <= largest * (1 + 1e-12)
    assert float(trace_coverage(sampler, target)) == pytest.approx(float((sampler.inverse() @ target).trace()))


def test_what_is_never_sampled_is_infinitely_badly_covered() -> None:
    flat, full = torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([6.0, 1.0]))
    assert float(spectral_coverage(flat, full)) == math.inf and float(trace_coverage(flat, full)) == math.inf
    # an axis along which neither moves is no axis of the features
    assert float(spectral_coverage(flat, 2 * flat)) == pytest.approx(2)
    assert float(trace_coverage(flat, 2 * flat)) == pytest.approx(2)
    stacked = spectral_coverage(torch.stack([flat, full]), full)
    assert stacked.tolist() == [math.inf, pytest.approx(1)]


def test_growth_is_bounded_on_both_sides() -> None:
    for seed in range(200):
        features, reference = seeded(3, 6, 2, seed=seed), seeded(3, 6, seed=seed + 1000)
        target, theta = seeded(2, 2, seed=seed + 2000)
        policies = [(reference + features @ one).softmax(-1) for one in (theta, target)]
        found = relative_variances(*(sampling_covariance(one, features) for one in policies))
        bound = float(growth_bound(features, theta, target))
        assert 1 / bound <= float(found[0]) and float(found[1]) <= bound


def test_the_bound_is_reached_by_a_rare_action_at_the_far_end() -> None:
    features = torch.tensor([[[-2.0], [2.0]]], dtype=torch.float64)
    reference = torch.tensor([[0.0, -16.0]], dtype=torch.float64)
    target = torch.zeros(1, dtype=torch.float64)
    theta = torch.tensor([[-0.3], [0.3]], dtype=torch.float64)
    policies = (reference + torch.einsum("xad,...d->...xa", features, theta)).softmax(-1)
    found = spectral_coverage(
        sampling_covariance(policies, features), sampling_covariance(reference.softmax(-1), features)
    )
    bound = growth_bound(features, theta, target)
    assert float(found[0] / bound[0]) == pytest.approx(1, abs=1e-5)  # away from the rare action
    assert float(found[1] * bound[1]) == pytest.approx(1, abs=1e-5)  # towards it


def test_log_determinant_by_hand() -> None:
    assert float(log_determinant(torch.zeros(3, 3), 0.1)) == 0
    assert float(log_determinant(torch.diag(torch.tensor([1.0, 3.0])), 0.5)) == pytest.approx(math.log(3 * 7))
    with pytest.raises(ValueError, match="above 0"):
        log_determinant(torch.eye(2), 0.0)
