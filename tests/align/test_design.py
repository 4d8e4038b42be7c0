"""Designs over pairs: closed forms, the Kiefer-Wolfowitz certificate, a plain solver, spans, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.align.design import SOLVERS, g_optimal_design, leverages, pair_differences
from burnish.errors import BurnishError

BOTH = pytest.mark.parametrize("solver", SOLVERS)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(dimension: int) -> Tensor:
    """Differences of the features 0, e1 .. ed."""
    return pair_differences([torch.cat([torch.zeros(1, dimension), torch.eye(dimension)])])[0]


def moment(differences: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("p,pd,pe->de", weights, differences.double(), differences.double())


def largest_leverage(differences: Tensor, weights: Tensor) -> float:
    """Of all pairs, straight from the definition, in the span of what was chosen."""
    inverse = torch.linalg.pinv(moment(differences, weights), hermitian=True)
    return float(torch.einsum("pd,de,pe->p", differences.double(), inverse, differences.double()).max())


def plain_multiplicative(differences: Tensor, steps: int) -> Tensor:
    weights = torch.full((len(differences),), 1 / len(differences), dtype=torch.float64)
    for _ in range(steps):
        inverse = torch.linalg.inv(moment(differences, weights))
        weights = weights * torch.einsum("pd,de,pe->p", differences, inverse, differences) / differences.shape[1]
    return weights


@BOTH
def test_the_triangle_is_uniform(solver: str) -> None:
    design = g_optimal_design(simplex(2), solver=solver, tolerance=1e-9)
    torch.testing.assert_close(design.weights, torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert design.leverage == pytest.approx(2, abs=1e-8) and design.rank == 2
    assert design.logdet == pytest.approx(math.log(1 / 3), abs=1e-8)


@BOTH
def test_the_simplex_is_uniform_over_all_its_pairs(solver: str) -> None:
    design = g_optimal_design(simplex(8), solver=solver, tolerance=1e-8)
    torch.testing.assert_close(design.weights, torch.full((36,), 1 / 36, dtype=torch.float64), atol=1e-6, rtol=0)
    assert design.leverage == pytest.approx(8, abs=1e-6)


@BOTH
def test_one_feature_takes_the_longest_difference(solver: str) -> None:
    design = g_optimal_design(torch.tensor([[1.0], [-3.0], [2.0], [0.0]]), solver=solver)
    assert design.weights.tolist() == [0, 1, 0, 0]
    assert (design.leverage, design.rank, design.steps) == (pytest.approx(1), 1, 0)
    assert design.logdet == pytest.approx(math.log(9))


@BOTH
def test_the_certificate_is_that_of_the_definition(solver: str) -> None:
    differences = pair_differences([seeded(30, 4)])[0]
    assert len(differences) == 435
    design = g_optimal_design(differences, solver=solver, tolerance=1e-7)
    assert largest_leverage(differences, design.weights) == pytest.approx(design.leverage, rel=1e-10)
    assert 4 <= design.leverage <= 4 * (1 + 1e-7)
    assert len(design.support) <= 10  # d(d + 1) / 2 suffice for some optimum, and here it is unique
    assert design.logdet == pytest.approx(float(moment(differences, design.weights).logdet()), abs=1e-9)
    assert float(design.weights.sum()) == pytest.approx(1, abs=1e-12)


@BOTH
def test_the_optimum_is_that_of_the_plain_algorithm(solver: str) -> None:
    differences = pair_differences(seeded(12, 5, 6, seed=3))[0]
    plain = plain_multiplicative(differences, 3000)
    design = g_optimal_design(differences, solver=solver, tolerance=1e-5)
    assert design.logdet == pytest.approx(float(moment(differences, plain).logdet()), abs=1e-4)
    assert largest_leverage(differences, plain) == pytest.approx(6, abs=0.01)


def test_the_multiplicative_solver_takes_half_of_the_plain_steps() -> None:
    differences = pair_differences([seeded(30, 4)])[0]
    uniform = torch.full((435,), 1 / 435, dtype=torch.float64)
    weights, steps = SOLVERS["multiplicative"](differences, uniform, 0.01, 1000)
    assert largest_leverage(differences, weights) <= 4.04
    assert largest_leverage(differences, plain_multiplicative(differences, int(steps / 0.6))) > 4.04


@BOTH
def test_many_pairs_in_working_sets(solver: str) -> None:
    differences = pair_differences(seeded(400, 8, 16, seed=1) * torch.logspace(0, -3, 16))[0]
    design = g_optimal_design(differences, solver=solver)
    assert len(differences) == 11_200 and largest_leverage(differences, design.weights) <= 16 * 1.01 + 1e-9
    assert len(design.support) < 300


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dimension=st.integers(1, 5),
    pairs=st.integers(1, 40),
    tail=st.floats(0, 1.5),
    solver=st.sampled_from(list(SOLVERS)),
)
def test_any_differences_reach_the_tolerance(seed: int, dimension: int, pairs: int, tail: float, solver: str) -> None:
    lengths = seeded(pairs, 1, seed=seed + 1).abs().clamp(min=0.01) ** -tail
    differences = seeded(pairs, dimension, seed=seed) * lengths
    design = g_optimal_design(differences, solver=solver, tolerance=1e-3)
    assert design.rank == min(pairs, dimension)
    assert design.rank * (1 - 1e-9) <= design.leverage <= design.rank * 1.001
    assert bool((design.weights >= 0).all()) and float(design.weights.sum()) == pytest.approx(1)


def test_the_mean_leverage_of_any_design_is_the_dimension() -> None:
    differences = seeded(20_000, 3)  # more than one block
    weights = seeded(20_000, seed=1).softmax(0)
    found = leverages(differences, torch.linalg.inv(moment(differences, weights)))
    assert float(weights @ found) == pytest.approx(3, abs=1e-9) and float(found.max()) > 3
    inverse = torch.linalg.inv(moment(differences, weights))
    torch.testing.assert_close(found, ((differences @ inverse) * differences).sum(1))


def test_a_linear_map_of_the_features_changes_nothing() -> None:
    differences, turn = seeded(60, 4), seeded(4, 4, seed=7)
    one, other = (g_optimal_design(z, tolerance=1e-8) for z in (differences, differences @ turn))
    torch.testing.assert_close(one.weights, other.weights, atol=1e-5, rtol=0)
    assert other.logdet - one.logdet == pytest.approx(2 * float(turn.det().abs().log()), abs=1e-6)


@BOTH
def test_features_that_do_not_span_are_worked_on_in_their_span(solver: str) -> None:
    inner, embedding = seeded(50, 3), seeded(3, 6, seed=5)
    design = g_optimal_design(inner @ embedding, solver=solver, tolerance=1e-7)
    inside = g_optimal_design(inner, solver=solver, tolerance=1e-7)
    assert design.rank == 3 and design.leverage == pytest.approx(3, abs=1e-6)
    torch.testing.assert_close(design.weights, inside.weights, atol=1e-4, rtol=0)
    values = torch.linalg.eigvalsh(moment(inner @ embedding, design.weights))
    assert design.logdet == pytest.approx(float(values[-3:].log().sum()), abs=1e-8)


def test_the_unit_of_a_feature_is_no_reason_to_leave_it_out() -> None:
    differences = seeded(50, 3) * torch.tensor([1e-9, 1.0, 1e9])
    assert g_optimal_design(differences).rank == 3
    assert g_optimal_design(torch.cat([differences, torch.zeros(50, 1)], 1)).rank == 3


def test_rounding_of_float32_features_is_no_direction() -> None:
    low = (seeded(200, 2) @ seeded(2, 5, seed=1)).float()
    assert g_optimal_design(low).rank == 2
    assert g_optimal_design(low, rank_tolerance=1e-8).rank > 2


def test_equal_responses_are_never_chosen() -> None:
    differences = torch.cat([torch.zeros(5, 2), simplex(2), torch.zeros(5, 2)])
    assert g_optimal_design(differences).support.tolist() == [5, 6, 7]


def test_draws_follow_the_weights() -> None:
    design = g_optimal_design(seeded(40, 3), tolerance=1e-4)
    drawn = design.sample(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, design.sample(50_000, torch.Generator().manual_seed(0)))
    counts = torch.bincount(drawn, minlength=40)
    assert bool((counts[design.weights == 0] == 0).all())
    expected = 50_000 * design.weights[design.support]
    square = float(((counts[design.support] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert abs(square - freedom) < 4 * math.sqrt(2 * freedom)  # four standard deviations of chi squared


def test_differences_are_first_less_second_prompt_by_prompt() -> None:
    features = [seeded(3, 2), seeded(1, 2, seed=1), seeded(2, 2, seed=2)]
    differences, pairs = pair_differences(features)
    expected = [(p, a, b) for p, rows in enumerate(features) for a, b in itertools.combinations(range(len(rows)), 2)]
    assert pairs.tolist() == [list(row) for row in expected]
    torch.testing.assert_close(differences, torch.stack([features[p][a] - features[p][b] for p, a, b in expected]))


@pytest.mark.parametrize(
    ("features", "message"),
    [([torch.zeros(2, 3), torch.zeros(2, 4)], "one vector size"), ([torch.zeros(1, 3)], "no prompt has two")],
)
def test_candidates_that_make_no_pairs_are_refused(features: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_differences(features)


@pytest.mark.parametrize(
    ("differences", "options", "message"),
    [
        (torch.zeros(3, 2), {}, "all zero"),
        (torch.tensor([[1.0, math.nan]]), {}, "not finite"),
        (torch.zeros(0, 2), {}, "1 pair or more"),
        (torch.zeros(3), {}, "expected \\[pairs, d\\]"),
        (torch.eye(2), {"tolerance": 0.0}, "tolerance=0.0"),
        (torch.eye(2), {"solver": "simplex"}, "choose one of multiplicative, frank-wolfe"),
    ],
)
def test_bad_input_is_refused(differences: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        g_optimal_design(differences, **options)  # type: ignore[arg-type]


@BOTH
def test_a_tolerance_that_is_not_reached_is_an_error(solver: str) -> None:
    with pytest.raises(BurnishError, match="raise tolerance or max_steps"):
        g_optimal_design(seeded(100, 5), solver=solver, tolerance=1e-8, max_steps=3)
