"""Singular values and their measures against full decompositions, closed forms and limits."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.diagnose import spectrum
from burnish.diagnose.spectrum import (
    AdapterSpectrum,
    effective_rank,
    growth_rates,
    growth_variation,
    hit_order,
    hit_steps,
    lora_singular_values,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_doctests() -> None:
    result = doctest.testmod(spectrum)
    assert result.attempted == 2
    assert result.failed == 0


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.floats(-4, 4), st.integers(0, 99))
def test_singular_values_are_those_of_the_product(out: int, rank: int, into: int, scale: float, seed: int) -> None:
    b, a = draw(out, rank, seed=seed), draw(rank, into, seed=seed + 100)
    whole = torch.linalg.svdvals(scale * b @ a)[: min(out, rank, into)]
    torch.testing.assert_close(lora_singular_values(b, a, scale), whole, atol=1e-12, rtol=1e-11)


def test_singular_values_of_the_published_size_agree_with_the_full_decomposition() -> None:
    b, a = draw(64, 8), draw(8, 48, seed=1)
    error = lora_singular_values(b, a, 2.0) - torch.linalg.svdvals(2.0 * b @ a)[:8]
    assert error.abs().max() < 1e-12


def test_a_stack_is_a_loop() -> None:
    b, a = draw(3, 7, 2), draw(3, 2, 5, seed=1)
    stacked = lora_singular_values(b, a)
    assert torch.equal(stacked, torch.stack([lora_singular_values(b[i], a[i]) for i in range(3)]))


def test_half_precision_factors_are_computed_in_float64() -> None:
    b, a = draw(40, 4).bfloat16(), draw(4, 30, seed=1).bfloat16()
    torch.testing.assert_close(
        lora_singular_values(b, a), torch.linalg.svdvals(b.double() @ a.double())[:4], atol=1e-12, rtol=1e-12
    )


def test_transposed_factors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"b \[4, 9\] and a \[7, 4\]: expected \[\.\.\., out, r\]"):
        lora_singular_values(draw(4, 9), draw(7, 4))


def test_effective_rank_of_known_spectra() -> None:
    assert float(effective_rank(torch.full((5,), 0.3).double())) == pytest.approx(5, abs=1e-12)
    assert float(effective_rank(torch.tensor([7.0, 0.0, 0.0]).double())) == pytest.approx(1, abs=1e-12)
    # shares 1/2, 1/4, 1/4: H = 1.5 ln 2
    assert float(effective_rank(torch.tensor([2.0, 1.0, 1.0]).double())) == pytest.approx(2**1.5, abs=1e-12)
    assert effective_rank(torch.zeros(3)).isnan()


def test_growth_variation_is_of_the_square_roots() -> None:
    # roots 3 and 1: deviation 1 about a mean of 2
    assert float(growth_variation(torch.tensor([9.0, 1.0]).double())) == pytest.approx(0.5, abs=1e-12)
    assert float(growth_variation(torch.full((4,), 2.5).double())) == 0
    assert growth_variation(torch.zeros(3)).isnan()


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.floats(1e-3, 1e3))
def test_measures_do_not_depend_on_the_size_of_the_product(values: list[float], factor: float) -> None:
    d = torch.tensor(values, dtype=torch.float64)
    for measure in (effective_rank, growth_variation):
        torch.testing.assert_close(measure(d), measure(factor * d), atol=1e-9, rtol=1e-9)
    assert 1 - 1e-9 <= float(effective_rank(d)) <= len(values) + 1e-9


def test_growth_rates_recover_the_slope_of_the_square_roots() -> None:
    times = torch.linspace(0, 2, 41, dtype=torch.float64)
    values = torch.stack([(0.1 + 0.7 * times) ** 2, (0.3 * times) ** 2], dim=1)
    values[-1] = 50.0  # outside of the window
    rates = growth_rates(times, values, start=0.5, end=1.9)
    torch.testing.assert_close(rates, torch.tensor([0.7, 0.3], dtype=torch.float64), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"1 measurements from 0\.5 to 0\.51: expected at least 2"):
        growth_rates(times, values, start=0.5, end=0.51)


def test_hit_steps_are_the_first_measurement_at_the_share() -> None:
    values = torch.tensor([[0.0, 0.0, 0.0], [4.4, 0.9, 0.0], [4.5, 1.0, 0.0], [5.0, 1.0, 0.0]])
    assert hit_steps([0, 10, 20, 30], values, share=0.9) == (20, 10, None)
    assert hit_steps([0, 10, 20, 30], values, torch.tensor([4.8, 2.0, 1.0]), share=0.9) == (10, None, None)
    with pytest.raises(ValueError, match=r"share=0: expected a number above 0 and at most 1"):
        hit_steps([0], values[:1], share=0)


def test_order_of_modes_ignores_those_that_never_came() -> None:
    assert hit_order([30, None, 20, 20]) == "smallest-first"
    assert hit_order([None, 7, None]) == "together"
    assert hit_order([20, 20, 30]) == "largest-first"


def test_a_line_of_the_file_says_what_was_measured() -> None:
    line = AdapterSpectrum("q_proj", (9.0, 1.0), scale=2.0, dora=True).line(40)
    shares = (0.9, 0.1)
    assert line["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert line["growth_variation"] == pytest.approx(0.5)
    assert (line["step"], line["adapter"], line["singular_values"], line["scale"], line["dora"]) == (
        *(40, "q_proj", [9.0, 1.0]),
        *(2.0, True),
    )
    start = AdapterSpectrum("q_proj", (0.0, 0.0)).line(0)
    assert start["effective_rank"] is None and start["growth_variation"] is None
