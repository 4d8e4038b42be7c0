"""Tiny dense models of every family, and the same models with dead parts mixed in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.prune import Sizes
from tests.conftest import COMMON, save_tokenizer

# Feed-forward widths are below, above and equal to the hidden size: orientation must not be inferred from it (U4.3).
DENSE: dict[str, dict[str, Any]] = {
    "qwen3": {"intermediate_size": 24, "head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {"intermediate_size": 32, "tie_word_embeddings": False},
    "llama": {"intermediate_size": 48, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"intermediate_size": 40, "head_dim": 8, "num_key_value_heads": 4, "sliding_window": 8},
    "granite": {"intermediate_size": 28, "tie_word_embeddings": True, "embedding_multiplier": 2.0,
                "residual_multiplier": 0.5, "logits_scaling": 3.0, "attention_multiplier": 0.3},
}  # fmt: skip
DENSE_FAMILIES = list(DENSE)


def save_dense(directory: Path, model_type: str, **changes: Any) -> Path:
    """A random model of a family, float32, with its tokenizer; norms and biases are random too."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**{**COMMON, **DENSE[model_type], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def sizes_of(directory: Path) -> Sizes:
    config = json.loads((directory / "config.json").read_text())
    return Sizes(
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
    )


class Positions:
    """Where the live parts of a model lie in an inflated one: sorted random indices."""

    def __init__(self, small: Sizes, big: Sizes) -> None:
        generator = torch.Generator().manual_seed(5)

        def pick(count: int, total: int) -> list[int]:
            return sorted(torch.randperm(total, generator=generator)[:count].tolist())

        self.layers = pick(small.layers, big.layers)
        self.hidden = pick(small.hidden_size, big.hidden_size)
        self.neurons = pick(small.intermediate_size, big.intermediate_size)
        self.kv_heads = pick(small.kv_heads, big.kv_heads)
        self.heads = [g * big.group + h for g in self.kv_heads for h in pick(small.group, big.group)]


def inflate(core: Path, target: Path, big: Sizes, at: Positions, *, dead_columns: bool = False) -> Path:
    """A larger model in which the parts at `at` are those of `core`, and all others have no effect.

    Dead neurons and key-value groups have activations of zero, dead layers are the identity, and dead hidden channels
    are never written. With `dead_columns`, dead neurons and heads are active, but no column of the next matrix reads
    them. Whatever cannot matter is random. Norm weights are those of `core`.
    """
    shutil.copytree(core, target)
    config = json.loads((core / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    def channels(heads: list[int]) -> list[int]:
        return [head * head_dim + channel for head in heads for channel in range(head_dim)]

    where = {"hidden": at.hidden, "neurons": at.neurons, "q": channels(at.heads), "kv": channels(at.kv_heads)}
    length = {"hidden": big.hidden_size, "neurons": big.intermediate_size,
              "q": big.heads * head_dim, "kv": big.kv_heads * head_dim}  # fmt: skip
    kinds = {"q_proj": ("q", "hidden"), "k_proj": ("kv", "hidden"), "v_proj": ("kv", "hidden"),
             "o_proj": ("hidden", "q"), "gate_proj": ("neurons", "hidden"), "up_proj": ("neurons", "hidden"),
             "down_proj": ("hidden", "neurons"), "layernorm": ("hidden",), "model.norm": ("hidden",),
             "embed_tokens": (None, "hidden"), "lm_head": (None, "hidden")}  # fmt: skip
    never_written = ["o_proj", "down_proj"] + ([] if dead_columns else ["up_proj", "v_proj"])

    def grow(name: str, tensor: Tensor) -> Tensor:
        kind = next((value for part, value in kinds.items() if part in name), None)
        if kind is None:
            return tensor.clone()  # norms of single heads
        kind = kind[: tensor.dim()]
        shape = [length[k] if k else size for k, size in zip(kind, tensor.shape, strict=True)]
        grown = random(*shape)
        if any(part in name for part in never_written):
            grown[[i for i in range(shape[0]) if i not in where[kind[0]]]] = 0
        if "embed_tokens" in name:
            grown[:, [i for i in range(shape[1]) if i not in at.hidden]] = 0
        if dead_columns and ("o_proj.weight" in name or "down_proj.weight" in name):
            grown[:, [i for i in range(shape[1]) if i not in where[kind[1]]]] = 0
        index = [torch.tensor(where[k]) if k else torch.arange(size) for k, size in zip(kind, shape, strict=True)]
        grown[torch.meshgrid(*index, indexing="ij")] = tensor
        return grown

    tensors = load_file(core / "model.safetensors")
    out = {name: grow(name, tensor) for name, tensor in tensors.items() if ".layers." not in name}
    for layer in range(big.layers):
        live = layer in at.layers
        source = at.layers.index(layer) if live else 0
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{source}."):
                grown = grow(name, tensor)
                dead = not live and ("o_proj" in name or "down_proj" in name)
                out[name.replace(f".{source}.", f".{layer}.", 1)] = torch.zeros_like(grown) if dead else grown
    save_file(out, target / "model.safetensors", {"format": "pt"})
    config |= {"num_hidden_layers": big.layers, "hidden_size": big.hidden_size,
               "intermediate_size": big.intermediate_size, "num_attention_heads": big.heads,
               "num_key_value_heads": big.kv_heads, "head_dim": head_dim}  # fmt: skip
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][0]] * big.layers
    (target / "config.json").write_text(json.dumps(config))
    return target
