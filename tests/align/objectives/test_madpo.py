"""MADPO: the table of stretches and weights, and the margin that labels of a reward model lead to."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from burnish.align.objectives import dpo, madpo, margin_weight
from burnish.align.objectives.madpo import margin_stretch
from tests.align.objectives.example import value

TABLE = {
    -3: (0.733044, 1.0),
    -1: (1.364175, 0.756903),
    0: (1.680479, 1.0),
    1: (1.364175, 1.089430),
    2: (1.0, 1.0),
    4: (0.595068, 0.932075),
    8: (0.501857, 0.982604),
}


def test_the_table_of_the_card() -> None:
    margins = torch.tensor(list(TABLE), dtype=torch.float64)
    stretches, weights = zip(*TABLE.values(), strict=True)
    assert margin_stretch(margins).tolist() == pytest.approx(stretches, abs=5e-7)
    assert margin_weight(margins).tolist() == pytest.approx(weights, abs=5e-7)


def test_the_stretch_is_its_formula_with_other_options() -> None:
    found = margin_stretch(torch.tensor([-5.0, 1.5]).double(), c_max=3.0, c_min=0.2, tau=4.0, steepness=0.7)
    formula = [0.2 + 2.8 / (1 + 2.0 / 0.8 * math.exp(0.7 * (size - 4.0))) for size in (5.0, 1.5)]
    assert found.tolist() == pytest.approx(formula, rel=1e-12)
    assert margin_weight(torch.tensor(-5.0), c_max=3.0, c_min=0.2, tau=4.0, steepness=0.7).item() == 1
    stretch = 0.2 + 2.8 / (1 + 2.0 / 0.8 * math.exp(0.7 * (1.2 - 4.0)))
    weight = (1 + math.exp(-1.2)) / (1 + math.exp(-1.2 * stretch))
    found_loss = value(madpo, beta=0.3, c_max=3.0, c_min=0.2, tau=4.0, steepness=0.7)
    assert found_loss == pytest.approx(weight * value(dpo, beta=0.3), rel=1e-12)


@pytest.mark.parametrize("margin", [0.3, 1.0, 1.9])
def test_over_labels_of_the_reward_model_the_margin_is_stretched(margin: float) -> None:
    p = torch.tensor(margin, dtype=torch.float64).sigmoid().item()

    def mean(learned: float) -> float:
        return p * _at(learned, margin) + (1 - p) * _at(-learned, -margin)

    stretch = margin_stretch(torch.tensor(margin, dtype=torch.float64)).item()
    assert minimize_scalar(mean, bounds=(-10, 10)).x == pytest.approx(stretch * margin, abs=1e-4)


def _at(learned: float, rewards: float) -> float:
    changes = {"chosen_logps": learned - 14.0, "ref_chosen_logps": -13.5, "chosen_rewards": rewards}
    return value(madpo, changes={**changes, "rejected_rewards": 0.0}, beta=1.0)


def test_the_weight_is_continuous_at_the_threshold_and_one_at_tau() -> None:
    margins = torch.tensor([-2.0001, -2.0, -1.9999, 2.0], dtype=torch.float64)
    assert margin_weight(margins).tolist() == pytest.approx([1, 1, 1, 1], abs=1e-4)
    assert margin_weight(torch.tensor([-1e4, 1e4])).tolist() == [1, 1]


def test_a_pair_weighs_dpo_and_rewards_take_no_gradient() -> None:
    weight = margin_weight(torch.tensor(1.2, dtype=torch.float64)).item()
    assert value(madpo, beta=0.1) == pytest.approx(weight * value(dpo, beta=0.1), rel=1e-13)
    assert weight > 1.05
    rewards = torch.ones(1, requires_grad=True)
    assert not margin_weight(rewards).requires_grad
