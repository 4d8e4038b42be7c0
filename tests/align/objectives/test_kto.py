"""KTO: the worked answers, weights, and the divergence estimate."""

from __future__ import annotations

import pytest
import torch

from burnish.align.objectives import kto, kto_kl


def answer(h: float, label: float, kl: float = 0.3, **options: float) -> float:
    logps = torch.tensor([h - 13.0], dtype=torch.float64)
    reference = torch.tensor([-13.0], dtype=torch.float64)
    found = kto(logps, reference, torch.tensor([label]).double(), torch.tensor(kl).double(), **options)
    return found.item()


def test_the_worked_answers() -> None:
    assert answer(1.0, 1.0) == pytest.approx(0.482507, abs=5e-7)
    assert answer(-0.5, 0.0) == pytest.approx(0.480011, abs=5e-7)
    assert answer(1.0, 1.0, desirable_weight=1.5) == pytest.approx(1.5 * answer(1.0, 1.0))
    assert answer(-0.5, 0.0, undesirable_weight=0.5) == pytest.approx(0.5 * answer(-0.5, 0.0))
    assert answer(-0.5, 0.0, desirable_weight=9.0) == answer(-0.5, 0.0)


def test_both_labels_of_one_answer_sum_to_one_and_mix() -> None:
    assert answer(0.7, 1.0) + answer(0.7, 0.0) == pytest.approx(1)
    assert answer(0.7, 0.25) == pytest.approx(0.25 * answer(0.7, 1.0) + 0.75 * answer(0.7, 0.0))
    assert answer(0.3, 1.0) == pytest.approx(0.5)  # at the point of reference


def test_the_slope_pushes_each_the_right_way_and_none_flows_through_kl() -> None:
    logps = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kto(logps, torch.zeros(2).double(), torch.tensor([1.0, 0.0]).double(), kl, beta=0.1).sum().backward()
    assert logps.grad is not None
    p = torch.sigmoid(torch.tensor(-0.03, dtype=torch.float64)).item()
    assert logps.grad.tolist() == pytest.approx([-0.1 * p * (1 - p), 0.1 * p * (1 - p)])
    assert kl.grad is None


def test_the_divergence_is_a_mean_that_is_never_negative_and_has_no_gradient() -> None:
    logps = torch.tensor([-3.0, -5.0], requires_grad=True)
    found = kto_kl(logps, torch.tensor([-4.0, -5.5]))
    assert found.item() == pytest.approx(0.75) and not found.requires_grad
    assert kto_kl(logps, torch.tensor([-1.0, -1.0])).item() == 0
