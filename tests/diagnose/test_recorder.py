"""What is measured while an optimizer trains, its file, and that training does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from burnish.diagnose import (
    SubspaceRecorder,
    alignment,
    bulk_share,
    loss_gradient,
    top_eigenpairs,
    update_of,
)
from burnish.errors import OutputError


def problem() -> tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)).double()
    inputs, labels = torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, lambda: F.cross_entropy(model(inputs), labels), optimizer


def train(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def lines(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "subspace.jsonl").read_text().splitlines()]


def test_a_line_holds_what_the_instruments_say(tmp_path: Path) -> None:
    model, loss, optimizer = problem()
    model.eval()
    with SubspaceRecorder(optimizer, loss, model, 3, every=3, directory=tmp_path, tol=1e-10):
        train(loss, optimizer, 3)
        optimizer.zero_grad()
        loss().backward()
        space = top_eigenpairs(loss, model, 3, tol=1e-10)
        of_gradient = alignment(loss_gradient(loss, model), space)
        update = update_of(copy_of(optimizer), model)
        optimizer.step()
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (0, 3)
    assert second["eigenvalues"] == pytest.approx(space.values.tolist())
    assert second["gradient_alignment"] == pytest.approx(of_gradient)
    assert second["update_alignment"] == pytest.approx(alignment(update, space))
    assert second["bulk_share"] == pytest.approx(bulk_share(update, space))
    assert second["gradient_alignment"] != pytest.approx(second["update_alignment"], rel=1e-3)  # momentum


def copy_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer over the same tensors, without its hooks."""
    twin = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1, momentum=0.9)
    for parameter, state in optimizer.state.items():
        twin.state[parameter] = {key: value.clone() for key, value in state.items()}
    return twin


def test_training_does_not_notice() -> None:
    courses = []
    for watched in (False, True):
        model, loss, optimizer = problem()
        model.train()
        if watched:
            SubspaceRecorder(optimizer, loss, model, 2, every=2)
        train(loss, optimizer, 6)
        courses.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*courses)


def test_a_step_that_moves_nothing_has_no_direction(tmp_path: Path) -> None:
    model, loss, optimizer = problem()
    optimizer.param_groups[0]["lr"] = 0.0
    SubspaceRecorder(optimizer, loss, model, 2, directory=tmp_path)
    train(loss, optimizer, 1)
    (line,) = lines(tmp_path)
    assert line["update_alignment"] is None and line["bulk_share"] is None
    assert 0 < float(str(line["gradient_alignment"])) < 1


def test_u2_4_a_resumed_training_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    model, loss, optimizer = problem()
    with SubspaceRecorder(optimizer, loss, model, 2, every=2, directory=tmp_path):
        train(loss, optimizer, 7)
    before = lines(tmp_path)
    with (tmp_path / "subspace.jsonl").open("a") as file:
        file.write('{"step": 8, "eigenval')  # killed while it wrote
    model, loss, optimizer = problem()
    with SubspaceRecorder(optimizer, loss, model, 2, every=2, directory=tmp_path, step=4):
        train(loss, optimizer, 3)
    after = lines(tmp_path)
    assert [line["step"] for line in after] == [0, 2, 4, 6]
    assert after[:2] == before[:2] and after[2] != before[2]


def test_an_earlier_file_is_not_lost(tmp_path: Path) -> None:
    model, loss, optimizer = problem()
    with SubspaceRecorder(optimizer, loss, model, 2, directory=tmp_path):
        train(loss, optimizer, 1)
    with pytest.raises(OutputError, match=r"subspace.jsonl exists: choose another directory, or pass overwrite=True"):
        SubspaceRecorder(optimizer, loss, model, 2, directory=tmp_path)
    with SubspaceRecorder(optimizer, loss, model, 2, directory=tmp_path, overwrite=True):
        assert lines(tmp_path) == []


def test_bad_input() -> None:
    model, loss, optimizer = problem()
    with pytest.raises(ValueError, match="every=0"):
        SubspaceRecorder(optimizer, loss, model, 2, every=0)
    with pytest.raises(ValueError, match=r"k=0: expected 1\.\."):
        SubspaceRecorder(optimizer, loss, model, 0)


def test_a_wrapper_that_hides_the_hooks_is_refused() -> None:
    from accelerate import Accelerator

    model, loss, optimizer = problem()
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(
        ValueError, match=r"AcceleratedOptimizer wraps an optimizer and has no hooks: pass its .optimizer"
    ):
        SubspaceRecorder(wrapped, loss, model, 2)
    with SubspaceRecorder(wrapped.optimizer, loss, model, 2) as recorder:
        train(loss, wrapped, 2)
    assert [seen.step for seen in recorder.measurements] == [0, 1]
