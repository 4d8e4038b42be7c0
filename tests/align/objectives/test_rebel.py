"""REBEL and the two forms of reward distillation."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize_scalar

from burnish.align.objectives import preference_distillation, rebel, reward_distillation, reward_distillation_ce
from tests.align.objectives.example import of, random_pairs, slopes, swapped, value


def test_the_worked_pair() -> None:
    assert value(rebel, eta=1.0) == pytest.approx(0.09, abs=1e-12)
    assert slopes(rebel, eta=1.0) == pytest.approx((0.6, -0.6))
    assert value(rebel, eta=0.5) == pytest.approx(0.81, abs=1e-12)


@pytest.mark.parametrize("loss", [reward_distillation, reward_distillation_ce])
def test_reward_distillation_is_least_at_the_tilted_reference(loss: object) -> None:
    def at(margin: float) -> float:
        return value(loss, changes={"chosen_logps": margin - 13.5}, beta=0.4)  # type: ignore[arg-type]

    # chosen - ref chosen = margin - 0.5, rejected - ref rejected = -0.5
    assert minimize_scalar(at, bounds=(-50, 50)).x == pytest.approx(1.2 / 0.4, abs=1e-4)


def test_the_tilted_reference_has_no_loss_for_any_pair() -> None:
    pairs = random_pairs(0)
    tilted = pairs | {
        f"{side}_logps": pairs[f"ref_{side}_logps"] + pairs[f"{side}_rewards"] / 0.4 - 3.0
        for side in ("chosen", "rejected")
    }
    assert of(reward_distillation, tilted, beta=0.4).abs().max() < 1e-20
    assert of(reward_distillation, pairs, beta=0.4).min() > 1e-3


def test_its_cross_entropy_is_preference_distillation_of_log_ratios() -> None:
    pairs = random_pairs(1)
    ratios = pairs | {
        f"{side}_logps": pairs[f"{side}_logps"] - pairs[f"ref_{side}_logps"] for side in ("chosen", "rejected")
    }
    found = of(reward_distillation_ce, pairs, beta=0.4)
    assert torch.allclose(found, of(preference_distillation, ratios, gamma=0.4), rtol=1e-12)


@pytest.mark.parametrize("loss", [rebel, reward_distillation, reward_distillation_ce])
def test_the_order_of_the_answers_does_not_matter(loss: object) -> None:
    pairs = random_pairs(2)
    assert torch.allclose(of(loss, pairs), of(loss, swapped(pairs)), rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [rebel, reward_distillation, reward_distillation_ce])
def test_rewards_take_no_gradient(loss: object) -> None:
    pairs = random_pairs(3)
    pairs["chosen_rewards"].requires_grad_()
    assert not of(loss, pairs).requires_grad  # type: ignore[arg-type]
