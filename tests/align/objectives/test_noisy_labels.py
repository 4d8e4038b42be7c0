"""cDPO and rDPO: values, optimum, and what flipped labels do to their mean."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from burnish.align.objectives import cdpo, dpo, mixture, rdpo
from tests.align.objectives.example import at_margin, of, random_pairs, swapped, value


def test_the_worked_pair() -> None:
    assert value(cdpo, label_smoothing=0.1) == pytest.approx(0.635957, abs=5e-7)
    assert value(rdpo, label_smoothing=0.1) == pytest.approx(0.602207, abs=5e-7)


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.3])
def test_the_optimum_of_cdpo_is_the_logit_of_the_flip_rate(eps: float) -> None:
    best = minimize_scalar(lambda margin: at_margin(cdpo, margin, beta=0.5, label_smoothing=eps), bounds=(-50, 50))
    assert 0.5 * best.x == pytest.approx(math.log((1 - eps) / eps), abs=1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.45])
def test_rdpo_over_flipped_labels_is_dpo_of_the_true_pair(eps: float) -> None:
    pairs = random_pairs(0)
    mean = (1 - eps) * of(rdpo, pairs, label_smoothing=eps) + eps * of(rdpo, swapped(pairs), label_smoothing=eps)
    assert torch.allclose(mean, of(dpo, pairs), rtol=1e-11)


def test_cdpo_is_dpo_with_a_soft_label() -> None:
    pairs = random_pairs(1) | {"labels": torch.full((6,), 0.8, dtype=torch.float64)}
    assert torch.allclose(of(mixture(dpo), pairs, beta=0.4), of(cdpo, pairs, beta=0.4, label_smoothing=0.2), rtol=1e-13)
    assert torch.equal(of(cdpo, pairs, label_smoothing=0.0), of(dpo, pairs))
