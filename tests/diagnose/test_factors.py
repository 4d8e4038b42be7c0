"""Flows on two factors against closed forms: rates, times of arrival, minima, invariances (float64)."""

from __future__ import annotations

import doctest
import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from burnish.diagnose import factors
from burnish.diagnose.factors import (
    Direction,
    Factorization,
    best_residual,
    descend,
    flow,
    gradient,
    gradient_time,
    lora_muon,
    lora_start,
    matrix_with,
    smoothed,
    soft_threshold,
    spectral,
    spectral_time,
)
from burnish.diagnose.spectrum import effective_rank, growth_rates, hit_order, hit_steps
from burnish.optim import Muon

TOY = (5.0, 4.0, 3.0, 2.0, 1.0)
TARGET = torch.tensor(TOY, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(*, seed: int = 0, size: float = 1e-3) -> Factorization:
    """The published toy: 60 x 70, rank 5."""
    draw = generator(seed)
    return lora_start(matrix_with(TOY, 60, 70, draw), 5, size=size, generator=draw)


def random_point(*, seed: int = 0, size: float = 0.5, shape: tuple[int, int, int] = (12, 3, 15)) -> Factorization:
    draw = generator(seed)
    m, r, n = shape
    a, b, y = (torch.randn(*each, generator=draw, dtype=torch.float64) for each in ((m, r), (r, n), (m, n)))
    return Factorization(size * a, size * b, y)


def aligned(a: float, b: float, target: float) -> Factorization:
    """One mode: scalars."""
    return Factorization(*(torch.tensor([[value]], dtype=torch.float64) for value in (a, b, target)))


def test_doctests() -> None:
    result = doctest.testmod(factors)
    assert result.attempted >= 1
    assert result.failed == 0


def test_a_matrix_with_given_singular_values_has_them_in_random_directions() -> None:
    first, second = (matrix_with(TOY, 60, 70, generator(seed)) for seed in (0, 1))
    torch.testing.assert_close(torch.linalg.svdvals(first)[:5], TARGET, atol=1e-12, rtol=0)
    assert torch.linalg.svdvals(first)[5] < 1e-12
    assert (first - second).norm() > 1


@pytest.mark.parametrize("l2", [0.0, 0.7])
def test_gradients_are_those_of_the_loss(l2: float) -> None:
    point = random_point()
    a, b = point.a.clone().requires_grad_(), point.b.clone().requires_grad_()
    loss = (a @ b - point.target).square().sum() / 2 + l2 / 2 * (a.square().sum() + b.square().sum())
    torch.testing.assert_close(point.gradients(l2), torch.autograd.grad(loss, (a, b)), atol=1e-12, rtol=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are \[6, 2\], \[3, 5\], \[6, 5\]: expected \[m, r\], \[r, n\] and \[m, n\]"):
        Factorization(torch.zeros(6, 2), torch.zeros(3, 5), torch.zeros(6, 5))


def test_directions_are_the_operators_of_the_source() -> None:
    """Exact: norm 1, <T(G), G> is the nuclear norm, T(cG) = T(G); smoothed: s -> s / sqrt(s^2 + beta^2)."""
    point = random_point()
    for plain, polar, smooth in zip(
        point.gradients(),
        spectral(point, *point.gradients()),
        smoothed(0.5)(point, *point.gradients()),
        strict=True,
    ):
        values = torch.linalg.svdvals(plain)
        assert torch.linalg.matrix_norm(polar, 2) == pytest.approx(1, abs=1e-12)
        assert (polar * plain).sum() == pytest.approx(float(values.sum()), rel=1e-12)
        torch.testing.assert_close(torch.linalg.svdvals(smooth), values / (values**2 + 0.25).sqrt())
        assert (smooth * plain).sum() == pytest.approx(float((values**2 / (values**2 + 0.25).sqrt()).sum()))


def test_the_smoothed_operator_tends_to_its_limits() -> None:
    point = random_point()
    grads = point.gradients()
    for near, exact in zip(smoothed(1e-9)(point, *grads), spectral(point, *grads), strict=True):
        torch.testing.assert_close(near, exact, atol=1e-8, rtol=0)
    for far, plain in zip(smoothed(1e6)(point, *grads), grads, strict=True):
        torch.testing.assert_close(1e6 * far, plain, atol=1e-8, rtol=1e-8)
    with pytest.raises(ValueError, match="beta=0: expected a number above 0"):
        smoothed(0)


def test_a_spectral_mode_grows_by_the_closed_form_from_a_zero_factor() -> None:
    """d_t = t eta (b_0 + (t - 1) eta): the first step moves A alone, as the gradient of B is zero."""
    eta, b = 0.01, 1e-3
    path = flow(aligned(0.0, b, 2.0), spectral, lr=eta, steps=100)
    expected = [t * eta * (b + max(t - 1, 0) * eta) for t in range(101)]
    torch.testing.assert_close(path.singular_values[:, 0], torch.tensor(expected, dtype=torch.float64))
    assert path.singular_values[100, 0] == pytest.approx(0.991, abs=1e-12)


def test_every_spectral_mode_grows_alike_from_a_tiny_start() -> None:
    """sqrt(d_100) = .01 sqrt(100 * 99) for each mode as gamma -> 0, whatever its target."""
    roots = flow(toy(size=1e-8), spectral, lr=0.01, steps=100).singular_values[-1].sqrt()
    torch.testing.assert_close(roots, torch.full((5,), 0.01 * math.sqrt(9900), dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_spectral_modes_of_the_toy_arrive_smallest_first_at_the_predicted_steps(seed: int) -> None:
    path = flow(toy(seed=seed), spectral, lr=0.01, steps=300)
    rates = growth_rates(path.times, path.singular_values, start=0.2, end=0.9)
    torch.testing.assert_close(rates, torch.ones(5, dtype=torch.float64), atol=2e-4, rtol=0)
    hits = hit_steps(path.steps, path.singular_values, TARGET, share=0.95)
    assert hits == (219, 196, 170, 139, 98)
    for hit, target in zip(hits, TOY, strict=True):
        assert abs(hit - 100 * spectral_time(target, 0.95)) < 2
    assert float(path.residuals[-1]) < 0.1  # it goes on to oscillate by about eta in each factor


def test_spectral_steps_oscillate_and_smoothed_ones_come_to_rest() -> None:
    exact, smooth = (flow(toy(), way, lr=0.001, steps=5000, every=10) for way in (spectral, smoothed(0.01)))
    assert exact.residuals[-1] > 1e-3
    assert smooth.residuals[-1] < 1e-12
    hits = (hit_steps(path.steps, path.singular_values, TARGET, share=0.95) for path in (exact, smooth))
    assert all(abs(e - s) <= 40 for e, s in zip(*hits, strict=True))


def test_gradient_modes_of_the_toy_arrive_largest_first() -> None:
    path = flow(toy(), gradient, lr=0.01, steps=3000)
    hits = hit_steps(path.steps, path.singular_values, TARGET, share=0.95)
    assert hit_order(hits) == "largest-first" and hits[4] > 3 * hits[0]
    assert path.residuals[-1] < 1e-9


def test_a_smoothed_mode_solves_its_differential_equation() -> None:
    """a' = b (s - ab) / sqrt((b (s - ab))^2 + beta^2), and the same for b with a, by a Runge-Kutta of order 4."""
    beta, s, step = 0.3, 2.0, 1e-3

    def slope(a: float, b: float) -> tuple[float, float]:
        error = s - a * b
        return b * error / math.hypot(b * error, beta), a * error / math.hypot(a * error, beta)

    a, b = 0.2, 0.4
    for _ in range(1000):
        k1 = slope(a, b)
        k2 = slope(a + step / 2 * k1[0], b + step / 2 * k1[1])
        k3 = slope(a + step / 2 * k2[0], b + step / 2 * k2[1])
        k4 = slope(a + step * k3[0], b + step * k3[1])
        a += step / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        b += step / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
    path = flow(aligned(0.2, 0.4, s), smoothed(beta), lr=1e-4, steps=10_000, every=10_000)
    assert float(path.singular_values[-1, 0]) == pytest.approx(a * b, abs=2e-4)


def test_a_balanced_gradient_mode_is_logistic() -> None:
    """Time from 1e-4 to 0.9 of 2: 3.02517 (section 3.4); Euler steps are late by about their length."""
    path = flow(aligned(0.01, 0.01, 2.0), gradient, lr=5e-4, steps=6200)
    (hit,) = hit_steps(path.steps, path.singular_values, torch.tensor([2.0]), share=0.9)
    assert hit is not None and 5e-4 * hit == pytest.approx(gradient_time(2.0, 1e-4, 0.9), abs=2e-3)
    assert gradient_time(2.0, 1e-4, 0.9) == pytest.approx(3.02517, abs=5e-6)


@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_gradient_flow_conserves_the_imbalance_and_l2_lets_it_decay(l2: float) -> None:
    """||A^T A - B B^T|| is multiplied by exp(-2 l2 t); spectral flow conserves nothing."""
    start = random_point()
    for time in (1, 2, 3):
        path = flow(start, gradient, lr=1e-3, steps=1000 * time, l2=l2, every=10_000)
        ratio = float(path.end.imbalance.norm() / start.imbalance.norm())
        assert ratio == pytest.approx(math.exp(-2 * l2 * time), rel=4e-3)
    moved = flow(start, spectral, lr=1e-3, steps=2000).end.imbalance - start.imbalance
    assert moved.norm() > 0.2 * start.imbalance.norm()


def test_deviation_from_equal_growth_is_proportional_to_the_size_of_the_start() -> None:
    spreads = []
    for size in (1e-2, 1e-3, 1e-4):
        roots = flow(toy(size=size), spectral, lr=0.001, steps=500, every=500).singular_values[-1].sqrt()
        spreads.append(float(roots[0] - roots[-1]))
    assert [larger / smaller for larger, smaller in pairwise(spreads)] == pytest.approx([10, 10], rel=0.02)


def test_the_best_approximation_of_lower_rank_is_found() -> None:
    draw = generator(0)
    start = lora_start(matrix_with(range(10, 0, -1), 60, 70, draw), 5, size=1e-3, generator=draw)
    path = flow(start, smoothed(0.01), lr=0.002, steps=4000, every=100)
    assert best_residual(start.target, 5) == pytest.approx(math.sqrt(25 + 16 + 9 + 4 + 1), abs=1e-12)
    assert float(path.residuals[-1]) == pytest.approx(best_residual(start.target, 5), rel=1e-5)
    torch.testing.assert_close(
        path.singular_values[-1], torch.tensor([10.0, 9, 8, 7, 6], dtype=torch.float64), atol=0.01, rtol=0
    )


@pytest.mark.parametrize(("l2", "expected"), [(0.5, (4.5, 3.5, 2.5, 1.5, 0.5)), (1.5, (3.5, 2.5, 1.5, 0.5, 0.0))])
def test_l2_inside_the_operator_lowers_each_singular_value_by_itself(l2: float, expected: tuple[float, ...]) -> None:
    start = toy()
    path = flow(start, smoothed(0.01), lr=0.002, steps=5000, l2=l2, every=500)
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(start.target, 5, l2), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(path.singular_values[-1], wanted, atol=1e-4, rtol=0)
    assert path.end.imbalance.norm() < 1e-9


def test_decoupled_decay_bounds_a_mode_that_is_always_pushed_and_lowers_no_other() -> None:
    """Equilibrium of a' = 1 - wd a: 1 / wd, so that the product stops at 1 / wd^2; smaller targets are met."""
    draw = generator(0)
    start = lora_start(matrix_with((50.0, 2.0), 20, 30, draw), 2, size=1e-3, generator=draw)
    path = flow(start, spectral, lr=0.01, steps=4000, weight_decay=0.5)
    assert float(path.singular_values[-1, 0]) == pytest.approx(4.0, abs=0.05)
    assert float(path.singular_values[-1, 1]) == pytest.approx(2.0, abs=0.05)


def test_modes_beyond_the_rank_of_the_target_stay_zero() -> None:
    draw = generator(0)
    start = lora_start(matrix_with((5.0, 4.0, 3.0), 60, 70, draw), 5, size=1e-3, generator=draw)
    values = flow(start, spectral, lr=0.01, steps=400).singular_values[-1]
    torch.testing.assert_close(values[:3], torch.tensor([5.0, 4, 3], dtype=torch.float64), atol=0.06, rtol=0)
    assert values[3:].max() < 1e-9


def test_modes_of_noise_grow_as_fast_as_those_of_the_signal() -> None:
    """The risk of a rank above that of the signal: under spectral steps noise is fitted first, under gradients last."""
    draw = generator(0)
    noise = 0.05 * torch.randn(60, 70, generator=draw, dtype=torch.float64)
    start = lora_start(matrix_with((5.0, 4.0, 3.0), 60, 70, draw) + noise, 5, size=1e-3, generator=draw)
    assert torch.linalg.svdvals(start.target)[3] < 0.9
    even = flow(start, spectral, lr=0.01, steps=50).singular_values[-1].sqrt()
    assert even.max() - even.min() < 0.02 and even.min() > 0.45
    assert float(effective_rank(flow(start, gradient, lr=0.01, steps=250).singular_values[-1])) < 3.2


@pytest.mark.parametrize("way", [gradient, spectral, smoothed(0.1)], ids=["gradient", "spectral", "smoothed"])
def test_a_rotation_between_the_factors_changes_nothing(way: Direction) -> None:
    """(A Q, Q^T B) for orthogonal Q gives the same products, because T(G Q) = T(G) Q; Adam's do not."""
    start = random_point(size=0.1)
    q = torch.linalg.qr(torch.randn(3, 3, generator=generator(5), dtype=torch.float64)).Q
    turned = Factorization(start.a @ q, q.mT @ start.b, start.target)
    adam = partial(torch.optim.Adam, lr=0.01)
    paths = [flow(each, way, lr=0.01, steps=150) for each in (start, turned)]
    torch.testing.assert_close(paths[0].end.a @ paths[0].end.b, paths[1].end.a @ paths[1].end.b, atol=1e-9, rtol=0)
    paths = [descend(each, adam, steps=150) for each in (start, turned)]
    assert (paths[0].end.a @ paths[0].end.b - paths[1].end.a @ paths[1].end.b).abs().max() > 1e-3


def muon(both: list[torch.nn.Parameter], method: str = "newton-schulz") -> Muon:
    """Steps of length lr in every direction, as those of the flow."""
    return Muon(both, lr=0.01, weight_decay=0.0, scale="none", orthogonalization=method)


def test_muon_does_not_see_a_rotation_between_the_factors_either() -> None:
    start = random_point(size=0.1)
    q = torch.linalg.qr(torch.randn(3, 3, generator=generator(5), dtype=torch.float64)).Q
    ends = [
        descend(each, muon, steps=100).end for each in (start, Factorization(start.a @ q, q.mT @ start.b, start.target))
    ]
    torch.testing.assert_close(ends[0].a @ ends[0].b, ends[1].a @ ends[1].b, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("method", "bound"), [("newton-schulz", 3.0), ("polar-express", 1.2), ("svd", 1.05)])
def test_muon_grows_modes_nearly_alike_and_gradient_descent_does_not(method: str, bound: float) -> None:
    """Largest over smallest singular value when their sum is a quarter of the target's (section 7)."""
    values = descend(toy(), partial(muon, method=method), steps=200).at_share(0.25)
    assert values[0] / values[-1] < bound
    if method != "newton-schulz":
        path = descend(toy(), partial(muon, method=method), steps=300)
        assert hit_order(hit_steps(path.steps, path.singular_values, TARGET)) == "smallest-first"
    plain = flow(toy(), gradient, lr=0.01, steps=300).at_share(0.25)
    assert plain[0] / plain[-1] > 1e3


def test_lora_muon_moves_the_product_alike_in_any_factors() -> None:
    """To first order; any invertible matrix may stand between the factors. Each half of the step has norm 1/2."""
    point = random_point()
    between = torch.randn(3, 3, generator=generator(3), dtype=torch.float64)
    other = Factorization(point.a @ between, torch.linalg.solve(between, point.b), point.target)
    moves = []
    for each in (point, other):
        move_a, move_b = lora_muon(each, *each.gradients())
        moves.append(move_a @ each.b + each.a @ move_b)
        for half in (move_a @ each.b, each.a @ move_b):
            torch.testing.assert_close(torch.linalg.svdvals(half)[:3], torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(moves[0], moves[1], atol=1e-9, rtol=1e-9)


def test_lora_muon_takes_no_direction_that_a_factor_does_not_have() -> None:
    """A of rank 2 of 3: A Delta B has two singular values of 1/2, and rounding is not blown up to a third."""
    point = random_point()
    point = Factorization(torch.cat([point.a[:, :2], point.a[:, :1]], dim=1), point.b, point.target)
    _, move_b = lora_muon(point, *point.gradients())
    values = torch.linalg.svdvals(point.a @ move_b)
    torch.testing.assert_close(values[:3], torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), atol=1e-9, rtol=0)
    assert move_b.norm() < 10
    nothing = Factorization(torch.zeros(12, 3).double(), point.b, point.target)
    assert not lora_muon(nothing, *nothing.gradients())[1].any()


def test_under_lora_muon_the_singular_values_themselves_grow_at_one_rate() -> None:
    path = flow(toy(), lora_muon, lr=0.01, steps=600)
    hits = hit_steps(path.steps, path.singular_values, TARGET, share=0.95)
    assert all(abs(hit - 95 * target) < 3 for hit, target in zip(hits, TOY, strict=True))


def test_descending_with_an_optimizer_is_the_flow_that_it_discretises() -> None:
    start = random_point()
    path = descend(start, partial(torch.optim.SGD, lr=0.01), steps=40, l2=0.3, every=7)
    euler = flow(start, gradient, lr=0.01, steps=40, l2=0.3, every=7)
    assert path.steps == euler.steps == (0, 7, 14, 21, 28, 35, 40)
    for found, expected in ((path.singular_values, euler.singular_values), (path.times, euler.times)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_the_spectrum_at_a_share_is_the_first_that_has_it() -> None:
    path = flow(toy(), spectral, lr=0.01, steps=150)
    at = path.at_share(0.25)
    step = next(i for i, row in enumerate(path.singular_values) if row.sum() >= 0.25 * 15)
    assert torch.equal(at, path.singular_values[step]) and at[0] / at[-1] < 1.02
    with pytest.raises(ValueError, match=r"share=0\.99 of the target was not reached in 150 steps"):
        path.at_share(0.99)
