"""Box, l0 ball, nuclear norm, wells and quantised copies against what they are by definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from burnish.penalties import Box, L0Ball, Lq, NearQuantized, Nuclear, Wells, sparsity, uniform_levels
from burnish.penalties.quantized import ternary, uniform


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_the_box_is_a_clamp_and_tells_inside_from_outside() -> None:
    assert Box(-1, 0.5).prox(torch.tensor([-3.0, 0.2, 0.7]), 5.0, torch.rand(3)).tolist() == pytest.approx(
        [-1, 0.2, 0.5]
    )
    assert float(Box(-1, 0.5).value(torch.tensor([-1.0, 0.5]))) == 0
    assert float(Box(-1, 0.5).value(torch.tensor([-1.0, 0.6]))) == math.inf
    assert Box(0.0, math.inf).prox(torch.tensor([-2.0, 9.0])).tolist() == [0, 9]
    with pytest.raises(ValueError, match="low=1, high=0: expected low <= high"):
        Box(1, 0)


@pytest.mark.parametrize("kept", range(8))
def test_the_l0_ball_is_the_best_of_all_supports(kept: int) -> None:
    v, d = normal(7), normal(7, seed=1).abs()
    best = min(
        (float((d * torch.where(torch.tensor(mask), 0.0, v) ** 2).sum()), mask)
        for mask in itertools.product([False, True], repeat=7)
        if sum(mask) == kept
    )
    x = L0Ball(count=kept).prox(v, 1.0, d)
    assert torch.equal(x, torch.where(torch.tensor(best[1]), v, 0.0))
    order = v.abs().argsort(descending=True)[:kept]
    plain = L0Ball(count=kept).prox(v)
    assert sorted(plain.nonzero().flatten().tolist()) == sorted(order.tolist())


def test_ties_of_the_l0_ball_go_to_those_that_come_first() -> None:
    v = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.0, -2.0]])
    for kept, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 5])):
        x = L0Ball(count=kept).prox(v)
        assert x.flatten().nonzero().flatten().tolist() == expected
    assert L0Ball(count=2).prox(torch.zeros(5)).tolist() == [0] * 5
    assert L0Ball(count=2).prox(torch.tensor([2.0, 3.0, -2.0, 2.0])).tolist() == [2, 3, 0, 0]


def test_the_share_of_the_l0_ball_is_rounded_down() -> None:
    assert [L0Ball(share=share).kept(10) for share in (0, 0.05, 0.3, 0.99, 1)] == [0, 0, 3, 9, 10]
    assert L0Ball(count=99).kept(10) == 10
    assert int(L0Ball(share=0.29).prox(normal(100)).count_nonzero()) == 29
    x = torch.tensor([1.0, 0.0, 2.0])
    assert [float(L0Ball(count=k).value(x)) for k in (1, 2)] == [math.inf, 0]
    for options in ({}, {"count": 1, "share": 0.5}):
        with pytest.raises(ValueError, match="give one of them"):
            L0Ball(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"share=1.5: expected a number in \[0, 1\]"):
        L0Ball(share=1.5)
    with pytest.raises(ValueError, match="count=-1: expected a whole number"):
        L0Ball(count=-1)


def test_the_nuclear_map_satisfies_the_optimality_of_subgradients() -> None:
    """v - x = h (U V^T + W) with U^T W = 0, W V = 0 and |W| <= 1: independent of how x was computed."""
    v, h = normal(8, 5), 1.7
    x = Nuclear(h).prox(v)
    left, values, right = torch.linalg.svd(x)
    rank = int((values > 1e-10).sum())
    assert 0 < rank < 5
    sign = left[:, :rank] @ right[:rank]
    rest = (v - x) / h - sign
    assert float((left[:, :rank].T @ rest).abs().max()) < 1e-10
    assert float((rest @ right[:rank].T).abs().max()) < 1e-10
    assert float(torch.linalg.matrix_norm(rest, 2)) <= 1 + 1e-10
    torch.testing.assert_close(torch.linalg.svdvals(x), (torch.linalg.svdvals(v) - h).clamp(min=0), rtol=0, atol=1e-10)
    assert float(Nuclear(2.0).value(v)) == pytest.approx(2 * float(torch.linalg.svdvals(v).sum()))


def test_stacks_and_kernels_of_the_nuclear_norm() -> None:
    stack, kernel = normal(3, 4, 5), normal(4, 2, 3, 3)
    torch.testing.assert_close(Nuclear(0.8).prox(stack)[1], Nuclear(0.8).prox(stack[1]))
    torch.testing.assert_close(Nuclear(0.8).prox(kernel).view(4, 18), Nuclear(0.8).prox(kernel.view(4, 18)))
    assert Nuclear(1.0).splits_along(0, 3) and not Nuclear(1.0).splits_along(0, 2)
    with pytest.raises(ValueError, match=r"a tensor of shape \[4\] is no matrix"):
        Nuclear(1.0).prox(torch.ones(4))


def test_published_maps_of_the_w() -> None:
    """w = 0.7 and -0.2 with kappa = 0.1, and the two coordinates in a metric."""
    expected = {0: (1, -0.2), 0.5: (1, -0.2580473), 2 / 3: (0.8175402, -0.2741822), 1: (0.8, -0.3)}
    for q, values in expected.items():
        x = Wells(0.1, q=q).prox(torch.tensor([0.7, -0.2]).double())
        assert x.tolist() == pytest.approx(values, abs=5e-8)
    pair = torch.tensor([0.7, 0.7]).double()
    assert Wells(0.01).prox(pair).tolist() == pytest.approx([0.71, 0.71])
    assert Wells(0.01).prox(pair, 1.0, torch.tensor([0.1, 2.0])).tolist() == pytest.approx([0.8, 0.705])


@pytest.mark.parametrize("levels", [(-1.0, 1.0), (-1.0, 0.0, 1.0), (-0.3, 0.1, 0.2, 2.0), uniform_levels(3)])
@pytest.mark.parametrize("q", [0, 0.5, 2 / 3, 1])
@pytest.mark.parametrize("clip", [False, True])
def test_wells_against_brute_force(levels: tuple[float, ...], q: float, clip: bool) -> None:
    """200,000 points each, half-way points and levels among them, against a grid that holds the levels."""
    v = torch.cat([2.5 * normal(2000), torch.tensor(levels).double()])
    v = torch.cat([v, (torch.tensor(levels[1:]) + torch.tensor(levels[:-1])).double() / 2])
    grid = torch.cat([torch.linspace(-5, 5, 2001, dtype=torch.float64), torch.tensor(levels, dtype=torch.float64)])
    away = (grid[:, None] - torch.tensor(levels, dtype=torch.float64)).abs().min(1).values
    for kappa in (0.003, 0.1, 0.7):
        penalty = Wells(kappa, levels, q, clip)
        worth = kappa * ((away > 0).double() if q == 0 else away**q)
        worth = torch.where((grid < levels[0]) | (grid > levels[-1]), math.inf, worth) if clip else worth
        best = (worth[:, None] + 0.5 * (grid[:, None] - v) ** 2).min(0).values
        x = penalty.prox(v)
        mine = torch.stack([penalty.value(one) for one in x]) + 0.5 * (x - v) ** 2
        assert float((mine - best).max()) < 1e-12
        assert bool(torch.isin(x, torch.tensor(levels, dtype=torch.float64)).any())


def test_wells_end_exactly_on_their_levels_and_ties_go_up() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        levels = (-0.3, 0.1, 0.7)
        x = Wells(10.0, levels).prox(normal(1000, dtype=dtype))
        assert set(x.tolist()) == set(
            torch.tensor(levels).to(torch.promote_types(dtype, torch.float32)).to(dtype).tolist()
        ) or (dtype == torch.float64 and set(x.tolist()) == set(levels))
    assert Wells(10.0).prox(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert Wells(1.0, (-1, 0, 1)).rounded(torch.tensor([0.5, -0.5, 0.49])).tolist() == [1, 0, 0]


def test_the_l1_well_of_strength_one_is_the_sign_inside() -> None:
    v = torch.linspace(-1, 1, 41)
    assert torch.equal(Wells(1.0).prox(v), torch.where(v >= 0, 1.0, -1.0))


def test_wells_refuse() -> None:
    for levels in ((), (1.0,), (1.0, -1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="expected two or more, ascending"):
            Wells(1.0, levels)
    with pytest.raises(ValueError, match=r"q=2: expected a number in \[0, 1\]"):
        Wells(1.0, q=2)
    with pytest.raises(ValueError, match="bits=9: expected a whole number from 1 to 8"):
        uniform_levels(9)
    assert uniform_levels(1) == (-1, 1) and uniform_levels(2, 3.0) == (-3, -1, 1, 3)


def test_ternary_is_the_published_rule() -> None:
    x = torch.tensor([0.1, -0.2, 1.0, 3.0, -2.0, -4.0, 0.0])
    bound = 0.7 * float(x.abs().mean())
    assert 0.2 < bound < 2
    kept = [value if abs(value) > bound else 0.0 for value in x.tolist()]
    up = [value for value in kept if value > 0]
    down = [value for value in kept if value < 0]
    expected = [0.0 if v == 0 else sum(up) / len(up) if v > 0 else sum(down) / len(down) for v in kept]
    assert ternary(x).tolist() == pytest.approx(expected)
    assert ternary(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_uniform_scale_is_stationary_and_near_the_best(bits: int) -> None:
    """No scale of a fine grid is better by more than a tenth; the fitted one is the least squares of its own codes."""
    x = normal(400)
    copy = uniform(x, bits)
    assert len(copy.unique()) <= 2**bits
    levels = torch.tensor(uniform_levels(bits), dtype=torch.float64)
    errors = []
    for scale in torch.linspace(0.1, 5, 400, dtype=torch.float64):
        nearest = (x[:, None] - scale * levels).abs().min(1).values
        errors.append(float(nearest.square().sum()))
    assert float((x - copy).square().sum()) <= 1.1 * min(errors)
    assert float((x * copy).sum()) == pytest.approx(float(copy.square().sum()), rel=1e-12)
    assert torch.equal(uniform(torch.zeros(3), bits), torch.zeros(3))


def test_the_pull_to_a_copy_is_a_weighted_mean_and_ends_by_rounding() -> None:
    v, d = normal(50), normal(50, seed=4).abs()
    for bits in ("ternary", 2):
        penalty = NearQuantized(0.3, bits)
        copy = penalty.rounded(v)
        torch.testing.assert_close(penalty.prox(v, 2.0), (v + 0.6 * copy) / 1.6)
        torch.testing.assert_close(penalty.prox(v, 2.0, d), (d * v + 0.6 * copy) / (d + 0.6))
        assert float(penalty.value(v)) == pytest.approx(0.15 * float((v - copy).square().sum()))
        assert float(penalty.value(copy)) < float(penalty.value(v))
    with pytest.raises(ValueError, match="bits='binary': expected 'ternary' or a whole number"):
        NearQuantized(1.0, "binary")


def test_exact_zeros_are_counted_and_almost_zeros_are_not() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, -0.0, 1, 1e-30], [0, 0, 0, 0], [0, 2, 0, 0]]))
        model[1].weight.fill_(1.0)
        model[1].weight[:, 1] = 0
        model[1].weight[2] = 0
    found = sparsity(model)
    linear, kernel = found
    assert (linear.name, linear.numel, linear.zeros, linear.zero_rows, linear.zero_columns) == ("0.weight", 12, 9, 1, 1)
    assert (kernel.zeros, kernel.zero_rows, kernel.zero_columns) == (16, 1, 1)
    assert found.share == 25 / 36
    assert found.to_dict()["tensors"][0]["zeros"] == 9
    assert "0.weight  [3, 4]        75.00%  1 of 3     1 of 4" in str(found)


def test_what_the_lasso_leaves_the_count_finds() -> None:
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight.copy_(Lq(1, 0.1).prox(layer.weight))
    assert sparsity(layer).zeros == int((layer.weight == 0).sum()) > 0


def test_many_levels_are_found_as_few_are() -> None:
    x = torch.cat([2 * normal(500), torch.tensor([0.0, 1.0, -1.0, 1 / 15]).double()])
    for bits in (2, 4, 5, 8):
        levels = torch.tensor(uniform_levels(bits), dtype=torch.float64)
        found = Wells(1.0, uniform_levels(bits)).rounded(x)
        assert bool(torch.isin(found, levels).all())
        torch.testing.assert_close((found - x).abs(), (x[:, None] - levels).abs().min(1).values, rtol=0, atol=1e-15)
