"""EXO: the worked pair, and the divergence that it is."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import minimize_scalar

from burnish.align.objectives import exo
from tests.align.objectives.example import at_margin, value


def test_the_worked_pair() -> None:
    assert value(exo, label_smoothing=1e-3) == pytest.approx(2.505517, abs=5e-7)


def test_it_is_zero_and_least_where_the_preference_is_the_smoothed_label() -> None:
    best = minimize_scalar(lambda margin: at_margin(exo, margin, beta=0.1, label_smoothing=1e-3), bounds=(0, 200))
    assert best.x == pytest.approx(69.0675, abs=1e-2)
    assert at_margin(exo, math.log(999) / 0.1, beta=0.1, label_smoothing=1e-3) == pytest.approx(0, abs=1e-15)


def test_far_off_it_is_the_logarithm_of_the_label() -> None:
    assert at_margin(exo, -1e6, label_smoothing=1e-3) == pytest.approx(-math.log(1e-3), rel=1e-12)
    assert at_margin(exo, 1e6, label_smoothing=1e-3) == pytest.approx(-math.log1p(-1e-3), rel=1e-12)
