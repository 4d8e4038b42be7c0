"""What a training leaves: the trained weights as the source has them, the files beside them, the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from burnish.checkpoint import Checkpoint, Staging, copy_other_files, parse_size
from burnish.checkpoint.card import front_matter
from burnish.checkpoint.tensors import FLOATING, torch_dtype
from burnish.errors import OutputError
from burnish.families.conversion import OWN_FILES, now
from burnish.runs import peak_rss_bytes, write_json

Card = Callable[[dict[str, Any], dict[str, str]], str]


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model as run records have it."""
    model_type = checkpoint.config.get("model_type", "unknown")
    return {
        "name": checkpoint.name,
        "family": model_type,
        "model_type": model_type,
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "parameters": checkpoint.num_parameters,
        "bytes": checkpoint.nbytes,
    }


def write_weights(
    source: Checkpoint, model: PreTrainedModel, state: Mapping[str, Tensor], staging: Staging, *, max_shard_size: str
) -> None:
    """Write trained weights in the names and types of the model that was read, and verify them.

    Args:
        source: what was read.
        model: the trained model, for its config and its way of saving.
        state: its weights, whole.
        staging: where they go.
        max_shard_size: with a unit.

    Raises:
        OutputError: what transformers wrote has other names, shapes or types.
    """
    before = source.tensors
    stored = [torch_dtype(tensor.dtype) for tensor in before.values() if tensor.dtype in FLOATING]
    common = max(set(stored), key=stored.count)

    def cast(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(torch_dtype(before[name].dtype) if name in before else common)

    weights = {name: cast(name, tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for copy, original in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        weights[copy] = weights[original]  # one tensor again, which is stored once
    model.save_pretrained(staging.files, state_dict=weights, max_shard_size=parse_size(max_shard_size))
    make_readable(staging)
    after = Checkpoint.open(staging.files).tensors
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
            was, found = (f"{tensor.dtype} {list(tensor.shape)}" if tensor else "missing" for tensor in (old, new))
            raise OutputError(f"{staging.out}: tensor {name} was {was}, is {found} after training")


def make_readable(staging: Staging) -> None:
    """Give weight files the usual mode; transformers keeps that of its private temporary file."""
    for file in staging.files.glob("*.safetensors"):
        file.chmod(0o644)


def finish(
    record: dict[str, Any],
    source: Checkpoint,
    staging: Staging,
    card: Card,
    *,
    device: torch.device,
    leave: frozenset[str] = frozenset(),
) -> None:
    """Complete the record, write what lies beside the weights, and give the output its name.

    Args:
        record: the run record, which is added to.
        source: whose files are copied.
        staging: of the run.
        card: (record, keys that descendants keep) -> README.md.
        device: that was trained on.
        leave: further files of the source that the output does not take over.
    """
    record |= {"finished": now(), "peak_rss_bytes": peak_rss_bytes()}
    if device.type == "cuda":
        record["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    copied = copy_other_files(source, staging, (OWN_FILES - {"config.json"}) | leave)
    record["files"] = {"copied": copied, "changed": ["README.md"], "dropped": source.left_files()}
    (staging.files / "README.md").write_text(card(record, front_matter(source)), encoding="utf-8")
    write_json(staging.files / "burnish.json", record)
    staging.publish()


def perplexity(nll: float) -> float:
    """Of a negative log-likelihood in nats per token, as a number that can be shown."""
    return math.exp(min(nll, 700.0))
