"""NPO: the worked answer, gradient ascent as its limit, and the retained terms."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.align.objectives import dpo, npo, npo_gd, npo_kl

REFERENCE = torch.tensor([-13.5], dtype=torch.float64)


def forgotten() -> torch.Tensor:
    return torch.tensor([-14.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("beta", "loss", "weight"), [(0.1, 13.369193, 0.975005), (1.0, 0.948154, 0.755081)])
def test_the_worked_answer(beta: float, loss: float, weight: float) -> None:
    logps = forgotten()
    found = npo(logps, REFERENCE, beta=beta)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=5e-7)
    assert logps.grad is not None and logps.grad.item() == pytest.approx(weight, abs=5e-7)


def test_for_small_beta_it_is_gradient_ascent() -> None:
    found = npo(forgotten(), REFERENCE, beta=1e-4).item() - 2e4 * math.log(2)
    assert found == pytest.approx(-0.49999375, abs=1e-8)


def test_it_starts_with_weight_one_and_stops_by_itself() -> None:
    for h, weight in ((0.0, 1.0), (-200.0, 2 * math.exp(-20) / (1 + math.exp(-20))), (400.0, 2.0)):
        logps = (REFERENCE + h).requires_grad_()
        npo(logps, REFERENCE, beta=0.1).sum().backward()
        assert logps.grad is not None and logps.grad.item() == pytest.approx(weight, rel=1e-9)


def test_it_is_dpo_whose_chosen_answer_does_not_move() -> None:
    still = torch.tensor([-3.0], dtype=torch.float64)
    pair = dpo(still, forgotten(), still, REFERENCE, beta=0.3)
    assert npo(forgotten(), REFERENCE, beta=0.3).item() == pytest.approx(2 / 0.3 * pair.item(), rel=1e-14)


def test_the_retained_terms() -> None:
    alone = npo(forgotten(), REFERENCE).item()
    retained, lengths = torch.tensor([-6.0, -2.0, -1.0]).double(), torch.tensor([3, 2, 1])
    both = npo_gd(forgotten(), REFERENCE, retained, lengths, forget_weight=0.5, retain_weight=2.0)
    assert both.item() == pytest.approx(0.5 * alone + 2.0 * 1.5, rel=1e-14)
    held = npo_kl(forgotten(), REFERENCE, torch.tensor(0.7, dtype=torch.float64), forget_weight=0.5, retain_weight=2.0)
    assert held.item() == pytest.approx(0.5 * alone + 2.0 * 0.7, rel=1e-14)
    assert npo_gd(forgotten(), REFERENCE, retained, lengths, retain_weight=0.0).item() == alone
