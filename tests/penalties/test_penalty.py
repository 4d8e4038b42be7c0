"""What every penalty promises: the map lowers the objective, keeps dtype, has no -0.0, survives a record, refuses."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from burnish import penalties
from burnish.penalties import (
    KINDS,
    Box,
    GroupLasso,
    L0Ball,
    Lq,
    NearQuantized,
    Nuclear,
    Penalty,
    Wells,
    mean_loss_strength,
    restore,
)

TABLE: dict[str, Penalty] = {
    "l0": Lq(0.0, 0.1),
    "l1/2": Lq(0.5, 0.1),
    "l2/3": Lq(2 / 3, 0.1),
    "l1": Lq(1.0, 0.1),
    "elastic net": Lq(1.0, 0.1, ridge=0.3),
    "box": Box(-0.5, 0.8),
    "rows": GroupLasso(0.5, 0),
    "columns": GroupLasso(0.5, 1),
    "each number": GroupLasso(0.1, (0, 1)),
    "nuclear": Nuclear(0.5),
    "count": L0Ball(count=7),
    "share": L0Ball(share=0.3),
    "binary": Wells(0.1),
    "ternary, clipped": Wells(0.1, (-1, 0, 1), q=0.5, clip=True),
    "near ternary": NearQuantized(0.4),
    "near 2 bits": NearQuantized(0.4, 2),
}
CONVEX = ["l1", "elastic net", "box", "rows", "columns", "nuclear", "each number"]
every = pytest.mark.parametrize("name", TABLE)


def matrix(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def metrics(penalty: Penalty) -> list[Tensor | float | None]:
    wide = 10 ** (2 * torch.rand(6, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64) - 1)
    return [None, 0.3, wide] if penalty.diagonal else [None, 0.3]


def total(penalty: Penalty, x: Tensor, v: Tensor, step: float, d: Tensor | float | None) -> float:
    return float(penalty.value(x) + ((1.0 if d is None else d) * (x - v) ** 2).sum() / (2 * step))


def test_every_kind_is_in_the_table() -> None:
    assert {type(penalty).__name__ for penalty in TABLE.values()} == set(KINDS)
    assert set(KINDS) <= set(penalties.__all__)


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("near")])
def test_the_map_is_nowhere_above_its_neighbours(name: str) -> None:
    """The objective at the output against v, zero and 1,200 near and far points, in each metric."""
    penalty, v = TABLE[name], matrix()
    generator = torch.Generator().manual_seed(1)
    for d in metrics(penalty):
        x = penalty.prox(v, 0.6, d)
        least = total(penalty, x, v, 0.6, d)
        assert math.isfinite(least)
        for scale in (1e-4, 1e-2, 0.1, 1.0):
            for _ in range(100):
                noise = scale * torch.randn(6, 5, generator=generator, dtype=torch.float64)
                for other in (x + noise, torch.where(x == 0, 0.0, x + noise), x * (1 + noise)):
                    assert total(penalty, other, v, 0.6, d) >= least - 1e-12
        for other in (v, torch.zeros_like(v)):
            assert total(penalty, other, v, 0.6, d) >= least - 1e-12


@pytest.mark.parametrize("name", CONVEX)
def test_convex_maps_are_firmly_nonexpansive_and_satisfy_moreau(name: str) -> None:
    """|Px - Py|^2 <= <Px - Py, x - y> in the metric, and the envelope has the gradient d (x - Px) / step."""
    penalty = TABLE[name]
    for d in metrics(penalty):
        weight = torch.ones(6, 5, dtype=torch.float64) * (1.0 if d is None else d)
        for seed in range(20):
            x, y = matrix(seed), matrix(seed + 100)
            px, py = penalty.prox(x, 0.6, d), penalty.prox(y, 0.6, d)
            assert float((weight * (px - py) ** 2).sum()) <= float((weight * (px - py) * (x - y)).sum()) + 1e-12
        direction, h = matrix(77), 1e-6
        ahead, behind = (
            total(penalty, penalty.prox(v, 0.6, d), v, 0.6, d) for v in (x + h * direction, x - h * direction)
        )
        slope = float((weight * (x - px) * direction).sum()) / 0.6
        assert (ahead - behind) / (2 * h) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_shape_and_input_are_kept_and_zeros_are_positive(name: str, dtype: torch.dtype) -> None:
    v = matrix(dtype=dtype)
    v[0, 0], v[1, 1], v[2, 2] = 0.0, -0.0, -1e-7
    before = v.clone()
    for given in (v, v.T.contiguous().T):
        x = TABLE[name].prox(given, 0.7)
        assert x.dtype == dtype and x.shape == v.shape and torch.equal(given, before)
        assert not bool((torch.signbit(x) & (x == 0)).any())
        wide = TABLE[name].prox(v.to(torch.promote_types(dtype, torch.float32)), 0.7)
        assert torch.equal(x, wide.to(dtype))
        assert torch.equal(x == 0, wide.to(dtype) == 0)


@every
def test_no_step_is_the_identity_and_no_strength_too(name: str) -> None:
    penalty, v = TABLE[name], matrix()
    if penalty.constraint:
        inside = penalty.prox(v)
        assert torch.equal(penalty.prox(inside), inside)
        return
    assert torch.equal(penalty.prox(v, 0.0), v)
    assert torch.equal(penalty.prox(v, 0.0, torch.zeros_like(v)) if penalty.diagonal else v, v)


@pytest.mark.parametrize("name", ["l0", "l1/2", "l2/3", "l1", "rows", "columns"])
def test_nothing_is_left_where_the_metric_is_zero_and_all_where_it_is_huge(name: str) -> None:
    """Weights without any gradient have d = 0 (or eps): the penalty alone decides."""
    v = matrix().abs() + 0.1
    x = TABLE[name].prox(v, 0.1, torch.zeros_like(v))
    assert torch.equal(x, torch.zeros_like(v))
    torch.testing.assert_close(TABLE[name].prox(v, 0.1, torch.full_like(v, 1e12)), v)


@every
def test_a_list_in_place_is_each_tensor_alone(name: str) -> None:
    penalty = TABLE[name]
    tensors = [matrix(seed) for seed in range(3)] + [torch.zeros(0, 5, dtype=torch.float64)]
    expected = [penalty.prox(tensor, 0.5) for tensor in tensors[:3]]
    penalty.prox_(tensors, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=False))
    if penalty.diagonal:
        tensors, d = [matrix(seed) for seed in range(2)], [matrix(seed).abs() for seed in (7, 8)]
        expected = [penalty.prox(*pair) for pair in zip(tensors, (0.5, 0.5), d, strict=True)]
        penalty.prox_(tensors, 0.5, [one.clone() for one in d])
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))


@every
def test_a_record_gives_the_penalty_back(name: str) -> None:
    penalty = TABLE[name]
    plain = penalty.to_dict()
    assert {type(value) for value in plain.values()} <= {str, int, float, bool, tuple, type(None)}
    assert restore(plain) == restore({key: plain[key] for key in reversed(plain)}) == penalty
    assert pickle.loads(pickle.dumps(penalty)) == copy.deepcopy(penalty) == penalty


@dataclass(frozen=True)
class Nonnegative(Penalty):
    """A penalty of one's own."""

    strength: float

    def value(self, x: Tensor) -> Tensor:
        return self.strength * x.abs().sum()

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        x.clamp_(min=0)


def test_a_penalty_of_one_s_own_needs_two_methods() -> None:
    mine = Nonnegative(0.1)
    assert restore(mine.to_dict()) == mine
    assert mine.prox(torch.tensor([1.0, -1.0])).tolist() == [1.0, 0.0]


def test_records_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='Lp' is unknown: one of Box, GroupLasso"):
        restore({"kind": "Lp", "strength": 1.0})
    with pytest.raises(ValueError, match="unexpected keyword argument 'power'"):
        restore({"kind": "Lq", "power": 1.0})


@pytest.mark.parametrize("make", [lambda s: Lq(1, s), GroupLasso, Nuclear, Wells, NearQuantized])
@pytest.mark.parametrize("strength", [-1.0, math.inf, math.nan])
def test_a_strength_out_of_range_is_refused(make: object, strength: float) -> None:
    with pytest.raises(ValueError, match=rf"strength={strength}: expected a number in \[0, inf\)"):
        make(strength)  # type: ignore[operator]


def test_steps_and_metrics_out_of_range_are_refused() -> None:
    v = matrix()
    with pytest.raises(ValueError, match=r"step=-1.0: expected a number in \[0, inf\)"):
        Lq(1, 0.1).prox(v, -1.0)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="preconditioner has negative or infinite entries"):
            Lq(1, 0.1).prox(v, 1.0, torch.full_like(v, bad))
        with pytest.raises(ValueError, match=rf"preconditioner={bad}: expected a number in \(0, inf\)"):
            Lq(1, 0.1).prox(v, 1.0, bad)
    with pytest.raises(ValueError, match="Nuclear has no proximal map in a diagonal metric: use metric='euclidean'"):
        Nuclear(0.1).prox(v, 1.0, torch.ones_like(v))


def test_a_mean_loss_has_its_share_of_the_strength() -> None:
    assert mean_loss_strength(3.0, 1000) == 3e-3
    with pytest.raises(ValueError, match="num_examples=0"):
        mean_loss_strength(3.0, 0)


def test_importing_the_room_is_light() -> None:
    code = "import sys, burnish.penalties; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
