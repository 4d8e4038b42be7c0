"""The model that a tuning begins with, and the one that it leaves."""

from __future__ import annotations

import os
from typing import Any

import torch
import xxhash

from burnish.checkpoint import Checkpoint, Staging
from burnish.checkpoint.load import load_model
from burnish.training.output import write_weights
from burnish.tune.adapters import Lora, add_adapters, base_name, merged, write_adapters


def weights_hash(source: Checkpoint) -> str:
    """Hash (XXH3, 128 bit, hexadecimal) of names, types, shapes and bytes of all tensors, however they are split."""
    digest = xxhash.xxh3_128()
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}".encode())
        for piece in source.chunks(name):
            digest.update(piece)
    return digest.hexdigest()


def load_base(source: Checkpoint, dtype: str, device: torch.device, *, lora: Lora | None, trust: bool) -> Any:
    """The model to tune, with fresh adapters where they are asked for.

    Args:
        source: what is read; a quantised one stays so.
        dtype: of the weights; "auto" as stored.
        device: where; under torchrun each process takes its own GPU.
        lora: adapters, or None.
        trust: run code that lies beside the weights.
    """
    place: torch.device | None = device
    if device.type == "cuda" and device.index is None:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    settings: dict[str, Any] = {}
    if "quantization_config" in source.config:  # weights that cannot be moved once they are loaded
        settings["device_map"], place = {"": place}, None
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    model = load_model(source, dtype=chosen, device=place, trust_remote_code=trust, **settings).eval()
    return model if lora is None else add_adapters(model, lora, base_name(source))


def write_tuned(
    source: Checkpoint,
    model: Any,
    staging: Staging,
    *,
    lora: Lora | None,
    merge: bool,
    max_shard_size: str,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the whole model, or its adapters alone.

    Args:
        source: what was read.
        model: as `load_base` gave it, tuned.
        staging: where it is written.
        lora: adapters, or None.
        merge: add them to the weights and write those.
        max_shard_size: with a unit.
        state: whole weights of a model that is spread over ranks.
    """
    if lora is not None and not merge:
        write_adapters(model, staging)
        return
    if lora is not None:
        model, state = merged(model), None
    weights = model.state_dict() if state is None else state
    write_weights(source, model, weights, staging, max_shard_size=max_shard_size)
