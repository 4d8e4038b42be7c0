"""The model that a training begins with, with adapters or without, and the one that it leaves."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from transformers import AutoModelForCausalLM, Trainer

from burnish.checkpoint import Checkpoint, Staging
from burnish.checkpoint.load import load_model
from burnish.errors import UnsupportedModelError
from burnish.runs.randomness import random_state_kept
from burnish.training.adapters import Lora, add_adapters, base_name, merged, write_adapters
from burnish.training.gather import whole
from burnish.training.options import forward_dtype
from burnish.training.output import write_weights

SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""How `accelerate launch` says that weights may lie in pieces."""


def weights_hash(source: Checkpoint) -> str:
    """Hash (XXH3, 128 bit, hexadecimal) of names, types, shapes and bytes of all tensors, however they are split."""
    digest = xxhash.xxh3_128()
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}".encode())
        for piece in source.chunks(name):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True)
class Outline:
    """A model that is to be trained, before its weights are read.

    Attributes:
        model: without weights, with adapters where they are asked for.
        trained: number of weights that require grad.
        width: bytes of each of them.
        held: bytes of all weights in memory.
        written: bytes of the output.
    """

    model: Any
    trained: int
    width: int
    held: int
    written: int


def outlined(source: Checkpoint, config: Any, lora: Lora | None, load: str, *, merge: bool, trust: bool) -> Outline:
    """What a training of this model holds and writes; shows, too, whether adapters find their modules.

    Args:
        source: what is read.
        config: of it.
        lora: adapters, or None.
        load: type that the weights are loaded in; "auto" as stored.
        merge: whether adapters are written into the weights.
        trust: run code that lies beside the weights.

    Raises:
        ValueError: a target of the adapters matches no module.
    """
    with torch.device("meta"), random_state_kept():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        if lora is not None:
            model = add_adapters(model, lora, base_name(source))
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    frozen = sum(tensor.numel() for tensor in model.parameters()) - trained
    stored = load == "auto" or "quantization_config" in source.config
    width = source.nbytes / max(source.num_parameters, 1) if stored else getattr(torch, load).itemsize
    each = 4 if lora else math.ceil(width)  # PEFT keeps adapters in float32
    held = trained * each + (0 if lora is None else source.nbytes if stored else math.ceil(frozen * width))
    return Outline(model, trained, each, held, 4 * trained if lora and not merge else source.nbytes)


def require_trainable(source: Checkpoint, lora: Lora | None, *, merge: bool) -> None:
    """Refuse to train or merge into quantised weights.

    Raises:
        UnsupportedModelError: the checkpoint has some.
        ValueError: adapters cannot be merged into weights that lie in pieces.
    """
    for variable, name in SHARDING.items():
        if merge and os.environ.get(variable, "").lower() == "true":
            raise ValueError(f"merge: not under {name}: write the adapters, and merge them with PEFT")
    if "quantization_config" in source.config and (lora is None or merge):
        what = "merged into" if lora else "trained"
        raise UnsupportedModelError(f"{source.name}: its quantised weights cannot be {what}: train adapters, --lora")


def trained_dtype(dtype: str, device: torch.device, lora: Lora | None) -> str:
    """Weights that gradients train are float32; those that adapters leave alone need only what a pass needs."""
    return forward_dtype(dtype, device) if lora else "float32"


def load_base(source: Checkpoint, dtype: str, device: torch.device, *, lora: Lora | None, trust: bool) -> Any:
    """The model to train, with fresh adapters where they are asked for.

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


def whole_weights(trainer: Trainer, model: Any, lora: Lora | None) -> dict[str, torch.Tensor]:
    """Trained weights, which all ranks gather together: those of adapters, or all.

    Args:
        trainer: that trained them.
        model: as `load_base` gave it.
        lora: its adapters, or None.
    """
    if lora is None:
        found: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return found
    return {name: whole(weight) for name, weight in model.named_parameters() if "lora_" in name}


def write_trained(
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
        model: as `load_base` gave it, trained.
        staging: where it is written.
        lora: adapters, or None.
        merge: add them to the weights and write those.
        max_shard_size: with a unit.
        state: of `whole_weights`, where the model may be spread over ranks.
    """
    if lora is not None and not merge:
        write_adapters(model, staging, state)
        return
    if lora is not None:
        model, state = merged(model), None
    weights = model.state_dict() if state is None else state
    write_weights(source, model, weights, staging, max_shard_size=max_shard_size)
