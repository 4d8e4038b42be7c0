"""Preference distillation: the card's pair, its symmetry, its limits."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from burnish.align.objectives import mixture, pmle, preference_distillation
from tests.align.objectives.example import of, random_pairs, slopes, swapped, value

LONG = {"chosen_logps": -40.0, "rejected_logps": -42.5}


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def test_the_numbers_of_the_card() -> None:
    target = 0.768525
    assert value(preference_distillation) == pytest.approx(0.644434, abs=5e-7)
    assert value(preference_distillation) - entropy(target) == pytest.approx(0.103381, abs=2e-6)
    assert value(preference_distillation, changes=LONG) == pytest.approx(0.633808, abs=5e-7)
    assert value(preference_distillation, changes=LONG) - entropy(target) == pytest.approx(0.0927555, abs=2e-6)
    assert slopes(preference_distillation, changes=LONG) == pytest.approx((-0.0206348, 0.0206348), abs=5e-8)
    near = {"chosen_logps": -40.0, "rejected_logps": -52.3}
    least = {"chosen_logps": -40.0, "rejected_logps": -52.0}
    gap = value(preference_distillation, changes=near) - value(preference_distillation, changes=least)
    assert gap == pytest.approx(7.9622e-5, abs=5e-10)


def test_it_is_least_where_the_log_ratio_is_the_scaled_reward() -> None:
    def at(margin: float) -> float:
        changes = {"chosen_logps": margin - 40, "rejected_logps": -40.0}
        return value(preference_distillation, changes=changes, gamma=0.2, reward_scale=2.0)

    assert minimize_scalar(at, bounds=(-100, 100)).x == pytest.approx(2.0 * 1.2 / 0.2, abs=1e-3)


def test_the_order_of_the_answers_does_not_matter() -> None:
    pairs = random_pairs(0)
    assert torch.equal(of(preference_distillation, pairs), of(preference_distillation, swapped(pairs)))


def test_certain_rewards_make_it_pmle() -> None:
    pairs = random_pairs(1)
    sure = pairs | {"chosen_rewards": torch.full((6,), 1e3).double(), "rejected_rewards": torch.zeros(6).double()}
    assert torch.equal(of(preference_distillation, sure, gamma=0.3), of(pmle, pairs, gamma=0.3))
    lost = pairs | {"chosen_rewards": sure["rejected_rewards"], "rejected_rewards": sure["chosen_rewards"]}
    assert torch.equal(of(preference_distillation, lost, gamma=0.3), of(pmle, swapped(pairs), gamma=0.3))


def test_it_is_pmle_with_a_soft_label() -> None:
    pairs = random_pairs(2)
    pairs["labels"] = torch.sigmoid(0.7 * (pairs["chosen_rewards"] - pairs["rejected_rewards"]))
    soft = of(mixture(pmle), pairs, gamma=0.1)
    assert torch.allclose(of(preference_distillation, pairs, reward_scale=0.7), soft, rtol=1e-13)


def test_rewards_are_clipped_one_by_one_and_take_no_gradient() -> None:
    for chosen, rejected, clipped in ((9.0, -0.25, (1.5, -0.25)), (-9.0, 7.0, (-1.5, 1.5)), (0.5, -9.0, (0.5, -1.5))):
        found = value(
            preference_distillation,
            changes={"chosen_rewards": chosen, "rejected_rewards": rejected},
            reward_clip=1.5,
        )
        as_clipped = dict(zip(("chosen_rewards", "rejected_rewards"), clipped, strict=True))
        assert found == value(preference_distillation, changes=as_clipped)
    pairs = random_pairs(3)
    pairs["chosen_rewards"].requires_grad_()
    assert not of(preference_distillation, pairs).requires_grad
