"""Projected training against the closed form of a quadratic, and its lifecycle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from burnish.diagnose import ProjectedTraining, dominant, top_eigenpairs, update_of
from burnish.optim import AMUSE, Muon

WALLS, RIVER = 50.0, 0.05


class Valley:
    """Two steep directions with noise on their gradients, eight flat ones; the loss of the flat ones begins at .2."""

    def __init__(self) -> None:
        self.curvature = torch.tensor([WALLS] * 2 + [RIVER] * 8, dtype=torch.float64)
        turn = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.basis = torch.linalg.qr(turn).Q
        self.x = (self.basis @ torch.ones(10, dtype=torch.float64)).requires_grad_()

    def loss(self) -> Tensor:
        return (self.curvature * (self.basis.mT @ self.x) ** 2).sum() / 2

    def river_loss(self) -> float:
        along = self.basis.mT @ self.x.detach()
        return float((self.curvature * along**2)[2:].sum() / 2)

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            noise = 30 * torch.randn(2, generator=generator, dtype=torch.float64)
            self.x.grad += self.basis[:, :2] @ noise
            optimizer.step()


def test_the_dominant_part_leaves_the_river_where_it_was_and_the_bulk_part_is_as_good_as_all() -> None:
    lr, steps = 0.03, 2000
    expected = 0.2 * (1 - lr * RIVER) ** (2 * steps)
    assert expected == pytest.approx(4.9e-4, abs=1e-5)
    for part in ("whole", "dominant", "bulk"):
        valley = Valley()
        optimizer = torch.optim.SGD([valley.x], lr=lr)
        projected = ProjectedTraining(
            optimizer, valley.loss, [valley.x], 2, part="bulk" if part == "whole" else part,
            start=steps + 1 if part == "whole" else 0, refresh_every=100, tol=1e-10,
        )  # fmt: skip
        valley.train(optimizer, steps)
        measured = [seen.update_alignment for seen in projected.measurements]
        assert sum(measured) / len(measured) > 0.9999
        reached = 0.2 if part == "dominant" else expected
        assert valley.river_loss() == pytest.approx(reached, rel=1e-8), part


def problem() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    inputs, labels = torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,))
    return model, lambda: F.cross_entropy(model(inputs), labels)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
        lambda model: Muon(model, lr=0.1),
        lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2),
    ],
    ids=["sgd", "adamw", "muon", "lbfgs"],
)
def test_each_part_of_any_optimizers_update(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    moved = {}
    for part in ("dominant", "bulk"):
        model, loss = problem()
        optimizer = make(model)

        def closure(loss: Callable[[], Tensor] = loss, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        closure()
        whole, old = update_of(optimizer, model, closure), flat(model)
        space = top_eigenpairs(loss, model, 3, tol=1e-10)
        with ProjectedTraining(optimizer, loss, model, 3, part=part, tol=1e-10):
            optimizer.step(closure)
        moved[part] = flat(model) - old
        expected = dominant(whole, space)
        expected = expected if part == "dominant" else whole - expected
        assert torch.allclose(moved[part], expected, atol=1e-9)
        assert expected.norm() > 1e-3
        free = flat(model)
        optimizer.step(closure)  # outside of the block nothing is projected
        assert (flat(model) - free).norm() > 1e-3
    assert torch.allclose(moved["dominant"] + moved["bulk"], whole, atol=1e-9)


def test_only_the_named_parameters_are_projected() -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss().backward()
    whole, old = update_of(optimizer, model), flat(model)
    first = [model[0].weight]
    inside = dominant(whole[:15], top_eigenpairs(loss, first, 2, tol=1e-10))
    with ProjectedTraining(optimizer, loss, first, 2, part="dominant", tol=1e-10):
        optimizer.step()
    assert torch.allclose(flat(model) - old, torch.cat([inside, whole[15:]]), atol=1e-9)


def test_it_starts_at_a_step_and_reuses_eigenvectors() -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    projected = ProjectedTraining(optimizer, loss, model, 3, part="bulk", start=5, refresh_every=4)
    active, spaces = [], []
    for _ in range(9):
        optimizer.zero_grad()
        loss().backward()
        whole, old = update_of(torch.optim.SGD(model.parameters(), lr=0.01), model), flat(model)
        optimizer.step()
        active.append(not torch.allclose(flat(model) - old, whole, atol=1e-15))
        spaces.append(projected.subspace)
    assert active == [False] * 5 + [True] * 4 and projected.active
    assert [spaces[i] is spaces[i - 1] for i in range(1, 9)] == [i % 4 != 0 for i in range(1, 9)]
    assert [seen.step for seen in projected.measurements] == [0, 4, 8]


def test_it_waits_until_the_gradient_has_settled() -> None:
    """The gradient turns into the steep direction at the third step: measurements 2 to 6 are the first five aligned."""
    steep = torch.tensor([10.0, 0.1], dtype=torch.float64)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    course = [[0.0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [0, 1]]
    optimizer = torch.optim.SGD([x], lr=0.0)
    projected = ProjectedTraining(optimizer, lambda: (steep * x**2).sum() / 2, [x], 1, part="bulk", settled=0.99)
    active = []
    for place in course:
        with torch.no_grad():
            x.copy_(torch.tensor(place))
        optimizer.step()
        active.append(projected.active)
    assert active == [False] * 6 + [True] * 3


def test_u2_4_a_resumed_training_goes_on_from_its_step(tmp_path: Any) -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projected = ProjectedTraining(optimizer, loss, model, 2, part="bulk", refresh_every=10, start=20, step=23)
    loss().backward()
    optimizer.step()
    assert projected.active and [seen.step for seen in projected.measurements] == [23]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "river"}, "part='river': choose dominant or bulk"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"settled": 0.0}, "settled=0.0: expected an alignment above 0"),
        ({"k": 33}, r"k=33: expected 1\.\.32"),
        ({"method": "qr"}, "method='qr'"),
        ({"tol": 1e-20}, "tol=1e-20"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    model, loss = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        ProjectedTraining(optimizer, loss, model, **{"k": 2, "part": "bulk", **options})
    assert not optimizer._optimizer_step_pre_hooks


def test_optimizers_refused() -> None:
    model, loss = problem()
    with pytest.raises(ValueError, match="AMUSE averages its iterates"):
        ProjectedTraining(AMUSE(model, lr=0.1, warmup_steps=2), loss, model, 2, part="bulk")
    with pytest.raises(ValueError, match="tensor 1 of params is not in the optimizer"):
        ProjectedTraining(torch.optim.SGD([model[0].weight], lr=0.1), loss, model, 2, part="bulk")
