"""What every optimizer here promises, held to by all of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from burnish.optim import (
    AMUSE,
    AdamWScheduleFree,
    BlockDiagonal,
    Muon,
    NorMuon,
    ProxGen,
    RAdamScheduleFree,
    SGDScheduleFree,
    elementwise,
    split_parameters,
)
from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.base import RoutedOptimizer
from burnish.penalties import Lq
from tests.optim.reference import tensors

Make = Callable[..., RoutedOptimizer]
TABLE: dict[str, Make] = {
    "Muon": lambda params, **options: Muon(params, **({"lr": 0.02} | options)),
    "NorMuon": lambda params, **options: NorMuon(params, **({"weight_decay": 0.1} | options)),
    "AMUSE": lambda params, **options: AMUSE(
        params, **({"lr": 0.02, "warmup_steps": 3, "weight_decay": 0.1} | options)
    ),
    "SGDScheduleFree": lambda params, **options: SGDScheduleFree(params, **({"lr": 0.1, "warmup_steps": 2} | options)),
    "AdamWScheduleFree": lambda params, **options: AdamWScheduleFree(
        params, **({"lr": 0.02, "weight_decay": 0.1} | options)
    ),
    "RAdamScheduleFree": lambda params, **options: RAdamScheduleFree(params, **({"betas": (0.9, 0.9)} | options)),
    "ProxGen": lambda params, **options: ProxGen(
        params, **({"lr": 0.02, "weight_decay": 0.1, "penalty": Lq(0.5, 1e-3)} | options)
    ),
    "BlockDiagonal": lambda params, **options: BlockDiagonal(
        params, **({"lr": 0.02, "weight_decay": 0.1, "block_size": 3, "remainder": "smaller"} | options)
    ),
}
MATRIX_RULE = ["Muon", "NorMuon", "AMUSE"]
AVERAGED = [name for name in TABLE if name not in ("Muon", "NorMuon", "BlockDiagonal", "ProxGen")]
every = pytest.mark.parametrize("name", TABLE)
SHAPES = [(6, 4), (3, 5, 4), (4, 2, 3, 3), (7,), ()]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(value.to(dtype)) for value in tensors(*SHAPES, seed=1)]


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: range, sign: float = 1.0, order: list[Tensor] | None = None) -> None:
    for t in steps:
        for index, p in enumerate(order or held(optimizer)):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + index)).to(p.dtype)
            p.grad = sign * (noise + 0.1 * p.detach())
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    values = [p.detach().clone() for p in held(optimizer)]
    states = [optimizer.state[p] for p in held(optimizer)]
    return values + [state[key].clone() for state in states for key in sorted(state)]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(ones, others, strict=True)
    )


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_u7_3_state_is_complete_at_construction(name: str, dtype: torch.dtype) -> None:
    """Same keys, shapes and dtypes before the first step, after it, and for a tensor that never had a gradient."""

    def layout(optimizer: RoutedOptimizer) -> Any:
        saved = optimizer.state_dict()
        states = {
            number: {key: (v.shape, v.dtype) for key, v in state.items()} for number, state in saved["state"].items()
        }
        return states, [sorted(group) for group in saved["param_groups"]]

    values = parameters(dtype)
    optimizer = TABLE[name](values)
    assert all(optimizer.state.get(p) for p in values)
    before = layout(optimizer)
    assert sorted(before[0]) == list(range(len(values))) and all(before[0].values())
    for p in values[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert layout(optimizer) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "mode"), [(name, "training") for name in TABLE] + [(name, "averaged") for name in AVERAGED]
)
def test_u7_3_u7_5_saved_loaded_and_continued_bitwise(name: str, mode: str, dtype: torch.dtype) -> None:
    values = parameters(dtype)
    optimizer = TABLE[name](values)
    train(optimizer, range(5))
    if mode == "averaged":
        assert isinstance(optimizer, AveragedOptimizer)
        optimizer.eval()
    file = io.BytesIO()
    torch.save({"weights": values, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [nn.Parameter(value.detach().clone()) for value in saved["weights"]]
    resumed = TABLE[name](others, lr=0.5)  # the saved lr counts
    resumed.load_state_dict(saved["optimizer"])
    assert equal(snapshot(resumed), snapshot(optimizer))
    for one in (optimizer, resumed):
        if isinstance(one, AveragedOptimizer):
            assert {group["mode"] for group in one.param_groups} == {mode}
            one.train()
        train(one, range(5, 12))
    assert equal(snapshot(resumed), snapshot(optimizer))


@every
def test_loading_again_replaces_all_of_the_state(name: str) -> None:
    """A copy of the state taken earlier, loaded into the optimizer that went on, takes it back."""
    values = parameters()
    optimizer = TABLE[name](values)
    train(optimizer, range(3))
    weights, state = [value.detach().clone() for value in values], copy.deepcopy(optimizer.state_dict())
    train(optimizer, range(3, 6))
    ahead = snapshot(optimizer)
    with torch.no_grad():
        for value, before in zip(values, weights, strict=True):
            value.copy_(before)
    optimizer.load_state_dict(state)
    train(optimizer, range(3, 6))
    assert equal(snapshot(optimizer), ahead)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [(name, torch.float32, torch.float64) for name in TABLE]
    + [(name, torch.float64, torch.float32) for name in TABLE]
    + [(name, torch.float32, torch.bfloat16) for name in TABLE if name not in (*AVERAGED, "ProxGen")],
)
def test_a_state_goes_on_in_another_precision(name: str, before: torch.dtype, after: torch.dtype) -> None:
    """It takes the dtypes that the optimizer has for these weights."""
    optimizer = TABLE[name](parameters(before))
    train(optimizer, range(3))
    resumed = TABLE[name]([nn.Parameter(value.detach().to(after)) for value in held(optimizer)])
    fresh = [value.dtype for value in snapshot(resumed)]
    resumed.load_state_dict(optimizer.state_dict())
    assert [value.dtype for value in snapshot(resumed)] == fresh
    for one, other in zip(snapshot(resumed), snapshot(optimizer), strict=True):
        assert torch.equal(one, other.to(one.dtype))
    train(resumed, range(3, 5))


@every
def test_copies_and_pickles_go_on_alone(name: str) -> None:
    optimizer = TABLE[name](parameters())
    train(optimizer, range(4))
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    before = snapshot(optimizer)
    for other in others:
        train(other, range(4, 7))
        assert equal(snapshot(optimizer), before)
        assert str(other.routing_table())
    train(optimizer, range(4, 7))
    for other in others:
        assert equal(snapshot(other), snapshot(optimizer))


@every
def test_u7_1_keys_of_others_in_a_group_are_kept_and_loaded(name: str) -> None:
    optimizer = TABLE[name]([{"params": parameters(), "initial_lr": 0.02, "tag": "body"}])
    assert {(group["initial_lr"], group["tag"]) for group in optimizer.param_groups} == {(0.02, "body")}
    state = optimizer.state_dict()
    plain = TABLE[name](parameters())
    plain.load_state_dict(state)
    train(plain, range(2))
    assert {(group["initial_lr"], group["tag"]) for group in plain.param_groups} == {(0.02, "body")}


@every
def test_a_group_added_later_is_trained_as_if_by_an_optimizer_of_its_own(name: str) -> None:
    first, late, alone = parameters(), parameters(), parameters()
    optimizer = TABLE[name](first)
    train(optimizer, range(2))
    before = [value.detach().clone() for value in first]
    count = len(optimizer.param_groups)
    optimizer.add_param_group({"params": late, "weight_decay": 0.3})
    assert all(optimizer.state[p] for p in late)
    assert {group["weight_decay"] for group in optimizer.param_groups[count:]} == {0.3}
    for p in first:
        p.grad = None
    other = TABLE[name](alone, weight_decay=0.3)
    for t in range(3):
        for one, two in zip(late, alone, strict=True):
            one.grad = torch.full_like(one, 0.5 + t) * torch.linspace(-1, 1, one.numel()).view(one.shape)
            two.grad = one.grad.clone()
        optimizer.step()
        other.step()
    assert equal([p.detach() for p in late], [p.detach() for p in alone])
    if name != "AMUSE":  # beta grows, and parameters at rest with it
        assert equal([p.detach() for p in first], before)


@every
def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned(name: str) -> None:
    values, others = parameters(), parameters()
    optimizer, plain = TABLE[name](values), TABLE[name](others)
    losses = []

    def loss(of: list[nn.Parameter]) -> Tensor:
        return sum(((p - 0.5).square().sum() for p in of), torch.zeros(()))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        value = loss(values)
        value.backward()
        losses.append(value)
        return value

    for count in range(1, 4):
        assert optimizer.step(closure) is losses[-1] and len(losses) == count
        plain.zero_grad()
        loss(others).backward()
        assert plain.step() is None
    assert equal(snapshot(optimizer), snapshot(plain))


@every
def test_maximizing_is_minimizing_the_negative(name: str) -> None:
    up, down = TABLE[name](parameters(), maximize=True), TABLE[name](parameters())
    train(down, range(4))
    train(up, range(4), sign=-1.0)
    assert equal(snapshot(up), snapshot(down))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.kernel = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(6, 10, bias=False)


@every
def test_a_model_its_routing_and_its_groups_are_the_same(name: str) -> None:
    results = []
    for given in (
        lambda net: net,
        split_parameters,
        lambda net: split_parameters(net).param_groups(),
    ):
        net = Net()
        optimizer = TABLE[name](given(net))
        train(optimizer, range(3), order=list(net.parameters()))
        results.append([p.detach() for p in net.parameters()])
        rules = {route.name: route.rule for route in optimizer.routing_table()}
        matrix = {"body.0.weight", "body.2.weight", "kernel.weight"} if name in MATRIX_RULE else set()
        assert {tensor for tensor, rule in rules.items() if rule == "matrix"} == matrix
        assert set(rules) == {tensor for tensor, _ in net.named_parameters()}
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@every
def test_tensors_pairs_and_groups_are_the_same(name: str) -> None:
    """Where no model is known, dimensions decide."""
    results = []
    for given in (
        lambda values: values,
        lambda values: iter(values),
        lambda values: [(f"layer.{index}", value) for index, value in enumerate(values)],
        lambda values: [{"params": values}],
        lambda values: [{"params": [(f"layer.{index}", value) for index, value in enumerate(values)]}],
        lambda values: [
            {"params": values[:3], "use_muon": name in MATRIX_RULE},
            {"params": values[3:], "use_muon": False},
        ],
    ):
        values = parameters()
        optimizer = TABLE[name](given(values))
        train(optimizer, range(3), order=values)
        results.append([p.detach() for p in values])
        rules = [route.rule for route in optimizer.routing_table()]
        assert rules == (["matrix"] * 3 if name in MATRIX_RULE else ["auxiliary"] * 3) + ["auxiliary"] * 2
    assert all(equal(results[0], other) for other in results[1:])
    single = nn.Parameter(torch.ones(3, 3))
    assert held(TABLE[name]([{"params": single}])) == [single]


@every
def test_groups_have_their_own_options(name: str) -> None:
    """Two groups in one optimizer move as two optimizers."""
    both, one, two = parameters(), parameters(), parameters()
    groups = [{"params": both[:2], "lr": 0.03, "weight_decay": 0.2}, {"params": both[2:], "lr": 0.01}]
    together = TABLE[name](groups)
    apart = [TABLE[name](one[:2], lr=0.03, weight_decay=0.2), TABLE[name](two[2:], lr=0.01)]
    for t in range(4):
        for index in range(len(SHAPES)):
            g = torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(10 * t + index))
            for values in (both, one, two):
                values[index].grad = g.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    assert equal([p.detach() for p in both], [p.detach() for p in one[:2] + two[2:]])


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_left_as_they_were(name: str, dtype: torch.dtype, maximize: bool) -> None:
    values = parameters(dtype)
    optimizer = TABLE[name](values, maximize=maximize)
    for t in range(6):
        gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(dtype) for p in values]
        for p, g in zip(values, gradients, strict=True):
            p.grad = g.clone()
        kept = [p.grad for p in values]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(values, kept, strict=True))
        assert equal([p.grad for p in values if p.grad is not None], gradients)


@every
def test_float64_is_stepped_in_float64(name: str) -> None:
    """A step that float32 would round away arrives, with digits that float32 does not have."""
    values = parameters(torch.float64)
    optimizer = TABLE[name](values, lr=1e-11)
    before = [p.detach().clone() for p in values]
    train(optimizer, range(8))
    half = parameters(torch.float64)
    finer = TABLE[name](half, lr=0.5e-11)
    train(finer, range(8))
    for p, q, start in zip(values, half, before, strict=True):
        assert 0 < float((p.detach() - start).abs().max()) < 1e-9
        torch.testing.assert_close((p.detach() - start), 2 * (q.detach() - start), rtol=1e-2, atol=1e-14)
    assert {v.dtype for p in values for key, v in optimizer.state[p].items() if key != "step"} == {torch.float64}


@every
def test_u12_1_the_same_twice_and_no_random_numbers_drawn(name: str) -> None:
    results = []
    for _ in range(2):
        state = torch.get_rng_state()
        optimizer = TABLE[name](parameters())
        train(optimizer, range(5))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(snapshot(optimizer))
    assert equal(*results)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_does_not_matter(name: str, dtype: torch.dtype) -> None:
    """channels_last kernels, transposed matrices and strided vectors equal contiguous ones; their gradients may be laid
    out otherwise than they are."""
    start = [value.to(dtype) for value in tensors((4, 2, 3, 3), (5, 6), (2, 4, 5), (6,), seed=4)]
    strided = [
        start[0].contiguous(memory_format=torch.channels_last),
        start[1].T.contiguous().T,
        start[2].mT.contiguous().mT,
        torch.stack([start[3], start[3]], 1)[:, 0],
    ]
    assert not any(value.is_contiguous() for value in strided)
    mine, plain = ([nn.Parameter(value) for value in values] for values in (strided, [v.clone() for v in start]))
    optimizer, other = TABLE[name](mine), TABLE[name](plain)
    for t in range(5):
        for index, (p, q) in enumerate(zip(mine, plain, strict=True)):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(10 * t + index)).to(dtype)
            p.grad = q.grad.clone() if t % 2 else torch.empty_like(p).copy_(q.grad)
        optimizer.step()
        other.step()
    assert not any(p.is_contiguous() for p in mine)
    for p, q in zip(mine, plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
        if name not in MATRIX_RULE:
            assert torch.equal(p, q)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_any_size_give_the_same(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than a piece, and many small ones in one piece. (In half precision torch rounds once or twice, as
    a number falls into a full vector of the processor or not.)"""
    results = []
    for piece in (2**20, 64, 7):
        monkeypatch.setattr(elementwise, "PIECE", piece)
        optimizer = TABLE[name]([nn.Parameter(v.to(dtype)) for v in tensors((24, 30), (300,), (5,), (3, 4, 9), seed=2)])
        train(optimizer, range(4))
        results.append(snapshot(optimizer))
        if isinstance(optimizer, AveragedOptimizer):
            with optimizer.averaged():
                results[-1] += snapshot(optimizer)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            if dtype == torch.bfloat16:
                torch.testing.assert_close(two, one, rtol=2**-6, atol=2**-9)
            else:
                assert torch.equal(one, two)


@every
def test_tensors_without_elements_are_carried_along(name: str) -> None:
    """An expert that holds nothing on this rank, a vocabulary of none; and a group without tensors."""
    shapes = [(0, 5), (3, 0, 4), (0,), (4, 3)]
    values = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = TABLE[name]([{"params": values}, {"params": [], "use_muon": False}])
    for _ in range(8):  # RAdam leaves out the first steps
        for p in values:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert values[3].abs().min() > 0
    assert [tuple(p.shape) for p in values] == shapes
    if isinstance(optimizer, AveragedOptimizer):
        with optimizer.averaged():
            pass
    again = TABLE[name]([{"params": values}, {"params": [], "use_muon": False}])
    again.load_state_dict(optimizer.state_dict())


@every
def test_no_gradient_at_all_moves_nothing(name: str) -> None:
    values = parameters()
    optimizer = TABLE[name](values)
    before = [p.detach().clone() for p in values]
    for _ in range(2):
        optimizer.step()
    assert equal([p.detach() for p in values], before)


@every
def test_no_learning_rate_moves_nothing(name: str) -> None:
    """Not while warming up, not after it, and not in the average."""
    values = parameters()
    before = [p.detach().clone() for p in values]
    optimizer = TABLE[name](values, lr=0.0)
    train(optimizer, range(8))
    if isinstance(optimizer, AveragedOptimizer):
        optimizer.eval()
    assert equal([p.detach() for p in values], before)


@every
def test_frozen_tensors_stay(name: str) -> None:
    values = parameters()
    values[0].requires_grad_(False)
    before = values[0].detach().clone()
    optimizer = TABLE[name](values)
    for p in values[1:]:
        p.grad = torch.ones_like(p)
    for _ in range(8):
        optimizer.step()
    assert torch.equal(values[0], before) and not torch.equal(values[3], parameters()[3])


@every
def test_step_hooks_run_once(name: str) -> None:
    optimizer = TABLE[name](parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loaded"))
    train(optimizer, range(2))
    assert seen == ["before", "after"] * 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[4:] == ["saved", "loaded"]


@pytest.fixture
def lone_group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MATRIX_RULE)
def test_a_resume_keeps_the_process_group_and_the_reasons(name: str, lone_group: Any) -> None:
    """A resumed data parallel run must go on sharing the work; only copies are on their own."""
    optimizer = TABLE[name](Net(), process_group=lone_group)
    table = str(optimizer.routing_table())
    train(optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.process_group is lone_group
    assert str(optimizer.routing_table()) == table
    train(optimizer, range(2, 4))
    other = copy.deepcopy(optimizer)
    assert other.process_group is None


@pytest.mark.parametrize("name", MATRIX_RULE)
def test_a_process_group_of_one_changes_nothing(name: str, lone_group: Any) -> None:
    shared, alone = TABLE[name](parameters(), process_group=lone_group), TABLE[name](parameters())
    train(shared, range(3))
    train(alone, range(3))
    assert equal(snapshot(shared), snapshot(alone))


@every
def test_a_plain_loop_lowers_the_loss(name: str) -> None:
    """A line is fitted: with the average in, the loss is a tenth of the first one."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 5)
    targets = inputs @ torch.randn(5, 3)
    layer = nn.Linear(5, 3)
    lr = {"SGDScheduleFree": 1.0, "AMUSE": 0.1}.get(name, 0.05)
    optimizer = TABLE[name](layer, lr=lr, weight_decay=0.0)
    first = float(nn.functional.mse_loss(layer(inputs), targets).detach())
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(inputs), targets).backward()
        optimizer.step()
    if isinstance(optimizer, AveragedOptimizer):
        optimizer.eval()
    assert float(nn.functional.mse_loss(layer(inputs), targets).detach()) < 0.1 * first
