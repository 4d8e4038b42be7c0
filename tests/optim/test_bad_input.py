"""Bad input is refused with the value, what was expected, and what to do; nothing is changed on the way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.errors import TrainingError
from burnish.optim import (
    AMUSE,
    AdamWScheduleFree,
    BlockDiagonal,
    Muon,
    NorMuon,
    ProxGen,
    RAdamScheduleFree,
    SGDScheduleFree,
)
from burnish.optim.averaging import AveragedOptimizer

TABLE: dict[str, Callable[..., Any]] = {
    "Muon": Muon,
    "NorMuon": NorMuon,
    "AMUSE": lambda params, **options: AMUSE(params, **({"lr": 0.02, "warmup_steps": 3} | options)),
    "SGDScheduleFree": SGDScheduleFree,
    "AdamWScheduleFree": AdamWScheduleFree,
    "RAdamScheduleFree": lambda params, **options: RAdamScheduleFree(params, **({"silent_sgd_phase": False} | options)),
    "ProxGen": ProxGen,
    "BlockDiagonal": lambda params, **options: BlockDiagonal(params, **({"remainder": "smaller"} | options)),
}
MATRIX_RULE = ["Muon", "NorMuon", "AMUSE"]
AVERAGED = [name for name in TABLE if name not in ("Muon", "NorMuon", "BlockDiagonal", "ProxGen")]
every = pytest.mark.parametrize("name", TABLE)
averaged = pytest.mark.parametrize("name", AVERAGED)


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 3))


def out_of_range() -> list[tuple[str, dict[str, Any], str]]:
    nan, inf = float("nan"), float("inf")
    rows: list[tuple[str, dict[str, Any], str]] = []
    for name in TABLE:
        rows += [(name, {"lr": value}, rf"lr={value}: expected a number in \[0, inf\)") for value in (-0.1, nan, inf)]
        rows += [(name, {"weight_decay": -1}, r"weight_decay=-1: expected a number in \[0, inf\)")]
        rows += [(name, {"nonfinite": "ignore"}, "nonfinite='ignore': choose one of raise, skip")]
    for name in MATRIX_RULE:
        rows += [
            (name, {"momentum": value}, rf"momentum={value}: expected a number in \[0, 1\)") for value in (-0.1, 1.0)
        ]
        rows += [
            (name, {"steps": 0}, r"steps=0: choose a whole number from 1 to 99"),
            (name, {"steps": 100}, r"steps=100: choose a whole number from 1 to 99"),
            (name, {"scale": "rms"}, "scale='rms' is unknown: choose one of original, match_rms_adamw"),
            (name, {"orthogonalization": "qr"}, "orthogonalization='qr' is unknown: choose one of newton-schulz"),
            (name, {"momentum_form": "sum"}, "momentum_form='sum': choose one of ema, accumulate"),
            (name, {"eps": 0.0}, r"eps=0.0: expected a number in \(0, inf\)"),
            (name, {"auxiliary": "lion"}, "auxiliary='lion': choose one of adamw, sgd"),
            (name, {"auxiliary_eps": -1e-8}, r"auxiliary_eps=-1e-08: expected a number in \[0, inf\)"),
            (name, {"dtype": torch.int32}, "dtype=torch.int32: .*float"),
        ]
    for name in ("Muon", "NorMuon"):
        rows += [(name, {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0: expected a number in \[0, 1\)")]
        rows += [(name, {"auxiliary_lr": -1.0}, r"auxiliary_lr=-1.0: expected a number in \[0, inf\)")]
    rows += [
        ("NorMuon", {"beta2": 1.0}, r"beta2=1.0: expected a number in \[0, 1\)"),
        ("NorMuon", {"row_eps": -1.0}, r"row_eps=-1.0: expected a number in \[0, inf\)"),
    ]
    for beta in (0.0, -0.1, 1.1, nan):
        rows += [
            ("AMUSE", {"beta1": beta}, rf"beta1={beta}: expected a number in \(0, 1\]"),
            ("SGDScheduleFree", {"momentum": beta}, rf"momentum={beta}: expected a number in \(0, 1\]"),
            ("AdamWScheduleFree", {"betas": (beta, 0.9)}, rf"betas\[0\]={beta}: expected a number in \(0, 1\]"),
            ("RAdamScheduleFree", {"betas": (beta, 0.9)}, rf"betas\[0\]={beta}: expected a number in \(0, 1\]"),
        ]
    for name in ("AdamWScheduleFree", "RAdamScheduleFree"):
        rows += [(name, {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0: expected a number in \[0, 1\)")]
        rows += [(name, {"eps": -1.0}, r"eps=-1.0: expected a number in \[0, inf\)")]
    for name in ("SGDScheduleFree", "AdamWScheduleFree"):
        rows += [(name, {"warmup_steps": -1}, r"warmup_steps=-1: expected a number in \[0, inf\)")]
    for name in AVERAGED:
        rows += [
            (name, {"weight_lr_power": -1.0}, r"weight_lr_power=-1.0: expected a number in \[0, inf\)"),
            (name, {"r": nan}, "r=nan: expected a finite number"),
            (name, {"scheduler": "ignore"}, "scheduler='ignore': choose one of refuse, follow"),
        ]
    rows += [("AMUSE", {"warmup_steps": steps}, rf"warmup_steps={steps}: .* 2 or more") for steps in (0, 1, 2.5)]
    rows += [
        ("AMUSE", {"rho": -0.1}, r"rho=-0.1: expected a number in \[0, inf\)"),
        ("AMUSE", {"beta2": 1.0}, r"beta2=1.0: expected a number in \[0, 1\)"),
        ("AMUSE", {"weight_decay_at_y": -1.0}, r"weight_decay_at_y=-1.0: expected a number in \[0, inf\)"),
        ("AMUSE", {"auxiliary_lr": -1.0}, r"lr=-1.0: expected a number in \[0, inf\)"),
        ("AMUSE", {"interpolation": "stale"}, "interpolation='stale': choose one of exact, official"),
        ("AMUSE", {"averaging": "mean"}, "averaging='mean': choose one of weighted, uniform"),
        ("AMUSE", {"beta_schedule": "paper"}, "beta_schedule='paper': choose one of weights, steps"),
    ]
    return rows


@pytest.mark.parametrize(("name", "options", "message"), out_of_range())
def test_an_option_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TABLE[name]([matrix(), nn.Parameter(torch.ones(3))], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        ("Muon", {"lr": -1.0}, r"lr=-1.0: expected a number in \[0, inf\)"),
        ("Muon", {"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"),
        ("NorMuon", {"beta2": 2.0}, r"beta2=2.0: expected a number in \[0, 1\)"),
        ("AMUSE", {"beta1": 0.0}, r"beta1=0.0: expected a number in \(0, 1\]"),
        ("AMUSE", {"rho": -1.0}, r"rho=-1.0: expected a number in \[0, inf\)"),
        ("AMUSE", {"warmup_steps": 1}, "warmup_steps=1: .* 2 or more"),
        ("SGDScheduleFree", {"warmup_steps": -2}, r"warmup_steps=-2: expected a number in \[0, inf\)"),
        ("AdamWScheduleFree", {"eps": -1.0}, r"eps=-1.0: expected a number in \[0, inf\)"),
    ],
)
def test_an_option_of_a_group_out_of_range(name: str, group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TABLE[name]([{"params": [matrix()], **group}])
    optimizer = TABLE[name]([matrix()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [matrix()], **group})
    with pytest.raises(ValueError, match="tensor 0 is float16" if name in MATRIX_RULE else "tensor 1 is float16"):
        optimizer.add_param_group({"params": [matrix(), nn.Parameter(torch.ones(3, dtype=torch.float16))]})
    assert len(optimizer.param_groups) == len(optimizer.routing_table()) == 1, "a refused group must not stay"
    optimizer.step()


TENSORS: dict[str, tuple[Tensor, str]] = {
    "float16": (torch.ones(4, 3, dtype=torch.float16), "weight is float16, .* keep float32 .* or bfloat16"),
    "complex": (torch.ones(4, 3, dtype=torch.complex64), "weight is torch.complex64 .* real dense floating point"),
    "integer": (torch.ones(4, 3, dtype=torch.int64), "weight is torch.int64 .* real dense floating point"),
    "sparse": (torch.eye(3).to_sparse(), "weight is torch.float32 torch.sparse_coo: real dense floating point"),
}


@every
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_cannot_be_stepped(name: str, kind: str) -> None:
    value, message = TENSORS[kind]
    for use_muon in (True, False) if name in MATRIX_RULE else (False,):
        with pytest.raises(ValueError, match=message):
            TABLE[name]([{"params": [("weight", value)], "use_muon": use_muon}])
    if value.is_floating_point():
        with pytest.raises(ValueError, match=message):
            TABLE[name]([("weight", nn.Parameter(value))])


@every
def test_a_tensor_twice(name: str) -> None:
    one = matrix()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a tensor twice in a group
        with pytest.raises(ValueError, match=r"twice|same tensor"):
            TABLE[name]([("first", one), ("second", one)])
        with pytest.raises(ValueError, match=r"tensor 1 is twice in one group: give|are the same tensor: give it once"):
            TABLE[name]([{"params": [one, one], "use_muon": False}])
    with pytest.raises(ValueError, match="is given again in another group"):
        TABLE[name]([{"params": [one], "use_muon": False}, {"params": [matrix(), one], "use_muon": False}])


@pytest.mark.parametrize("name", MATRIX_RULE)
@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        ((3,), {}, r"weight has shape \[3\]: the matrix rule needs two dimensions or more"),
        ((), {}, r"weight has shape \[\]: the matrix rule needs two dimensions or more"),
        ((6, 4), {"splits": (2, 3)}, r"splits=\(2, 3\) of weight add up to 5, but it has 6 rows"),
        ((6, 4), {"splits": (3, 3), "transposed": True}, r"splits=\(3, 3\) of weight add up to 6, but it has 4 rows"),
        ((6, 4, 2), {"splits": (3, 3)}, r"splits=\(3, 3\) of weight add up to 6, but it has 4 rows"),
        ((6, 4), {"heads": 4}, "heads=4: the 6 rows of weight cannot be shared"),
        ((6, 4), {"heads": 2, "splits": (3, 3)}, "heads=2: .*without splits"),
        ((6, 4), {"layout": "rows"}, "layout='rows': choose one of batch, flatten"),
    ],
)
def test_a_tensor_that_is_not_the_matrix_it_is_said_to_be(
    name: str, shape: tuple[int, ...], group: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TABLE[name]([{"params": [("weight", nn.Parameter(torch.ones(shape)))], "use_muon": True, **group}])


@every
def test_tensors_in_no_order(name: str) -> None:
    with pytest.raises(TypeError, match="ordered collections"):
        TABLE[name]([{"params": {matrix(), matrix()}}])


@every
def test_nothing_to_train(name: str) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        TABLE[name]([])


def bits(optimizer: torch.optim.Optimizer) -> list[Any]:
    state = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    gradients = [
        None if p.grad is None else p.grad.clone() for group in optimizer.param_groups for p in group["params"]
    ]
    return [state, values, gradients]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def trained(name: str, **options: Any) -> tuple[list[nn.Parameter], Any]:
    torch.manual_seed(0)
    values = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 3, 4))]
    optimizer = TABLE[name]([("matrix", values[0]), ("vector", values[1]), ("stack", values[2])], **options)
    for _ in range(3):
        for p in values:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return values, optimizer


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_gradient_that_is_no_number_is_refused_and_nothing_changes(name: str, bad: float, where: int) -> None:
    values, optimizer = trained(name)
    for p in values:
        p.grad = torch.ones_like(p)
    values[where].grad.view(-1)[-1] = bad
    before = bits(optimizer)
    culprit = ("matrix", "vector", "stack")[where]
    with pytest.raises(
        TrainingError, match=f'gradient of {culprit} holds a NaN .*nothing was changed.*nonfinite="skip"'
    ):
        optimizer.step()
    assert same(bits(optimizer), before)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_skipped_when_asked(name: str, bad: float) -> None:
    values, optimizer = trained(name, nonfinite="skip")
    others, other = trained(name, nonfinite="skip")
    for p in values:
        p.grad = torch.ones_like(p)
    values[2].grad[1, 2, 3] = bad
    before = bits(optimizer)
    with pytest.warns(UserWarning, match="step left out: the gradient of stack holds a NaN or an infinity"):
        optimizer.step()
    assert same(bits(optimizer), before)
    for one in (values, others):
        for p in one:
            p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    other.step()
    assert same(bits(optimizer), bits(other)), "the next step goes on as if the one left out had not been"


@every
def test_a_sparse_gradient(name: str) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    group = {"params": [table.weight], "use_muon": False}
    optimizer = TABLE[name]([group])
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"gradient .*sparse_coo.* only dense"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@every
def test_the_state_of_another_optimizer(name: str) -> None:
    values, optimizer = trained(name)
    before = bits(optimizer)
    foreign = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in values])
    with pytest.raises(ValueError, match=f"written by another library, not by {name}: build the same"):
        optimizer.load_state_dict(foreign.state_dict())
    for other in TABLE:
        if other != name:
            _, one = trained(other)
            with pytest.raises(ValueError, match=f"written by {other}, not by {name}: build the same"):
                optimizer.load_state_dict(one.state_dict())
    assert same(bits(optimizer), before)


@every
def test_a_state_for_other_tensors(name: str) -> None:
    _, optimizer = trained(name)
    before = bits(optimizer)
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(TABLE[name]([matrix()]).state_dict())
    assert same(bits(optimizer), before)


@averaged
def test_the_state_of_weights_of_another_precision(name: str) -> None:
    """A bfloat16 weight has its average beside it, a float32 weight in itself: neither can be made of the other."""
    for one, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        saved = TABLE[name]([nn.Parameter(torch.ones(4, 3, dtype=one))]).state_dict()
        optimizer = TABLE[name]([nn.Parameter(torch.ones(4, 3, dtype=other))])
        with pytest.raises(ValueError, match=r"state of tensor 0 holds .* expected: .* weights of the same dtype"):
            optimizer.load_state_dict(saved)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "warmup": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
}


@averaged
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_is_refused_unless_it_is_to_be_followed(name: str, kind: str) -> None:
    _, optimizer = trained(name)
    scheduler = SCHEDULERS[kind](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler's, of the order of calls
        scheduler.step()
    before = bits(optimizer)
    with pytest.raises(ValueError, match=r"lr went from .* a scheduler is attached .* remove it .*scheduler='follow'"):
        optimizer.step()
    assert same(bits(optimizer), before)


@averaged
def test_a_followed_scheduler_sets_the_lr_of_the_step(name: str) -> None:
    values, optimizer = trained(name, scheduler="follow", lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for t in range(3):
        for p in values:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {0.1 * 0.5**t}
        if name != "RAdamScheduleFree":
            assert {group["scheduled_lr"] for group in optimizer.param_groups} == {0.1 * 0.5**t}
        scheduler.step()


@averaged
def test_a_constant_scheduler_is_no_schedule(name: str) -> None:
    values, optimizer = trained(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = values[0].detach().clone()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert not torch.equal(values[0], before)


@averaged
def test_u7_5_a_step_in_averaged_mode_names_the_call_to_add(name: str) -> None:
    _, optimizer = trained(name)
    assert isinstance(optimizer, AveragedOptimizer)
    optimizer.eval()
    before = bits(optimizer)
    with pytest.raises(RuntimeError, match=rf"{name}\.step\(\) .* call optimizer\.train\(\) first"):
        optimizer.step()
    assert same(bits(optimizer), before)
    resumed = TABLE[name]([(key, nn.Parameter(p.detach().clone())) for key, p in
                           zip(("matrix", "vector", "stack"), trained(name)[0], strict=True)])  # fmt: skip
    resumed.load_state_dict(before[0])
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\) first"):
        resumed.step()
