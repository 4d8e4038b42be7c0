"""Weights that lie in pieces on many ranks, whole again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor of FSDP2 or ZeRO-3 on every rank, once all ranks have come here; any other as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):  # a parameter of ZeRO-3
        import deepspeed  # type: ignore[import-not-found, unused-ignore]

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor
