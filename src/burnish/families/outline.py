"""The checkpoint that a config implies, without a byte of weights: to plan before anything is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from burnish.checkpoint import Checkpoint, TensorInfo
from burnish.checkpoint.tensors import num_bytes
from burnish.errors import UnsupportedModelError
from burnish.families.detect import detect_family, resolve_config
from burnish.families.family import Config
from burnish.families.storage import Shape


def outline(raw: Config, dtype: str = "BF16") -> Checkpoint:
    """Names and shapes of all tensors of a Mixture-of-Experts model; reading one fails.

    Args:
        raw: content of a `config.json`.
        dtype: safetensors type of every tensor.

    Raises:
        UnsupportedModelError: as `detect_family`.
    """
    family, config = detect_family(raw), resolve_config(raw)
    shape, shapes = family.shape(config), class_tensors(config)
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


def class_tensors(config: Config) -> dict[str, Shape]:
    """Names and shapes of the tensors that the class of a config has in memory; a tied head is not one of its own."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    resolved = CONFIG_MAPPING[config["model_type"]](**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(resolved)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if resolved.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def require_tensors(found: Mapping[str, Shape], expected: Mapping[str, Shape], architecture: str) -> None:
    """Hold the tensors of a checkpoint, there or planned, against those of its class.

    Raises:
        UnsupportedModelError: a tensor has no place in the class (a vision tower, an MTP head ...), one of the class
            is missing, or a shape differs; names the tensor.
    """
    if strange := sorted(found.keys() - expected.keys()):
        raise UnsupportedModelError(
            f"tensor {strange[0]} and {len(strange) - 1} more have no place in {architecture}: this model cannot be"
            " converted"
        )
    for name in sorted(expected):
        if found.get(name) != expected[name]:
            seen = list(found[name]) if name in found else "missing"
            raise UnsupportedModelError(f"tensor {name} of {architecture}: expected {list(expected[name])}, {seen}")


def _router_names(templates: tuple[str, ...], layers: tuple[int, ...]) -> list[str]:
    """All router names, the published ones last so that they win."""
    return [template.format(layer=layer) for layer in layers for template in reversed(templates)]
