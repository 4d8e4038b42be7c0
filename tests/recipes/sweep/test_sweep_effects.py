"""Main effects of tables whose effects are known, and the Pareto front against its definition."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.recipes.sweep.effects import LEAST, log_divergence, main_effects, pareto_front

SCORE = {"a": -0.5, "b": 0.1, "c": 0.4}
GROUPING = {"x": -0.2, "y": 0.2}
KEEP = {4: 0.3, 8: 0.0, 16: -0.3, 32: 0.0}
CELLS = list(itertools.product(SCORE, GROUPING, KEEP))
FACTORS = {name: [cell[i] for cell in CELLS] for i, name in enumerate(("score", "grouping", "keep"))}
ADDITIVE = [2.0 + SCORE[s] + GROUPING[g] + KEEP[k] for s, g, k in CELLS]


def test_an_additive_table_gives_its_own_effects() -> None:
    effects = {effect.factor: effect for effect in main_effects(FACTORS, ADDITIVE)}
    for name, given_effects in (("score", SCORE), ("grouping", GROUPING), ("keep", KEEP)):
        found = {level.name: level.mean - 2.0 for level in effects[name].levels}
        assert found == pytest.approx({str(level): value for level, value in given_effects.items()})
    assert effects["score"].spread == pytest.approx(0.9) and effects["grouping"].spread == pytest.approx(0.4)


def test_shares_are_the_variances_of_the_effects_and_sum_to_one_without_interaction() -> None:
    parts = {"score": (0.25 + 0.01 + 0.16) / 3, "grouping": 0.04, "keep": 0.18 / 4}
    shares = {effect.factor: effect.share for effect in main_effects(FACTORS, ADDITIVE)}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == pytest.approx({name: part / sum(parts.values()) for name, part in parts.items()})


def test_interaction_is_what_the_shares_lack() -> None:
    values = [1.0 if (s == "a") == (g == "x") else -1.0 for s, g in itertools.product("ab", "xy")]
    effects = main_effects({"score": list("aabb"), "grouping": list("xyxy")}, values)
    assert [effect.share for effect in effects] == [0.0, 0.0]


def test_deviation_is_that_of_the_rows_of_a_level() -> None:
    (effect,) = main_effects({"score": ["a", "a", "b"]}, [1.0, 3.0, 5.0])
    assert effect.levels[0].deviation == pytest.approx(math.sqrt(2)) and effect.levels[0].num_rows == 2
    assert math.isnan(effect.levels[1].deviation)


def test_a_table_without_variance_is_explained_by_nothing() -> None:
    assert [effect.share for effect in main_effects({"score": ["a", "b"]}, [1.0, 1.0])] == [0.0]


def test_the_order_of_rows_does_not_matter() -> None:
    noise = random.Random(0)
    values = [value + noise.gauss(0, 0.3) for value in ADDITIVE]
    order = noise.sample(range(len(CELLS)), len(CELLS))
    shuffled = main_effects(
        {name: [rows[i] for i in order] for name, rows in FACTORS.items()}, [values[i] for i in order]
    )
    for before, after in zip(main_effects(FACTORS, values), shuffled, strict=True):
        assert after.share == pytest.approx(before.share) and after.spread == pytest.approx(before.spread)
        means = {level.name: level.mean for level in before.levels}
        assert {level.name: level.mean for level in after.levels} == pytest.approx(means)


def test_effects_are_of_the_logarithm_and_a_perfect_student_is_finite() -> None:
    assert log_divergence(math.e) == pytest.approx(1)
    assert log_divergence(0.0) == log_divergence(-1e-16) == math.log(LEAST)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(costs: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in costs)

    front = pareto_front([(float(a), float(b)) for a, b in costs])
    assert [costs[index] for index in front] == sorted({point for point in costs if not beaten(point)})
