"""The checkpoint that a config implies, without a byte of weights: to plan before anything is downloaded."""

from __future__ import annotations

from pathlib import Path

from burnish.checkpoint import Checkpoint, TensorInfo
from burnish.checkpoint.tensors import num_bytes
from burnish.families.detect import detect_family, resolve_config
from burnish.families.family import Config


def outline(raw: Config, dtype: str = "BF16") -> Checkpoint:
    """Names and shapes of all tensors of a Mixture-of-Experts model; reading one fails.

    Args:
        raw: content of a `config.json`.
        dtype: safetensors type of every tensor.

    Raises:
        UnsupportedModelError: as `detect_family`.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    family, config = detect_family(raw), resolve_config(raw)
    shape = family.shape(config)
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.model_type](**settings))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    disk_storage = next(storage for storage in family.storages if hasattr(storage, "compose"))
    for layer in shape.moe_layers:
        experts = (layer, shape.num_experts, shape.hidden_size, shape.expert_width)
        for name in family.module_storage.tensors(*experts):
            del shapes[name]
        shapes |= disk_storage.tensors(*experts)
    disk_names = {family.module_name(name): name for name in _router_names(family.router_tensors, shape.moe_layers)}
    tensors = {}
    for module_name, size in shapes.items():
        name = disk_names.get(module_name, module_name)
        tensors[name] = TensorInfo(name, dtype, size, Path("no weights"), 0, num_bytes(dtype, size))
    return Checkpoint("no weights", Path("no weights"), dict(raw), tensors)


def _router_names(templates: tuple[str, ...], layers: tuple[int, ...]) -> list[str]:
    """All router names, the published ones last so that they win."""
    return [template.format(layer=layer) for layer in layers for template in reversed(templates)]
