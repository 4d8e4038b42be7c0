"""Run by torchrun on gloo: Accelerate shards a model with FSDP2 and swaps the optimizer's tensors for the shards.

Accelerate takes FSDP only where there is an accelerator; here its shared state is told so.

Arguments: a folder for checkpoints.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.callback import find_averaged
from tests.optim.distributed.toy import OPTIMIZERS, backward, difference, toy, wholes

STEPS = 4
TOLERANCE = 1e-6


def sharding_accelerator() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT",
        transformer_cls_names_to_wrap=["MultiheadAttention", "Experts"], reshard_after_forward=True,
    )  # fmt: skip
    for state in (AcceleratorState, PartialState):
        state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    assert accelerator.is_fsdp2
    return accelerator


def check(name: str, folder: str) -> None:
    accelerator = sharding_accelerator()
    alone = toy()
    reference = OPTIMIZERS[name](alone)
    model = toy()
    optimizer = OPTIMIZERS[name](model)
    table = str(optimizer.routing_table())
    model, prepared = accelerator.prepare(model, optimizer)
    for group in optimizer.param_groups:
        assert all(isinstance(tensor, DTensor) for tensor in group["params"])
    assert str(optimizer.routing_table()) == table  # names and reasons survive

    def both(step: int) -> None:
        for each, stepper in ((model, prepared), (alone, reference)):
            backward(each, step)
            stepper.step()

    for step in range(STEPS):
        both(step)
        assert difference(wholes(model), wholes(alone)) < TOLERANCE, (name, step)
    states = {tensor: optimizer.state[tensor] for group in optimizer.param_groups for tensor in group["params"]}
    assert states.keys() == optimizer.state.keys()  # nothing is left of the tensors before sharding
    for tensor, state in states.items():
        for value in state.values():
            assert not value.ndim or (isinstance(value, DTensor) and value.placements == tensor.placements)
    averages = isinstance(optimizer, AveragedOptimizer)
    if isinstance(optimizer, AveragedOptimizer) and isinstance(reference, AveragedOptimizer):
        assert find_averaged(prepared, model) is optimizer
        with optimizer.averaged(), reference.averaged():
            assert difference(wholes(model), wholes(alone)) < TOLERANCE
            accelerator.save_state(folder)
    else:
        accelerator.save_state(folder)
    backward(model, STEPS)
    prepared.step()
    after = wholes(model)
    accelerator.load_state(folder)
    if averages:
        assert {group["mode"] for group in optimizer.param_groups} == {"averaged"}
        prepared.train()
    backward(model, STEPS)
    prepared.step()
    assert difference(wholes(model), after) == 0, name
    accelerator.free_memory()
    AcceleratorState._reset_state()


for index, each in enumerate(("AMUSE", "Muon", "NorMuon, heads and columns", "AdamWScheduleFree")):
    check(each, f"{sys.argv[1]}/{index}")
dist.barrier()
dist.destroy_process_group()
