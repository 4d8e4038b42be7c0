"""Groups go to zero as wholes, in any diagonal metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.penalties import GroupLasso, Lq


def test_the_worked_example_in_a_metric() -> None:
    v, d = torch.tensor([[3.0, -1.0, 0.5]]).double(), torch.tensor([1.0, 2.0, 4.0]).double()
    x = GroupLasso(1.0).prox(v, 1.0, d)
    assert x.tolist()[0] == pytest.approx([2.08757, -0.820655, 0.450747], abs=1e-6)
    assert float(x.norm()) == pytest.approx(2.287924, abs=1e-6)


def test_block_soft_thresholding_without_a_metric() -> None:
    v = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = v.norm(dim=1, keepdim=True)
    expected = v * (1 - 1.6 / norm).clamp(min=0)
    assert 0 < int((expected == 0).all(1).sum()) < 7
    for metric in (None, 0.5, torch.full_like(v, 0.5)):
        scaled = GroupLasso(1.6 if metric is None else 0.8).prox(v, 1.0, metric)
        torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decades", [0.5, 2, 8])
def test_optimality_over_metrics_of_many_decades(dtype: torch.dtype, decades: float) -> None:
    """d (v - x) = h x / |x| where something is left, |d v| <= h where nothing is."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(500, 9, generator=generator, dtype=torch.float64).to(dtype)
    d = (10 ** (decades * (torch.rand(500, 9, generator=generator, dtype=torch.float64) - 0.5))).to(dtype)
    h = float((d * v).norm(dim=1).median())  # half of the groups go
    x = GroupLasso(h).prox(v, 1.0, d).double()
    v, d = v.double(), d.double()
    gone = (x == 0).all(1)
    assert 0.4 < float(gone.double().mean()) < 0.6
    assert bool(((d * v).norm(dim=1)[gone] <= h * (1 + 1e-6)).all())
    pull, away = d * (v - x), h * x / x.norm(dim=1, keepdim=True)
    error = ((pull - away).norm(dim=1) / h)[~gone]
    # Newton's root is as exact as the norm can be told from its neighbours.
    assert float(error.max()) < (1e-9 if dtype == torch.float64 else 1e-3)


def test_the_threshold_is_the_norm_of_d_v() -> None:
    v, d = torch.tensor([[0.3, -0.4]]).double(), torch.tensor([[2.0, 5.0]]).double()
    edge = float((d * v).norm())
    assert GroupLasso(edge * (1 + 1e-12)).prox(v, 1.0, d).abs().max() == 0
    assert GroupLasso(edge * (1 - 1e-6)).prox(v, 1.0, d).abs().min() > 0


def test_dimensions_tell_groups_apart() -> None:
    """Rows, columns, filters and kernel planes against a loop over slices."""
    v = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    d = torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.2
    for dim, slices in ((0, 3), (1, 4), (2, 2)):
        x = GroupLasso(0.7, dim).prox(v, 1.0, d)
        for index in range(slices):
            alone = GroupLasso(0.7).prox(*(t.select(dim, index).flatten()[None] for t in (v,)), 1.0,
                                         d.select(dim, index).flatten()[None])  # fmt: skip
            torch.testing.assert_close(x.select(dim, index).flatten(), alone[0])
    planes = GroupLasso(0.7, (0, 1)).prox(v, 1.0, d)
    torch.testing.assert_close(
        planes[1, 2], GroupLasso(0.7).prox(v[1, 2].reshape(1, 4), 1.0, d[1, 2].reshape(1, 4)).view(2, 2)
    )
    torch.testing.assert_close(
        GroupLasso(0.7, (0, 1, 2, 3)).prox(v, 1.0, d), Lq(1, 0.7).prox(v, 1.0, d), rtol=1e-9, atol=1e-12
    )
    bias = torch.tensor([0.5, -2.0])
    torch.testing.assert_close(GroupLasso(0.7).prox(bias), Lq(1, 0.7).prox(bias))


def test_values() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert float(GroupLasso(2.0).value(x)) == 12
    assert float(GroupLasso(2.0, 1).value(x)) == pytest.approx(2 * (3 + 17**0.5))
    assert float(GroupLasso(2.0, (0, 1)).value(x)) == 16


def test_groups_that_are_zero_stay_and_do_not_disturb_others() -> None:
    v = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    x = GroupLasso(1.0).prox(v, 1.0, torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    torch.testing.assert_close(x, torch.tensor([[0.0, 0.0], [2.4, 3.2]]))


@given(
    values=st.lists(st.tuples(st.floats(-100, 100), st.floats(1e-3, 1e3)), min_size=1, max_size=6),
    h=st.floats(1e-3, 1e3),
)
@settings(max_examples=200, deadline=None)
def test_shrinks_and_keeps_signs(values: list[tuple[float, float]], h: float) -> None:
    v, d = (torch.tensor(column, dtype=torch.float64)[None] for column in zip(*values, strict=True))
    x = GroupLasso(h).prox(v, 1.0, d)
    assert bool((x.abs() <= v.abs()).all()) and bool((x * v >= 0).all())
    larger: Tensor = GroupLasso(2 * h).prox(v, 1.0, d)
    assert float(larger.norm()) <= float(x.norm()) + 1e-12


def test_what_no_group_is_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dim=\(\): expected one dimension or several"):
        GroupLasso(1.0, ())
    with pytest.raises(ValueError, match=r"dim=\(1, 1\): expected one dimension or several different ones"):
        GroupLasso(1.0, (1, 1))
    with pytest.raises(ValueError, match=r"dim=1: a tensor of shape \[3\] has no such dimension"):
        GroupLasso(1.0, 1).prox(torch.ones(3))


def test_newton_needs_few_steps_over_two_decades(monkeypatch: pytest.MonkeyPatch) -> None:
    v, d = (
        torch.randn(300, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        torch.logspace(-1, 1, 9),
    )
    exact = GroupLasso(3.0).prox(v, 1.0, d)
    monkeypatch.setattr("burnish.penalties.group_lasso.MOST_STEPS", 6)
    torch.testing.assert_close(GroupLasso(3.0).prox(v, 1.0, d), exact, rtol=1e-10, atol=1e-12)
    assert 0 < int((exact == 0).all(1).sum()) < 300
