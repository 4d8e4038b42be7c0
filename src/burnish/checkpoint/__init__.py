"""Hugging Face checkpoints, tensor by tensor: read, plan and write with bounded memory, atomically, resumably."""

from burnish.checkpoint.layout import PlannedTensor, Shard, plan_shards
from burnish.checkpoint.source import Checkpoint
from burnish.checkpoint.staging import Staging
from burnish.checkpoint.tensors import DTYPES, TensorInfo, dtype_name, parse_size
from burnish.checkpoint.write import copy_other_files, verify_output, write_shards

__all__ = [
    "DTYPES",
    "Checkpoint",
    "PlannedTensor",
    "Shard",
    "Staging",
    "TensorInfo",
    "copy_other_files",
    "dtype_name",
    "parse_size",
    "plan_shards",
    "verify_output",
    "write_shards",
]
