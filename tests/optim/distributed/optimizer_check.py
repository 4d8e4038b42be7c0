"""Run by torchrun on gloo: a sharded or replicated step is the step of one process, and any number of ranks can resume.

Arguments: steps, write=FOLDER, resume=FOLDER, in any order.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from burnish.errors import TrainingError
from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.base import RoutedOptimizer
from tests.optim.distributed.toy import (
    OPTIMIZERS,
    Build,
    Toy,
    backward,
    difference,
    toy,
    whole,
    wholes,
    without_share_of,
)

STEPS = 5
TOLERANCE = 1e-6
THOROUGHLY = ("Muon, gram, cautious, SGD", "NorMuon, heads and columns", "AMUSE", "ProxGen, rows")
"""Between them they keep every kind of state, and use every way of cutting."""
PARTLY_WITHOUT = "middle.1.weight"
"""At step 1 the first rank has no gradient for its share of it."""


def sharded(mesh: DeviceMesh) -> Toy:
    model = toy()
    fully_shard(model.attention, mesh=mesh)
    fully_shard(model.middle[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: RoutedOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        backward(model, step)
        optimizer.step()


def compare(model: nn.Module, optimizer: RoutedOptimizer, build: Build, lose: Callable[[nn.Module, int], None]) -> None:
    """Five steps of a distributed model beside those of one process, with gradients that are missing."""
    alone = toy()
    reference = build(alone)
    start = wholes(alone)
    for step in range(STEPS):
        for each, stepper in ((model, optimizer), (alone, reference)):
            backward(each, step)
            lose(each, step)
            stepper.step()
        assert difference(wholes(model), wholes(alone)) < TOLERANCE, (build, step)
    assert difference(wholes(alone), start) > 1e-3
    if isinstance(optimizer, AveragedOptimizer):
        assert isinstance(reference, AveragedOptimizer)
        with optimizer.averaged(), reference.averaged():
            assert difference(wholes(alone), start) > 1e-3 and difference(wholes(model), wholes(alone)) < TOLERANCE
        assert difference(wholes(model), wholes(alone)) < TOLERANCE


def check_sharded_steps(mesh: DeviceMesh, build: Build) -> None:
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)

    def lose(model: nn.Module, step: int) -> None:
        if step != 1:
            return
        tensor = model.get_parameter(PARTLY_WITHOUT)
        if not isinstance(tensor, DTensor):
            tensor.grad = without_share_of(tensor.grad, ranks, 0)
        elif rank == 0:
            tensor.grad = None

    model = sharded(mesh)
    optimizer = build(model)
    compare(model, optimizer, build, lose)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if value.ndim:
                assert isinstance(value, DTensor) and value.placements == parameter.placements, (name, key)
    keys = [sorted(state) for state in optimizer.state_dict()["state"].values()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, keys)
    assert found == [keys] * dist.get_world_size()


def check_replicated_steps(build: Build) -> None:
    model = DistributedDataParallel(toy(), find_unused_parameters=True)
    group = dist.distributed_c10d._get_default_group()
    compare(model, build(model, process_group=group), build, lambda model, step: None)


def check_half_precision(mesh: DeviceMesh, build: Build) -> None:
    """Averages in float32 agree, whatever the parameters round to; gradients are given, as a model's would differ."""
    alone = toy().bfloat16()
    model = fully_shard(toy().bfloat16(), mesh=mesh)
    optimizer, reference = build(model), build(alone)
    start = wholes(alone)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for cut, parameter in zip(model.parameters(), alone.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            cut.grad = distribute_tensor(parameter.grad, mesh, cut.placements)
        optimizer.step()
        reference.step()
    assert difference(wholes(alone), start) > 0.01
    for cut, parameter in zip(model.parameters(), alone.parameters(), strict=True):
        for key in ("z", "x"):
            average, expected = optimizer.state[cut][key], reference.state[parameter][key]
            assert isinstance(average, DTensor) and average.dtype == torch.float32
            assert float((whole(average) - expected).abs().max()) < TOLERANCE


def check_a_bad_gradient_of_one_rank_stops_all(mesh: DeviceMesh) -> None:
    for nonfinite in ("skip", "raise"):
        model = sharded(mesh)
        optimizer = OPTIMIZERS["AMUSE"](model, nonfinite=nonfinite)
        train(model, optimizer, 0, 1)
        backward(model, 1)
        if dist.get_rank() == dist.get_world_size() - 1:
            model.first.weight.grad.to_local().fill_(torch.nan)
        before = wholes(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                optimizer.step()
            except TrainingError as error:
                assert nonfinite == "raise" and "gradient" in str(error)
            else:
                assert nonfinite == "skip" and any("step left out" in str(warning.message) for warning in caught)
        assert difference(wholes(model), before) == 0
        train(model, optimizer, 2, 3)
        assert difference(wholes(model), before) > 1e-3


def checkpoint(name: str, folder: Path) -> Path:
    return folder / name.replace(" ", "-").replace(",", "")


def write(name: str, mesh: DeviceMesh, folder: Path) -> None:
    """Save at step 3, and what the run without interruption has at step 6; averaging optimizers save the average."""
    model = sharded(mesh)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 0, 3)
    if isinstance(optimizer, AveragedOptimizer):
        optimizer.eval()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=checkpoint(name, folder))
    if isinstance(optimizer, AveragedOptimizer):
        optimizer.train()
    train(model, optimizer, 3, 6)
    after = wholes(model)
    if dist.get_rank() == 0:
        torch.save(after, checkpoint(name, folder) / "after.pt")
    dist.barrier()


def resume(name: str, model: Toy, folder: Path) -> float:
    """Load a checkpoint into new objects, go on to step 6; how far that is from the run without interruption."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    optimizer = OPTIMIZERS[name](model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint(name, folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    if isinstance(optimizer, AveragedOptimizer):
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "the parameters are the average" in str(error)
        else:
            raise AssertionError("the mode of the checkpoint was lost")
        optimizer.train()
    train(model, optimizer, 3, 6)
    return difference(wholes(model), torch.load(checkpoint(name, folder) / "after.pt"))


def check_steps(mesh: DeviceMesh) -> None:
    for name, build in OPTIMIZERS.items():
        check_sharded_steps(mesh, build)
        if name in THOROUGHLY:
            check_replicated_steps(build)
            if mesh.size() == 4:
                check_sharded_steps(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), build)
    check_half_precision(mesh, OPTIMIZERS["AMUSE"])
    check_a_bad_gradient_of_one_rank_stops_all(mesh)


def main(tasks: list[str]) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for task in tasks:
        verb, _, folder = task.partition("=")
        if verb == "steps":
            check_steps(mesh)
        for name in THOROUGHLY if folder else ():
            if verb == "write":
                write(name, mesh, Path(folder))
                assert resume(name, sharded(mesh), Path(folder)) == 0, name
            else:
                assert resume(name, sharded(mesh), Path(folder)) < TOLERANCE, name
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
