"""The map of l_q is the global minimiser: thresholds, jumps, closed forms, brute force, and the same in float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.penalties import Lq
from burnish.penalties.lq import curve, newton_steps, rational

EVERY_Q = [0.0, 0.01, 0.1, 0.3, 0.5, 2 / 3, 0.8, 0.9, 0.97, 0.999, 1.0]
INSIDE = [q for q in EVERY_Q if 0 < q < 1]
each = pytest.mark.parametrize("q", EVERY_Q)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def threshold_and_jump(q: float, kappa: float) -> tuple[float, float]:
    """As published: below the threshold nothing is left, just above it the jump."""
    if q == 1:
        return kappa, 0.0
    jump = (2 * kappa * (1 - q)) ** (1 / (2 - q))
    return jump * (2 - q) / (2 * (1 - q)), jump


def objective(x: Tensor, v: Tensor, kappa: Tensor, q: float) -> Tensor:
    power = (x != 0).to(x.dtype) if q == 0 else x.abs() ** q
    return 0.5 * (x - v) ** 2 + kappa * power


def draw(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """v, and kappa over nine decades, the largest of which zeroes nearly everything."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, dtype=torch.float64, generator=generator)
    return v, 10 ** (9 * torch.rand(count, dtype=torch.float64, generator=generator) - 8)


@pytest.mark.parametrize(
    ("q", "threshold", "jump"), [(0, 0.774597, 0.774597), (0.5, 0.672211, 0.448140), (2 / 3, 0.598140, 0.299070)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_thresholds_and_jumps(q: float, threshold: float, jump: float, dtype: torch.dtype) -> None:
    """Of kappa = 0.3; just below nothing is left, just above the jump."""
    found = threshold_and_jump(q, 0.3)
    assert found == pytest.approx((threshold, jump), abs=1e-6)
    close = 1e-12 if dtype == torch.float64 else 1e-6
    v = torch.tensor([found[0] * (1 - close), found[0] * (1 + close)], dtype=dtype)
    below, above = Lq(q, 0.3).prox(v).tolist()
    assert below == 0
    assert above == pytest.approx(jump, abs=2e-6)
    assert Lq(q, 0.3).prox(-v).tolist() == [0, -above]


@pytest.mark.parametrize(
    ("v", "expected"),
    [
        (1.0, [1.0, 0.9486650, 0.9317436, 0.9]),
        (0.5, [0.5, 0.4231346, 0.4102816, 0.4]),
        (0.3, [0.0, 0.0, 0.1824598, 0.2]),
        (-0.35, [0.0, -0.25, -0.2431953, -0.25]),
    ],
)
def test_published_values(v: float, expected: list[float]) -> None:
    for q, value in zip((0, 0.5, 2 / 3, 1), expected, strict=True):
        assert float(Lq(q, 0.1).prox(double(v))) == pytest.approx(value, abs=5e-8)


def test_the_closed_forms_of_one_half_and_two_thirds() -> None:
    """Xu et al.'s cosine and Cao et al.'s square roots, where they are well conditioned."""
    v, kappa = draw(20_000)
    kappa = kappa.clamp(min=1e-4)
    half = 2 / 3 * v * (1 + torch.cos(2 / 3 * (math.pi - torch.acos((kappa / 4 * (v.abs() / 3) ** -1.5).clamp(max=1)))))
    half = torch.where(v.abs() > 1.5 * kappa ** (2 / 3), half, 0.0)
    torch.testing.assert_close(Lq(0.5, 1.0).prox(v, 1.0, 1 / kappa), half, rtol=1e-9, atol=1e-14)
    cosh = torch.cosh(torch.acosh((27 / 16 * v**2 * (2 * kappa) ** -1.5).clamp(min=1)) / 3)
    a = 2 / math.sqrt(3) * (2 * kappa) ** 0.25 * cosh.sqrt()
    two_thirds = v.sign() * ((a + (2 * v.abs() / a - a**2).clamp(min=0).sqrt()) / 2) ** 3
    two_thirds = torch.where(v.abs() > 2 * (2 * kappa / 3) ** 0.75, two_thirds, 0.0)
    torch.testing.assert_close(Lq(2 / 3, 1.0).prox(v, 1.0, 1 / kappa), two_thirds, rtol=1e-9, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_brute_force_finds_nothing_better(q: float, dtype: torch.dtype) -> None:
    """Against zero, v, and points in between, of 150,000 pairs of v and kappa, a tenth of them at the threshold."""
    v, kappa = draw(150_000)
    if q < 1:
        v[::10] = threshold_and_jump(q, 1.0)[0] * kappa[::10] ** (1 / (2 - q)) * v[::10].sign()
    v, kappa = v.to(dtype), kappa.to(dtype)
    x = Lq(q, 1.0).prox(v, 1.0, 1 / kappa).double()
    v, kappa = v.double(), 1 / (1 / kappa).double()
    best = torch.minimum(objective(torch.zeros_like(v), v, kappa, q), objective(v, v, kappa, q))
    for share in torch.linspace(0.01, 0.995, 40).tolist():
        best = torch.minimum(best, objective(share * v, v, kappa, q))
    scale = torch.minimum(v**2, kappa * v.abs() ** q)
    worse = (objective(x, v, kappa, q) - best) / scale
    assert float(worse.max()) < (1e-12 if dtype == torch.float64 else 2e-6)


@each
def test_active_entries_are_stationary(q: float) -> None:
    """v - x = kappa q x^(q - 1)."""
    v, kappa = draw(100_000)
    x = Lq(q, 1.0).prox(v, 1.0, 1 / kappa)
    active = x != 0
    assert 0.05 < float(active.double().mean()) < 0.99
    gap = (v - x - kappa * q * x.abs() ** (q - 1) * v.sign())[active].abs() / v[active].abs()
    assert float(gap.max()) < 1e-13


@each
def test_zero_if_and_only_if_at_most_the_threshold(q: float) -> None:
    v, kappa = draw(100_000)
    threshold = threshold_and_jump(q, 1.0)[0] * kappa ** (1 / (2 - q))
    clear = (v.abs() / threshold - 1).abs() > 1e-12
    x = Lq(q, 1.0).prox(v, 1.0, 1 / kappa)
    assert torch.equal((x == 0)[clear], (v.abs() <= threshold)[clear])


def test_ties_on_the_boundary_go_to_zero() -> None:
    """Where the boundary is a number that floating point holds: q = 0 with kappa = 1/2, soft thresholds."""
    assert Lq(0, 0.5).prox(double(1.0, -1.0, math.nextafter(1, 2))).tolist() == [0, 0, math.nextafter(1, 2)]
    assert Lq(1, 0.25).prox(double(0.25, -0.25)).tolist() == [0, 0]
    assert Lq(1, 0.25).prox(torch.tensor([0.25, -0.25]), 1.0, torch.ones(2)).tolist() == [0, 0]


@each
def test_float32_is_float64_rounded(q: float) -> None:
    """Same zeros; elsewhere to a few units in the last place, times what conditions the root at the jump."""
    v, kappa = draw(200_000)
    v, d = v.float(), (1 / kappa).float()
    short, long = (Lq(q, 1.0).prox(a, 1.0, b) for a, b in ((v, d), (v.double(), d.double())))
    threshold = threshold_and_jump(q, 1.0)[0] * d.double() ** (-1 / (2 - q))
    clear = (v.double().abs() / threshold - 1).abs() > 2e-6
    assert torch.equal((short == 0)[clear], (long == 0)[clear])
    error = (short.double() - long).abs() / (2.0**-24 * v.double().abs())
    both = (short != 0) & (long != 0)
    assert float(error[both].max()) < 12


@pytest.mark.parametrize("q", INSIDE)
def test_the_quotient_is_the_iteration_in_less_time(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    v, kappa = draw(50_000)
    v, d = v.float(), (1 / kappa).float()
    fast = Lq(q, 1.0).prox(v, 1.0, d)
    assert bool(rational(q, torch.device("cpu"))) == (q <= 0.9)
    monkeypatch.setattr("burnish.penalties.lq.rational", lambda q, device: ())
    slow = Lq(q, 1.0).prox(v, 1.0, d)
    clear = (fast == 0) == (slow == 0)
    assert float((~clear).double().mean()) < 1e-4
    assert float(((fast - slow).abs() / v.abs())[clear].max()) < 16 * 2.0**-24


def test_the_iteration_takes_few_steps_and_no_fewer_than_it_needs() -> None:
    assert newton_steps(0.5, 2.0**-52) == 4
    assert [newton_steps(q, 2.0**-52) <= 8 for q in INSIDE] == [True] * len(INSIDE)
    for q in INSIDE:
        assert 2 ** (q - 1) / q * curve(q).edge > curve(q).beyond > curve(q).edge


numbers = st.floats(-1e3, 1e3).filter(lambda value: abs(value) > 1e-6)
positive = st.floats(1e-6, 1e3)


@given(v=numbers, w=numbers, kappa=positive, q=st.floats(0, 1), scale=st.floats(1e-2, 1e2))
@settings(max_examples=300, deadline=None)
def test_odd_monotone_shrinking_and_of_one_scale(v: float, w: float, kappa: float, q: float, scale: float) -> None:
    prox = Lq(q, kappa).prox
    x, y = prox(double(v, w)).tolist()
    assert prox(double(-v, -w)).tolist() == [-x, -y]
    assert (x - y) * (v - w) >= 0
    assert abs(x) <= abs(v) and x * v >= 0
    bigger = float(Lq(q, kappa * scale ** (2 - q)).prox(double(scale * v)))
    edge = threshold_and_jump(q, kappa)[0]
    if abs(abs(v) / edge - 1) > 1e-9:
        assert bigger == pytest.approx(scale * x, rel=1e-6, abs=1e-9 * abs(v))
    if q == 1:
        assert abs(x - y) <= abs(v - w) * (1 + 1e-12)


def test_a_preconditioner_divides_the_strength_and_a_step_multiplies_it() -> None:
    v = torch.linspace(-2, 2, 101, dtype=torch.float64)
    for q in EVERY_Q:
        expected = Lq(q, 0.15).prox(v)
        torch.testing.assert_close(Lq(q, 0.3).prox(v, 0.1, 0.2), expected)
        torch.testing.assert_close(Lq(q, 0.3).prox(v, 0.1, torch.full_like(v, 0.2)), expected)
        torch.testing.assert_close(Lq(q, 0.3).prox(v, 0.1, torch.tensor(0.2)), expected)


@each
def test_the_elastic_net_of_any_q(q: float) -> None:
    """Nothing better than (d + a) (x - d v / (d + a))^2 / 2 + kappa |x|^q, by brute force on the stated objective."""
    v = torch.linspace(-3, 3, 61, dtype=torch.float64)
    d = torch.linspace(0.3, 2, 61, dtype=torch.float64).flip(0)
    penalty = Lq(q, 0.4, ridge=0.7)
    x = penalty.prox(v, 0.5, d)
    grid = torch.linspace(-3, 3, 12_001, dtype=torch.float64)[:, None]
    power = (grid != 0).double() if q == 0 else grid.abs() ** q
    of_grid = 0.4 * power + 0.35 * grid**2 + d * (grid - v) ** 2
    of_x = torch.stack([penalty.value(one) for one in x]) + d * (x - v) ** 2
    assert bool((of_x <= of_grid.min(0).values + 1e-12).all())
    if q == 1:
        soft = v.sign() * (v.abs() - 0.2 / d).clamp(min=0)
        torch.testing.assert_close(x, soft / (1 + 0.35 / d))


def test_the_released_map_of_one_half_shrinks_too_little_and_ours_does_not() -> None:
    """The authors' code adds 1e-4 to |v| inside the arc cosine: at 0.002 it takes off 91 %."""
    kappa = (0.002 / 1.5) ** 1.5
    v = 0.002 * (1 + 1e-9)

    def cosine(inner: float) -> float:
        return 2 / 3 * v * (1 + math.cos(2 / 3 * (math.pi - math.acos(kappa / 4 * (inner / 3) ** -1.5))))

    exact, released = v - cosine(v), v - cosine(v + 1e-4)
    assert released / exact == pytest.approx(0.91, abs=0.01)
    assert (v - float(Lq(0.5, kappa).prox(double(v)))) / exact == pytest.approx(1.0, abs=1e-7)


def test_values() -> None:
    x = double(0.0, -4.0, 1.0)
    assert [float(Lq(q, 2.0).value(x)) for q in (0, 0.5, 1)] == [4.0, 6.0, 10.0]
    assert float(Lq(1, 1.0, ridge=2.0).value(x)) == 5 + 17


@pytest.mark.parametrize("q", [-0.1, 1.1, 2, math.nan])
def test_a_q_outside_of_0_and_1_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match=rf"q={q}: expected a number in \[0, 1\]"):
        Lq(q, 0.1)
