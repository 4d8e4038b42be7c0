"""The command under FSDP2 on CPUs, which Accelerate has for accelerators alone: it is told that these are some."""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from burnish.cli.main import run
from burnish.training.trainer import TokenTrainer

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
               "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
               "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # fmt: skip
begin, measure = PartialState.__init__, TokenTrainer.compute_loss


def as_gpus(self: PartialState, *args: Any, **options: Any) -> None:
    fresh = not self.initialized
    begin(self, *args, **options)
    if fresh:
        self.distributed_type = DistributedType.MULTI_GPU


def in_pieces(self: TokenTrainer, model: Any, *args: Any, **options: Any) -> Any:
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return measure(self, model, *args, **options)


PartialState.__init__ = as_gpus  # type: ignore[method-assign]
TokenTrainer.compute_loss = in_pieces  # type: ignore[method-assign]
run(sys.argv[1:])
