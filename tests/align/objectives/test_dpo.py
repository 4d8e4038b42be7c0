"""DPO and its kin against the worked pair and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.align.objectives import dpo, hinge, sigmoid_norm
from tests.align.objectives.example import at_margin, of, random_pairs, slopes, swapped, value


def test_the_worked_pair() -> None:
    assert value(dpo) == pytest.approx(0.620957, abs=5e-7)
    assert slopes(dpo) == pytest.approx((-0.0462570, 0.0462570), abs=5e-8)
    assert value(hinge) == pytest.approx(0.85, abs=1e-12)
    assert slopes(hinge) == pytest.approx((-0.1, 0.1), abs=1e-12)
    assert value(sigmoid_norm, beta=0.1) == pytest.approx(0.676619, abs=5e-7)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_a_policy_that_is_its_reference_has_loss_ln_2_and_slope_half_beta(beta: float) -> None:
    same = {"ref_chosen_logps": -12.0, "ref_rejected_logps": -14.0}
    assert value(dpo, changes=same, beta=beta) == pytest.approx(math.log(2), abs=1e-15)
    assert slopes(dpo, changes=same, beta=beta) == pytest.approx((-beta / 2, beta / 2), rel=1e-12)
    assert value(hinge, changes=same, beta=beta) == 1
    assert value(sigmoid_norm, changes=same, beta=beta) == pytest.approx(math.log(2), abs=1e-15)


def test_the_two_orders_differ_by_the_logit() -> None:
    pairs = random_pairs(0)
    margin = pairs["chosen_logps"] - pairs["ref_chosen_logps"] - pairs["rejected_logps"] + pairs["ref_rejected_logps"]
    difference = of(dpo, swapped(pairs), beta=0.3) - of(dpo, pairs, beta=0.3)
    assert torch.allclose(difference, 0.3 * margin, atol=1e-12)


def test_hinge_is_done_at_margin_one_over_beta() -> None:
    assert at_margin(hinge, 9.99, beta=0.1) == pytest.approx(0.001)
    assert at_margin(hinge, 10.01, beta=0.1) == 0
    assert slopes(hinge, changes={"chosen_logps": -1.0}) == (0, 0)


def test_sigmoid_norm_is_dpo_for_answers_of_one_token_and_wins_nothing_by_length() -> None:
    pairs = random_pairs(1)
    ones = pairs | {name: torch.ones_like(pairs[name]) for name in pairs if name.endswith("lengths")}
    assert torch.equal(of(sigmoid_norm, ones, beta=0.1), of(dpo, pairs, beta=0.1))
    # Twice as long at the same log-ratio per token.
    longer = {name: pairs[name] * 2 if "rejected" in name else pairs[name] for name in pairs}
    assert torch.allclose(of(sigmoid_norm, longer), of(sigmoid_norm, pairs), atol=1e-12)
    empty = pairs | {"chosen_lengths": torch.zeros(6, dtype=torch.float64)}
    assert of(sigmoid_norm, empty).isfinite().all()
