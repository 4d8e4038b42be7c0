"""SimPO, ORPO and CPO: the worked pair and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.align.objectives import cpo, orpo, pmle, simpo
from burnish.align.objectives.orpo import log_odds
from tests.align.objectives.example import of, random_pairs, slopes, value


def test_simpo_of_the_worked_pair_in_both_spellings() -> None:
    assert value(simpo, beta=2.0, gamma=1.0) == pytest.approx(2.425887, abs=5e-7)
    assert value(simpo, beta=2.0, gamma_beta_ratio=0.5) == value(simpo, beta=2.0, gamma=1.0) == value(simpo)
    assert value(simpo, beta=4.0, gamma_beta_ratio=0.25) == pytest.approx(value(simpo, beta=4.0, gamma=1.0))
    chosen, rejected = slopes(simpo, beta=2.0, gamma=1.0)
    steep = -2 * torch.sigmoid(torch.tensor(7 / 3)).item()
    assert (chosen, rejected) == pytest.approx((steep / 4, -steep / 6), rel=1e-6)


def test_simpo_refuses_two_margins() -> None:
    with pytest.raises(ValueError, match=r"gamma=1.0 and gamma_beta_ratio=0.5 say the same thing: give one"):
        value(simpo, gamma=1.0, gamma_beta_ratio=0.5)


def test_orpo_of_the_worked_pair() -> None:
    assert value(orpo, beta=0.1) == pytest.approx(3.111498, abs=5e-7)
    assert value(orpo, beta=1.0) - value(orpo, beta=0.0) == pytest.approx(1.114980, abs=5e-7)
    ratio = log_odds(torch.tensor(-3.0).double()) - log_odds(torch.tensor(-14 / 6).double())
    assert ratio.item() == pytest.approx(-0.717599, abs=5e-7)
    assert value(orpo, beta=0.0) == 3.0


def test_log_odds_are_exact_at_both_ends() -> None:
    p = torch.tensor([1e-30, 1e-3, 0.3, 0.5, 0.7, 1 - 1e-9], dtype=torch.float64)
    assert torch.allclose(log_odds(p.log()), p.logit(), rtol=1e-6)
    assert log_odds(torch.tensor(-1e-12, dtype=torch.float64)).item() == pytest.approx(-math.log(1e-12), rel=1e-9)
    assert log_odds(torch.tensor(-60.0)).item() == -60
    certain = torch.zeros(1, requires_grad=True)
    log_odds(certain).sum().backward()
    assert certain.grad is not None and certain.grad.isfinite().all()


def test_cpo_of_the_worked_pair() -> None:
    assert value(cpo, alpha=0.0) == pytest.approx(0.598139, abs=5e-7)
    assert value(cpo) == pytest.approx(0.598139 + 12, abs=5e-7)
    assert value(cpo, alpha=0.5, average=True) == pytest.approx(0.598139 + 1.5, abs=5e-7)


def test_cpo_without_its_second_term_is_pmle() -> None:
    pairs = random_pairs(3)
    assert torch.equal(of(cpo, pairs, beta=0.2, alpha=0.0), of(pmle, pairs, gamma=0.2))
