"""IPO: both normalisations, and where it is least."""

from __future__ import annotations

import pytest
from scipy.optimize import minimize_scalar

from burnish.align.objectives import ipo
from tests.align.objectives.example import at_margin, slopes, value


def test_the_worked_pair_by_sums_and_by_means() -> None:
    assert value(ipo) == pytest.approx(12.25, abs=1e-12)
    assert value(ipo, average=True) == pytest.approx(21.7778, abs=5e-5)
    assert slopes(ipo) == pytest.approx((-7.0, 7.0))
    # 2 (1/4 + 0.5/6 - 5) over the number of tokens
    assert slopes(ipo, average=True) == pytest.approx((-9.333333 / 4, 9.333333 / 6), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_it_is_least_at_margin_one_over_two_beta(beta: float) -> None:
    best = minimize_scalar(lambda margin: at_margin(ipo, margin, beta=beta), bounds=(-50, 50))
    assert best.x == pytest.approx(1 / (2 * beta), abs=1e-5)
    assert at_margin(ipo, 1 / (2 * beta), beta=beta) == pytest.approx(0, abs=1e-20)
