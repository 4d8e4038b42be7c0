"""ProxGen against torch, a slow twin, coordinate descent, and the conditions that a regularised optimum meets."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from burnish.optim import ProxGen
from burnish.optim.proxgen import PRECONDITIONERS, penalty_of
from burnish.penalties import Box, GroupLasso, L0Ball, Lq, NearQuantized, Nuclear, Penalty, Wells
from tests.optim.reference import lockstep, tensors

PEERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr, weight_decay=wd),
    "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr, weight_decay=wd),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd),
    "amsgrad": lambda p, lr, wd: torch.optim.Adam(p, lr, weight_decay=wd, amsgrad=True),
    "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr, weight_decay=wd, eps=1e-8),
    "rmsprop": lambda p, lr, wd: torch.optim.RMSprop(p, lr, weight_decay=wd),
}
each = pytest.mark.parametrize("name", PRECONDITIONERS)


def soft(v: Tensor, kappa: Tensor | float) -> Tensor:
    return v.sign() * (v.abs() - kappa).clamp(min=0)


def hard(v: Tensor, kappa: Tensor) -> Tensor:
    return torch.where(v.abs() > (2 * kappa).sqrt(), v, 0.0)


def rows_of(v: Tensor, weight: Tensor, h: float) -> Tensor:
    """Group lasso in a metric by bisection on the norm."""
    if v.ndim < 2:
        return soft(v, h / weight)
    out = []
    for x, d in zip(v, weight.expand_as(v), strict=True):
        low, high = 0.0, float(x.norm())
        for _ in range(200):
            r = (low + high) / 2
            low, high = (r, high) if float(((d * x / (d * r + h)) ** 2).sum()) > 1 else (low, r)
        out.append(x * d * low / (d * low + h))
    return torch.stack(out)


class Twin:
    """The card's step by name, float64, one tensor at a time."""

    def __init__(self, parameters: Sequence[Tensor], name: str, prox: Callable[[Tensor, Tensor, float], Tensor],
                 lr: float, lam: float, wd: float, decoupled: bool, euclidean: bool = False) -> None:  # fmt: skip
        self.parameters, self.name, self.prox, self.euclidean = list(parameters), name, prox, euclidean
        self.lr, self.lam, self.wd, self.decoupled = lr, lam, wd, decoupled
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]
        self.v_max = [torch.zeros_like(p) for p in parameters]
        self.t = [0 for _ in parameters]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for i, g in enumerate(gradients):
            if g is not None:
                self.parameters[i] = self.one(i, self.parameters[i], g)

    def one(self, i: int, p: Tensor, g: Tensor) -> Tensor:
        if self.decoupled:
            p = p - self.lr * self.wd * p
        else:
            g = g + self.wd * p
        self.t[i] += 1
        m, d = g, torch.ones_like(p)
        if self.name == "momentum":
            self.m[i] = 0.9 * self.m[i] + g
            m, d = 0.1 * self.m[i], 0.1 * d
        if self.name in ("adam", "adamw", "amsgrad"):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
            self.v_max[i] = torch.maximum(self.v_max[i], self.v[i])
            m = self.m[i] / (1 - 0.9 ** self.t[i])
            second = self.v_max[i] if self.name == "amsgrad" else self.v[i]
            d = (second / (1 - 0.999 ** self.t[i])).sqrt() + 1e-8
        if self.name == "adagrad":
            self.v[i] = self.v[i] + g**2
            d = self.v[i].sqrt() + 1e-8
        if self.name == "rmsprop":
            self.v[i] = 0.99 * self.v[i] + 0.01 * g**2
            d = self.v[i].sqrt() + 1e-8
        moved = p - self.lr * m / d
        return self.prox(moved, torch.ones_like(d) if self.euclidean else d, self.lr * self.lam)


SLOW: dict[str, tuple[Penalty, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "l1": (Lq(1, 0.02), lambda v, d, h: soft(v, h / d)),
    "l0": (Lq(0, 0.02), lambda v, d, h: hard(v, h / d)),
    "rows": (GroupLasso(0.02), rows_of),
    "box": (Box(-0.4, 0.5), lambda v, d, h: v.clamp(-0.4, 0.5)),
    "w": (
        Wells(0.02),
        lambda v, d, h: torch.where(v >= 0, 1.0, -1.0) + soft(v - torch.where(v >= 0, 1.0, -1.0), h / d),
    ),
}


@each
@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("decoupled", [False, True])
def test_every_step_is_that_of_a_slow_twin(name: str, kind: str, decoupled: bool) -> None:
    """Missing gradients, two groups, a resume in between; float64."""
    if kind == "rows" and decoupled:
        pytest.skip("once is enough")
    penalty, prox = SLOW[kind]
    values = tensors((4, 3), (5,), (3, 2), seed=3)
    twins = [
        Twin([w.clone() for w in values], name, prox, lr, 0.02, 0.1, decoupled, euclidean)
        for lr, euclidean in ((0.05, False), (0.02, True))
    ]

    def build(groups: list[list[Tensor]]) -> ProxGen:
        metrics = ("preconditioner", "euclidean")
        lrs = (0.05, 0.02)
        given = [
            {"params": g, "lr": lr, "metric": m, "penalty": penalty}
            for g, lr, m in zip(groups, lrs, metrics, strict=True)
        ]
        return ProxGen(given, preconditioner=name, decoupled=decoupled, weight_decay=0.1)  # type: ignore[arg-type]

    lockstep(twins, build, steps=12, resume=(4, 7), tolerance=2e-12 if kind != "rows" else 1e-9)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("penalty", [None, Lq(0.5, 0.0)])
def test_without_a_penalty_it_is_the_torch_optimizer_to_the_bit(
    name: str, dtype: torch.dtype, weight_decay: float, penalty: Penalty | None
) -> None:
    """torch's fused form where it has one; the foreach form to rounding."""
    runs = []
    fused = {} if name == "rmsprop" else {"fused": True}
    for kind in ("ours", "peer", "foreach"):
        values = [nn.Parameter(v.to(dtype)) for v in tensors((8, 5), (7,), (2, 3, 4), seed=1)]
        if kind == "ours":
            optimizer: torch.optim.Optimizer = ProxGen(
                values,
                0.02,
                penalty=penalty,
                preconditioner=name,
                weight_decay=weight_decay,  # type: ignore[arg-type]
            )
        else:
            optimizer = PEERS[name](values, 0.02, weight_decay)
            for group in optimizer.param_groups:
                group.update(fused if kind == "peer" else {"foreach": True})
        for t in range(20):
            for index, p in enumerate(values):
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + index)).to(dtype)
                p.grad = None if t == 3 and index == 1 else noise + p.detach()
            optimizer.step()
        runs.append([p.detach() for p in values])
    for ours, peer, foreach in zip(*runs, strict=True):
        assert torch.equal(ours, peer)
        torch.testing.assert_close(
            ours,
            foreach,
            rtol=1e-12 if dtype == torch.float64 else 1e-4,
            atol=1e-12 if dtype == torch.float64 else 1e-6,
        )


@pytest.mark.parametrize(
    ("q", "expected"),
    [(1, (0.35, 0, 0.3975)), (0, (0.4, 0, 0.4)), (0.5, (0.3582306, 0, 0.3980187)), (2 / 3, (0.3528273, 0, 0.3977337))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_published_first_step_of_prox_adam(q: float, expected: tuple[float, ...], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.tensor([[0.5, -0.02, 0.3]], dtype=dtype))
    optimizer = ProxGen([weight], 0.1, penalty=Lq(q, 0.05), weight_decay=0.0)
    weight.grad = torch.tensor([[0.1, 0.0, -2.0]], dtype=dtype)
    optimizer.step()
    assert weight.tolist()[0] == pytest.approx(expected, abs=1e-6)
    assert weight[0, 1] == 0


def lasso(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(12, generator=generator, dtype=torch.float64) * (torch.arange(12) % 3 == 0)
    return a, a @ x + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64)


def coordinate_descent(a: Tensor, b: Tensor, lam: float) -> Tensor:
    x = torch.zeros(a.shape[1], dtype=torch.float64)
    for _ in range(2000):
        for j in range(len(x)):
            rest = b - a @ x + a[:, j] * x[j]
            x[j] = soft(a[:, j] @ rest / len(b), lam) / (a[:, j].square().sum() / len(b))
    return x


def test_plain_steps_are_ista_and_end_where_coordinate_descent_does() -> None:
    a, b = lasso()
    lam = 0.15
    expected = coordinate_descent(a, b, lam)
    weight = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    lr = 1 / float(torch.linalg.matrix_norm(a.T @ a / len(b), 2))
    optimizer = ProxGen([{"params": [weight], "penalty": Lq(1, lam)}], lr, preconditioner="sgd", weight_decay=0.0)
    for _ in range(4000):
        weight.grad = a.T @ (a @ weight.detach() - b) / len(b)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-10)
    assert torch.equal(weight == 0, expected == 0) and 8 <= int((weight == 0).sum()) <= 11


def test_one_step_solves_an_orthonormal_lasso() -> None:
    q, _ = torch.linalg.qr(tensors((9, 5), seed=5)[0])
    b = tensors((9,), seed=6)[0]
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = ProxGen([{"params": weight, "penalty": Lq(1, 0.4)}], 1.0, preconditioner="sgd", weight_decay=0.0)
    weight.grad = q.T @ (q @ weight.detach() - b)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), soft(q.T @ b, 0.4), rtol=0, atol=1e-14)


@each
@pytest.mark.parametrize("q", [1.0, 0.5])
def test_the_limit_is_a_critical_point_of_loss_plus_penalty(name: str, q: float) -> None:
    """-g = lambda q |x|^(q - 1) sign(x) where something is left, for l1 |g| <= lambda where nothing is: the strength
    means the same whatever the preconditioner, momentum and bias correction included."""
    a, b = lasso(1)
    lam = 0.2
    weight = nn.Parameter(0.5 * torch.ones(12, dtype=torch.float64))
    optimizer = ProxGen(
        [{"params": weight, "penalty": Lq(q, lam)}],
        0.02,
        preconditioner=name,
        weight_decay=0.0,
        eps=1e-3,  # type: ignore[arg-type]
    )
    steps = 6000 if name == "adagrad" else 3000
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (0.5 if name == "adagrad" else 0.02) * (1 - step / steps) ** 2
        weight.grad = a.T @ (a @ weight.detach() - b) / len(b)
        optimizer.step()
    x = weight.detach()
    g = a.T @ (a @ x - b) / len(b)
    active = x != 0
    assert 2 <= int(active.sum()) <= 10
    assert float((g + lam * q * x.abs() ** (q - 1) * x.sign())[active].abs().max()) < 2e-3
    if q == 1:
        assert float(g[~active].abs().max()) < lam + 2e-3
        torch.testing.assert_close(x, coordinate_descent(a, b, lam), rtol=0, atol=1e-2)


def test_a_penalty_in_the_loss_leaves_small_weights_and_the_map_leaves_zeros() -> None:
    a, b = lasso(2)
    found = []
    for ours in (True, False):
        weight = nn.Parameter(0.3 * torch.ones(12, dtype=torch.float64))
        given = [{"params": weight, "penalty": Lq(1, 0.3) if ours else None}]
        optimizer = ProxGen(given, 0.01, weight_decay=0.0)
        for _ in range(1500):
            optimizer.zero_grad()
            loss = (a @ weight - b).square().mean() / 2
            (loss if ours else loss + Lq(1, 0.3).value(weight)).backward()
            optimizer.step()
        found.append(weight.detach())
    assert int((found[0] == 0).sum()) >= 5 and int((found[1] == 0).sum()) == 0
    assert torch.equal(found[0] == 0, found[1].abs() < 0.02)


def test_revised_and_original_proxquant() -> None:
    """w = (0.7, 0.7) with d = (0.1, 2): (0.80, 0.705) in the metric, (0.71, 0.71) without."""
    for metric, expected in (("preconditioner", (0.8, 0.705)), ("euclidean", (0.71, 0.71))):
        weight = nn.Parameter(torch.tensor([[0.7 + 0.01, 0.7 + 0.01]], dtype=torch.float64))
        optimizer = ProxGen(
            [weight], 0.01, penalty=Wells(1.0), weight_decay=0.0, betas=(0.0, 0.0), eps=0.0, metric=metric
        )
        weight.grad = torch.tensor([[0.1, 2.0]], dtype=torch.float64)  # a step of Adam is lr, and d is |g|
        optimizer.step()
        assert weight.tolist()[0] == pytest.approx(expected)


def test_weights_without_any_gradient_and_the_least_denominator() -> None:
    """d is eps there: a penalty zeroes them at once, unless a least d bounds the strength."""
    found = []
    for least in (0.0, 0.5):
        weight = nn.Parameter(torch.tensor([[0.5, 0.5]]))
        optimizer = ProxGen([weight], 0.01, penalty=Lq(1, 0.1), weight_decay=0.0, min_denominator=least)
        weight.grad = torch.tensor([[0.0, 1.0]])
        optimizer.step()
        found.append(weight.tolist()[0])
    assert found[0] == pytest.approx([0.0, 0.489]) and found[1] == pytest.approx([0.498, 0.489])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.head = nn.Linear(6, 10, bias=False)


def test_u7_4_what_is_penalised_is_said_and_true() -> None:
    net = Net()
    optimizer = ProxGen(net, penalty=Lq(0.5, 0.1))
    reasons = {route.name: route.reason for route in optimizer.routing_table()}
    assert {name for name, reason in reasons.items() if "Lq(q=0.5, strength=0.1" in reason} == {
        "body.0.weight",
        "body.2.weight",
    }
    assert reasons["embedding.weight"].startswith("no penalty: embedding") and "bias" in reasons["body.0.bias"]
    assert "no penalty: norm" in str(optimizer.routing_table())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    zero = {name for name, p in net.named_parameters() if not p.any()} - {"body.1.bias"}
    assert zero == {"body.0.weight", "body.2.weight"}
    assert optimizer.penalty_value() == 0


def test_groups_say_it_themselves_and_bare_tensors_by_their_dimensions() -> None:
    vector, matrix, other = (nn.Parameter(torch.ones(shape)) for shape in ((3,), (2, 2), (2, 3)))
    groups = [{"params": [vector], "penalty": Lq(1, 0.5)}, {"params": [matrix], "penalty": None}, {"params": other}]
    optimizer = ProxGen(groups, penalty=Nuclear(0.25), preconditioner="sgd")
    assert [penalty_of(group) for group in optimizer.param_groups] == [Lq(1, 0.5), None, Nuclear(0.25)]
    assert optimizer.penalty_value() == pytest.approx(1.5 + 0.25 * 6**0.5)
    bare = ProxGen([vector, matrix], penalty=Lq(1, 0.5))
    found = {id(p): penalty_of(group) for group in bare.param_groups for p in group["params"]}
    assert found == {id(vector): None, id(matrix): Lq(1, 0.5)}
    before = len(bare.param_groups)
    with pytest.raises(ValueError, match="given again"):
        bare.add_param_group({"params": [other, vector]})
    assert len(bare.param_groups) == before


def test_u7_3_the_penalty_and_its_scale_are_in_the_state_as_plain_values() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = ProxGen([weight], penalty=Wells(0.1, (-1, 0, 1), q=0.5))
    optimizer.scale_strength(0.25)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = ProxGen([nn.Parameter(torch.ones(3, 3))], penalty=Lq(1, 9.0))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert penalty_of(other.param_groups[0]) == Wells(0.1, (-1, 0, 1), q=0.5)
    assert other.param_groups[0]["strength_scale"] == 0.25
    assert penalty_of(copy.deepcopy(other).param_groups[0]) == Wells(0.1, (-1, 0, 1), q=0.5)


def test_bfloat16_keeps_small_steps_and_exact_zeros() -> None:
    """1,000 steps of 1e-5 from 1, each below the resolution of bfloat16, and a shrinkage as small."""
    weight = nn.Parameter(torch.tensor([[1.0, 1.0, 0.004]], dtype=torch.bfloat16))
    optimizer = ProxGen([weight], 1e-5, penalty=Lq(1, 0.5), preconditioner="sgd", weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.bfloat16)
        optimizer.step()
    master = optimizer.state[weight]["master"]
    assert master.tolist()[0] == pytest.approx([1 - 0.015, 1 - 0.005, 0], abs=5e-5)
    assert torch.equal(weight, master.bfloat16()) and master[0, 2] == 0
    assert weight.dtype == torch.bfloat16


def test_bfloat16_weights_loaded_after_construction_are_where_it_starts() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = ProxGen([weight], 0.5, penalty=None, preconditioner="sgd")
    with torch.no_grad():
        weight.fill_(3.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == [[2.484375, 2.484375], [2.484375, 2.484375]]  # 3 - 0.5 (1 + 0.01 * 3), rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_freezing_rounds_and_stops_what_has_levels_alone(dtype: torch.dtype) -> None:
    first, second = (nn.Parameter(v.to(dtype)) for v in tensors((4, 4), (4, 4)))
    optimizer = ProxGen([{"params": first, "penalty": Wells(0.1)}, {"params": second, "penalty": Lq(1, 0.1)}], 0.1)
    assert optimizer.freeze() == 1
    assert set(first.flatten().tolist()) == {-1.0, 1.0}
    resumed = ProxGen([{"params": first}, {"params": second}], penalty=None)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, resumed):
        before = [first.detach().clone(), second.detach().clone()]
        for p in (first, second):
            p.grad = torch.ones_like(p)
        one.step()
        assert torch.equal(first, before[0]) and not torch.equal(second, before[1])
    with pytest.raises(ValueError, match="no penalty has levels to round to: use Wells or NearQuantized"):
        ProxGen([second], penalty=Lq(1, 0.1)).freeze()


def test_a_scale_multiplies_all_strengths_and_leaves_constraints() -> None:
    for scale in (0.0, 0.5, 2.0):
        weights = [nn.Parameter(torch.tensor([[2.0, 0.3]])) for _ in range(2)]
        groups = [{"params": weights[0], "penalty": Lq(1, 1.0)}, {"params": weights[1], "penalty": Box(-1, 1)}]
        optimizer = ProxGen(groups, 0.1, preconditioner="sgd", weight_decay=0.0)
        optimizer.scale_strength(scale)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert weights[0].tolist()[0] == pytest.approx([2 - 0.1 * scale, 0.3 - 0.1 * scale])
        assert weights[1].tolist()[0] == pytest.approx([1.0, 0.3])
    with pytest.raises(ValueError, match=r"scale=-1: expected a number in \[0, inf\)"):
        optimizer.scale_strength(-1)


@pytest.mark.parametrize("penalty", [L0Ball(share=0.25), NearQuantized(1.0), Nuclear(5.0), GroupLasso(5.0, 1)])
def test_penalties_of_whole_tensors(penalty: Penalty) -> None:
    """After a step with them, each tensor is what the map alone gives for v."""
    values = [nn.Parameter(v) for v in tensors((6, 4), (5, 8), seed=2)]
    start = [v.detach().clone() for v in values]
    optimizer = ProxGen(values, 0.1, penalty=penalty, preconditioner="sgd", weight_decay=0.0)
    for v in values:
        v.grad = 0.3 * torch.ones_like(v)
    optimizer.step()
    for value, before in zip(values, start, strict=True):
        torch.testing.assert_close(value.detach(), penalty.prox(before - 0.03, 0.1))
        assert not torch.equal(value.detach(), before - 0.03)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("penalty", "cut"),
    [(Lq(0.5, 0.1), 0), (Lq(1, 0.1), 1), (Wells(0.1), 0), (GroupLasso(0.5), 0), (GroupLasso(0.5, 1), 1),
     (Nuclear(0.1), None), (L0Ball(share=0.5), None)],
)  # fmt: skip
def test_u7_2_shards_that_hold_whole_groups(penalty: Penalty, cut: int | None, mesh: DeviceMesh) -> None:
    results = []
    for sharded in (False, True):
        value = tensors((6, 4), seed=8)[0]
        placement = [Replicate() if cut is None else Shard(cut)]
        weight = nn.Parameter(distribute_tensor(value, mesh, placement) if sharded else value)
        metric = "preconditioner" if penalty.diagonal else "euclidean"
        optimizer = ProxGen([weight], 0.05, penalty=penalty, metric=metric)
        for _ in range(3):
            weight.grad = 0.1 * weight.detach().clone()
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(results[1].full_tensor(), results[0])


@pytest.mark.parametrize(
    ("penalty", "cut"), [(GroupLasso(0.5), 1), (GroupLasso(0.5, 1), 0), (L0Ball(count=3), 0), (NearQuantized(0.1), 0)]
)
def test_shards_that_cut_a_group_are_refused(penalty: Penalty, cut: int, mesh: DeviceMesh) -> None:
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(cut)]))
    with pytest.raises(ValueError, match=r"layer is sharded as S.*, which cuts what .* needs as a whole"):
        ProxGen([("layer", weight)], penalty=penalty)
    late = ProxGen([("layer", plain := nn.Parameter(torch.ones(4, 4)))], penalty=penalty)
    late.param_groups[0]["params"][0] = weight  # as a wrapper does that shards after construction
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="layer is sharded as"):
        late.step()
    assert torch.equal(plain, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioner": "lion"}, "preconditioner='lion': choose one of sgd, momentum, adam, adamw"),
        ({"metric": "hessian"}, "metric='hessian': choose one of preconditioner, euclidean"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0: expected a number in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\): expected two numbers"),
        ({"momentum": 1.0}, r"momentum=1.0: expected a number in \[0, 1\)"),
        ({"alpha": -0.1}, r"alpha=-0.1: expected a number in \[0, 1\)"),
        ({"eps": -1.0}, r"eps=-1.0: expected a number in \[0, inf\)"),
        ({"min_denominator": -1.0}, r"min_denominator=-1.0: expected a number in \[0, inf\)"),
        ({"lr": math.nan}, r"lr=nan: expected a number in \[0, inf\)"),
        ({"penalty": 0.1}, r"penalty=0.1: expected one of burnish.penalties, such as Lq\(0.5, 1e-4\), or None"),
        ({"penalty": {"kind": "Lp"}}, "kind='Lp' is unknown"),
        (
            {"penalty": Nuclear(0.1)},
            "has no proximal map in the metric of adamw: pass metric='euclidean', or precondit",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ProxGen([nn.Parameter(torch.ones(2, 2))], **options)
    assert "\n" not in str(caught.value)


def test_a_penalty_without_a_map_is_refused() -> None:
    class Bare(Penalty):
        strength = 1.0

    with pytest.raises(ValueError, match="Bare has no proximal map: define its shrink_"):
        ProxGen([nn.Parameter(torch.ones(2, 2))], penalty=Bare())
