"""Scales: sums, special cases, and least squares against the errors that it must not exceed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.densify.scale import SCALINGS, relative_block_error
from burnish.densify.statistics import LayerStatistics
from tests.densify.records import PROBABILITIES, gates_of, layer_statistics, random_layer

SINGLES = [[0], [2]]
ONES = torch.ones(3, dtype=torch.float64)


def scales(name: str, stats: LayerStatistics, groups: list[list[int]], importance: torch.Tensor = ONES) -> torch.Tensor:
    return SCALINGS[name].function(stats, groups, importance)


def test_uniform_sums_to_one() -> None:
    assert scales("uniform", layer_statistics(), SINGLES).tolist() == [0.5, 0.5]


def test_score_proportional_sums_to_one_and_equal_scores_are_uniform() -> None:
    stats = layer_statistics()
    uneven = scales("score", stats, [[0, 1], [2]], torch.tensor([1.0, 2, 1]).double())
    assert uneven.tolist() == [0.75, 0.25]
    assert scales("score", stats, SINGLES).tolist() == scales("uniform", stats, SINGLES).tolist()
    assert scales("score", stats, SINGLES, 0 * ONES).tolist() == [0.5, 0.5]


def test_mass_is_uniform_for_renormalising_routers_and_the_kept_mass_for_others() -> None:
    assert scales("mass", layer_statistics(), SINGLES).tolist() == pytest.approx([0.5, 0.5])
    raw = scales("mass", layer_statistics(renormalize=False), SINGLES)
    assert raw.tolist() == pytest.approx([0.45, 0.45])  # the mean top-2 mass is 0.9


def test_conditional_is_the_mean_weight_when_chosen() -> None:
    raw = scales("conditional", layer_statistics(renormalize=False), SINGLES)
    assert raw.tolist() == pytest.approx([1.3 / 3, 0.55])
    merged = scales("conditional", layer_statistics(renormalize=False), [[0, 2], [1]])
    assert merged.tolist() == pytest.approx([(1.3 / 3 + 0.55) / 2, 0.4])


def test_marginals_of_all_experts_sum_to_the_mean_mass() -> None:
    groups = [[0], [1], [2]]
    assert float(scales("marginal", layer_statistics(), groups).sum()) == pytest.approx(1)
    assert scales("marginal", layer_statistics(renormalize=False), groups).tolist() == pytest.approx(
        [0.325, 0.3, 0.275]
    )


def test_the_marginal_of_a_group_is_the_sum_of_its_experts() -> None:
    grouped = scales("marginal", layer_statistics(renormalize=False), [[0, 2], [1]])
    assert grouped.tolist() == pytest.approx([0.6, 0.3])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_least_squares_is_never_worse_than_any_other_constant(seed: int, keep: int) -> None:
    stats = random_layer(seed=seed)
    groups = [[expert] for expert in range(keep)]
    importance = torch.ones(6, dtype=torch.float64)
    best = relative_block_error(stats, groups, scales("least-squares", stats, groups, importance))
    assert best is not None
    for name in SCALINGS:
        other = relative_block_error(stats, groups, scales(name, stats, groups, importance))
        assert other is not None and best <= other + 1e-9
    zero = relative_block_error(stats, groups, torch.zeros(keep, dtype=torch.float64))
    assert zero == pytest.approx(1) and best <= 1 + 1e-9


def test_relative_block_error_is_the_error_of_the_outputs_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    gates, _ = gates_of(PROBABILITIES)
    block = torch.einsum("te,eth->th", gates, outputs)
    chosen = torch.tensor([0.3, 0.8], dtype=torch.float64)
    student = 0.3 * outputs[0] + 0.8 * outputs[2]
    expected = float((block - student).square().sum() / block.square().sum())
    assert relative_block_error(layer_statistics(outputs), SINGLES, chosen) == pytest.approx(expected)


def test_relative_block_error_is_not_claimed_where_it_is_not_known() -> None:
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert relative_block_error(layer_statistics(), SINGLES, half) is None
    assert relative_block_error(random_layer(), [[0, 1], [2]], half) is None


def test_least_squares_refuses_merged_groups() -> None:
    with pytest.raises(ValueError, match="groups of one expert"):
        scales("least-squares", random_layer(), [[0, 1], [2]])


def test_least_squares_survives_exact_duplicates() -> None:
    outputs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs[1] = outputs[0]
    found = scales("least-squares", layer_statistics(outputs), [[0], [1], [2]])
    assert bool(torch.isfinite(found).all())
