"""Scores against the worked examples: probabilities of 4 tokens over 3 experts, top-2 routing."""

from __future__ import annotations

import pytest
import torch

from burnish.densify.score import SCORES, conditional_probability, importance
from tests.densify.records import PROBABILITIES, constant_outputs, layer_statistics, outputs_of_norms

WORKED = {
    "sf": [0.75, 0.75, 0.5],
    "pp": [0.35, 0.325, 0.325],
    "cp": [1.3 / 3, 1.2 / 3, 1.1 / 2],
    "acp": [0.8666666667, 0.8, 0.55],
    "do-acp": [0.8666666667, 0.8, 0.55],
}
WORKED_NORMS = {
    "reap": [1.2592592593, 0.8518518519, 1.4444444444],
    "ean": [7 / 3, 2.0, 2.5],
    "acp": [1.016257, 0.774597, 1.065070],
}


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


@pytest.mark.parametrize("score", WORKED)
def test_worked_example(score: str) -> None:
    close(importance(layer_statistics(constant_outputs()), score), WORKED[score])


@pytest.mark.parametrize("score", WORKED_NORMS)
def test_worked_example_with_varying_norms(score: str) -> None:
    close(importance(layer_statistics(outputs_of_norms()), score), WORKED_NORMS[score], 1e-6)


def test_reap_without_renormalisation() -> None:
    close(
        importance(layer_statistics(outputs_of_norms(), renormalize=False), "reap"), [1.1333333, 0.7666667, 1.3], 1e-6
    )


def test_conditional_probability_of_the_gate_weight() -> None:
    close(conditional_probability(layer_statistics(), "gate"), [0.4814814815, 0.4444444444, 0.6111111111])


def test_selection_frequency_sums_to_top_k_and_preselection_to_one() -> None:
    stats = layer_statistics()
    assert float(importance(stats, "sf").sum()) == pytest.approx(2)
    assert float(importance(stats, "pp").sum()) == pytest.approx(1)


def test_frequency_times_conditional_is_the_marginal_mass() -> None:
    stats = layer_statistics()
    close(importance(stats, "sf") * importance(stats, "cp"), [0.325, 0.3, 0.275])


def test_reap_equals_acp_for_constant_norms_without_renormalisation() -> None:
    stats = layer_statistics(constant_outputs(), renormalize=False)
    torch.testing.assert_close(importance(stats, "reap"), importance(stats, "acp"))


@pytest.mark.parametrize("score", SCORES)
def test_an_expert_without_tokens_scores_finite(score: str) -> None:
    probabilities = PROBABILITIES.clone()
    probabilities[:, 2] = 1e-6  # never among the top 2
    scores = importance(layer_statistics(constant_outputs(), probabilities=probabilities), score)
    assert bool(torch.isfinite(scores).all())
    if score not in ("pp",):
        assert float(scores[2]) == 0.0


def test_needs_outputs_says_which_scores_need_every_expert() -> None:
    router_only = layer_statistics()
    for name, row in SCORES.items():
        if row.needs_outputs:
            with pytest.raises(AssertionError):
                importance(router_only, name)
        else:
            assert importance(router_only, name).shape == (3,)
