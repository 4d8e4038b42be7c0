"""In a loop of Accelerate: one process, FSDP2 over two, and gradients that a scaler finds infinite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.base import RoutedOptimizer
from tests.optim.distributed.toy import OPTIMIZERS, Build, backward, difference, toy, wholes

ROOT = Path(__file__).parents[2]
EACH = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@EACH
def test_a_prepared_optimizer_steps_as_the_bare_one(build: Build, accelerator: Accelerator) -> None:
    alone = toy()
    reference = build(alone)
    model = toy()
    optimizer = build(model)
    table = str(optimizer.routing_table())
    model, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer and str(optimizer.routing_table()) == table
    for step in range(4):
        for each, stepper in ((model, prepared), (alone, reference)):
            backward(each, step)
            stepper.step()
    assert difference(wholes(model), wholes(alone)) == 0
    if isinstance(optimizer, AveragedOptimizer) and isinstance(reference, AveragedOptimizer):
        with reference.averaged():
            prepared.eval()
            assert difference(wholes(model), wholes(alone)) == 0
            prepared.train()


@EACH
def test_u7_3_a_saved_state_resumes_bit_for_bit(build: Build, accelerator: Accelerator, tmp_path: Path) -> None:
    model = toy()
    model, prepared = accelerator.prepare(model, build(model))

    def train(first: int, last: int) -> None:
        for step in range(first, last):
            backward(model, step)
            prepared.step()

    train(0, 3)
    prepared.eval()  # does nothing where there is no average
    accelerator.save_state(str(tmp_path))
    prepared.train()
    train(3, 6)
    expected = wholes(model)
    accelerator.load_state(str(tmp_path))
    assert difference(wholes(model), expected) > 1e-3
    prepared.train()
    train(3, 6)
    assert difference(wholes(model), expected) == 0


def test_u7_2_accelerate_s_fsdp2_on_two_ranks_is_the_single_process(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/optim/distributed/accelerate_check.py"), str(tmp_path)], capture_output=True,
        text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


def scaled_backward(model: nn.Module, scaler: torch.amp.GradScaler, step: int, *, overflow: bool) -> None:
    backward(model, step)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = scaler.scale(parameter.grad)
    if overflow:
        next(model.parameters()).grad.view(-1)[3] = torch.inf


@EACH
def test_a_step_that_the_scaler_skips_leaves_everything_and_the_rest_are_as_without_it(build: Build) -> None:
    """A power of two scales without rounding."""
    model, alone = toy(), toy()
    optimizer, reference = build(model), build(alone)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(5):
        scaled_backward(model, scaler, step, overflow=step == 2)
        before, counters = wholes(model), [dict(group, params=None) for group in optimizer.param_groups]
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert difference(wholes(model), before) == 0
            assert [dict(group, params=None) for group in optimizer.param_groups] == counters
            assert scaler.get_scale() == 2.0**3
            continue
        backward(alone, step)
        reference.step()
        assert difference(wholes(model), wholes(alone)) == 0
    assert same_state(optimizer, reference)


def same_state(one: RoutedOptimizer, other: RoutedOptimizer) -> bool:
    states = [list(optimizer.state_dict()["state"].values()) for optimizer in (one, other)]
    return all(
        torch.equal(value, theirs[key]) for mine, theirs in zip(*states, strict=True) for key, value in mine.items()
    )


def test_accelerate_s_wrapper_with_a_scaler(accelerator: Accelerator) -> None:
    model = toy()
    optimizer = OPTIMIZERS["AMUSE"](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    prepared = AcceleratedOptimizer(optimizer, scaler=scaler)
    for step in range(3):
        scaled_backward(model, scaler, step, overflow=step == 1)
        before = wholes(model)
        prepared.step()
        assert prepared.step_was_skipped == (step == 1)
        assert (difference(wholes(model), before) == 0) == (step == 1)
    with optimizer.averaged():
        assert difference(wholes(model), before) > 1e-4
