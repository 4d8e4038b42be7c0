"""The update of any optimizer is the real one, and observing it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from burnish.diagnose import update_of
from burnish.optim import AMUSE, AdamWScheduleFree, Muon

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True),
    "adam-tensor-lr": lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), capturable=False),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3),
    "muon": lambda model: Muon(model, lr=0.1),
    "amuse": lambda model: AMUSE(model, lr=0.1, warmup_steps=3),
    "adamw-schedule-free": lambda model: AdamWScheduleFree(model.parameters(), lr=0.1),
}


def problem() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    inputs = torch.randn(10, 3)
    return model, lambda of: of(inputs).square().mean()


def closure_of(model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)  # the same tensors, written over
        value = loss(model)
        value.backward()
        return value

    return closure


def bits(optimizer: Optimizer) -> list[Any]:
    state = copy.deepcopy(optimizer.state_dict())
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [
        state,
        copy.deepcopy(grads),
        [p.detach().clone() for group in optimizer.param_groups for p in group["params"]],
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_observing_is_the_real_step_and_leaves_every_bit(name: str, steps_before: int) -> None:
    model, loss = problem()
    optimizer = OPTIMIZERS[name](model)
    closure = closure_of(model, optimizer, loss)
    for _ in range(steps_before):
        optimizer.step(closure)
    params = list(model.parameters())
    before = bits(optimizer)
    held = {id(value) for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)}

    observed = update_of(optimizer, params, closure)

    assert same(bits(optimizer), before)
    now = {id(value) for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)}
    assert held == now or name == "lbfgs"  # which replaces its tensors itself
    old = torch.cat([p.detach().flatten() for p in params])
    optimizer.step(closure)
    assert torch.equal(observed, torch.cat([p.detach().flatten() for p in params]) - old)
    assert observed.abs().max() > 1e-4


def test_momentum_by_hand_over_a_part_of_the_parameters() -> None:
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    optimizer = torch.optim.SGD([x, y], lr=0.5, momentum=0.9)
    x.grad, y.grad = torch.tensor([1.0, -1.0]), torch.tensor([4.0])
    assert update_of(optimizer, [y, x]).tolist() == [-2, -0.5, 0.5]
    assert update_of(optimizer, [x], restore=False).tolist() == [-0.5, 0.5]
    assert x.tolist() == [0.5, 2.5] and y.tolist() == [1]
    assert update_of(optimizer, [y]).tolist() == pytest.approx([-0.5 * 1.9 * 4])


def test_a_step_that_fails_is_undone_too() -> None:
    x = torch.tensor([1.0], requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0)

    def closure() -> Tensor:
        with torch.no_grad():
            x.add_(1)
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        update_of(optimizer, [x], closure)
    assert x.item() == 1
