"""What a dense model is made of, as data: which dimension of which tensor is cut by what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from burnish.checkpoint import DTYPES, Checkpoint
from burnish.errors import UnsupportedModelError
from burnish.families import FAMILIES, resolve_config
from burnish.families.outline import class_tensors, require_tensors
from burnish.families.student import redundant_tensors, require_floating

DENSE_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "granite": "Granite"}
"""`model_type` -> name of the families that can be pruned: those whose tensors are the ones below."""


class Axis(Enum):
    """What a dimension of a tensor runs over."""

    WHOLE = "never cut"
    HIDDEN = "channels of the residual stream"
    NEURONS = "neurons of the feed-forward"
    HEADS = "channels of the query heads"
    KV_HEADS = "channels of the key-value heads"


OUTER: Mapping[str, tuple[Axis, ...]] = {
    "model.embed_tokens.weight": (Axis.WHOLE, Axis.HIDDEN),
    "model.norm.weight": (Axis.HIDDEN,),
    "lm_head.weight": (Axis.WHOLE, Axis.HIDDEN),
}
INNER: Mapping[str, tuple[Axis, ...]] = {
    "input_layernorm.weight": (Axis.HIDDEN,),
    "post_attention_layernorm.weight": (Axis.HIDDEN,),
    "self_attn.q_proj.weight": (Axis.HEADS, Axis.HIDDEN),
    "self_attn.q_proj.bias": (Axis.HEADS,),
    "self_attn.k_proj.weight": (Axis.KV_HEADS, Axis.HIDDEN),
    "self_attn.k_proj.bias": (Axis.KV_HEADS,),
    "self_attn.v_proj.weight": (Axis.KV_HEADS, Axis.HIDDEN),
    "self_attn.v_proj.bias": (Axis.KV_HEADS,),
    "self_attn.o_proj.weight": (Axis.HIDDEN, Axis.HEADS),
    "self_attn.o_proj.bias": (Axis.HIDDEN,),
    "self_attn.q_norm.weight": (Axis.WHOLE,),
    "self_attn.k_norm.weight": (Axis.WHOLE,),
    "mlp.gate_proj.weight": (Axis.NEURONS, Axis.HIDDEN),
    "mlp.gate_proj.bias": (Axis.NEURONS,),
    "mlp.up_proj.weight": (Axis.NEURONS, Axis.HIDDEN),
    "mlp.up_proj.bias": (Axis.NEURONS,),
    "mlp.down_proj.weight": (Axis.HIDDEN, Axis.NEURONS),
    "mlp.down_proj.bias": (Axis.HIDDEN,),
}
"""Tensors of a layer after `model.layers.{layer}.`: those that a family lacks are simply not there."""
PER_LAYER_KEYS = ("layer_types",)
"""Config keys with one entry a layer. By name: a list of end tokens may be as long as the model is deep."""


class Sizes(BaseModel):
    """The sizes that pruning can change; the words are those of the options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden_size}, feed-forward {self.intermediate_size},"
            f" {self.heads} heads, {self.kv_heads} key-value heads"
        )


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint, understood.

    Attributes:
        checkpoint: the checkpoint.
        config: its resolved config.
        sizes: its sizes.
        head_dim: channels of one head.
        redundant: tensors that no output needs: old rotary buffers, a stored copy of a tied head.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    sizes: Sizes
    head_dim: int
    redundant: frozenset[str]

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None) -> DenseModel:
        """Open a checkpoint; raises as `Checkpoint.open` and `understand`."""
        return cls.understand(Checkpoint.open(model, revision))

    @classmethod
    def understand(cls, checkpoint: Checkpoint) -> DenseModel:
        """Recognise a dense family and hold every tensor against it.

        Raises:
            UnsupportedModelError: a Mixture-of-Experts or an unknown family, quantised weights, or tensors that are
                not exactly those of the family.
        """
        raw = checkpoint.config
        _require_dense(raw)
        config = resolve_config(raw)
        sizes = Sizes(
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        )
        redundant = redundant_tensors(checkpoint, config)
        found = {name: info.shape for name, info in checkpoint.tensors.items() if name not in redundant}
        architecture = (raw.get("architectures") or [DENSE_FAMILIES[raw["model_type"]]])[0]
        require_tensors(found, class_tensors(config), architecture)
        for name in found:
            require_floating(checkpoint.tensors[name])
            axes_of(name)
        head_dim = config.get("head_dim") or sizes.hidden_size // sizes.heads
        return cls(checkpoint, config, sizes, head_dim, frozenset(redundant))

    def names(self) -> Iterator[str]:
        """All tensors but the redundant ones."""
        return (name for name in self.checkpoint.tensors if name not in self.redundant)

    def num_parameters(self, sizes: Sizes | None = None) -> int:
        """Parameters at these sizes (its own by default); a tied head counts once."""
        sizes = sizes or self.sizes
        return sum(
            math.prod(self.shape_at(name, sizes)) * (1 if layer is None else sizes.layers)
            for name, layer in self._one_layer.items()
        )

    @cached_property
    def _one_layer(self) -> dict[str, int | None]:
        """Tensors outside the layers and of the first one, which stands for all: transformers has them equal."""
        return {name: layer for name in self.names() if (layer := layer_of(name)) in (None, 0)}

    def shape_at(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Shape of a tensor when the model has these sizes."""
        lengths = {
            Axis.HIDDEN: sizes.hidden_size,
            Axis.NEURONS: sizes.intermediate_size,
            Axis.HEADS: sizes.heads * self.head_dim,
            Axis.KV_HEADS: sizes.kv_heads * self.head_dim,
        }
        own = self.checkpoint.info(name).shape
        return tuple(lengths.get(axis, length) for axis, length in zip(axes_of(name), own, strict=True))

    def config_at(self, sizes: Sizes, layers: tuple[int, ...], dtype: str | None = None) -> dict[str, Any]:
        """`config.json` at these sizes: the model's own, but for the sizes, lists of layers and the type.

        Args:
            sizes: of the output.
            layers: those of this model that the output has.
            dtype: safetensors type of all tensors; None keeps each as it is.
        """
        raw = self.checkpoint.config
        config = dict(raw) | {
            "num_hidden_layers": sizes.layers,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": self.head_dim,  # no longer hidden_size / num_attention_heads
        }
        for key in PER_LAYER_KEYS:
            # Also where the source leaves it to a rule: the rule speaks of layers by their old numbers.
            if (kinds := self.config.get(key)) is not None and (key in raw or len(set(kinds)) > 1):
                config[key] = [kinds[layer] for layer in layers]
        if "max_window_layers" in raw:
            gone = set(range(min(raw["max_window_layers"], self.sizes.layers))) - set(layers)
            config["max_window_layers"] = raw["max_window_layers"] - len(gone)
        if dtype is not None:
            config |= dict.fromkeys({"dtype", "torch_dtype"} & raw.keys() or {"dtype"}, DTYPES[dtype][1])
        return config

    def refusal(self, sizes: Sizes) -> str | None:
        """Why transformers has no such model of this family; None where it has."""
        try:
            resolve_config(self.config_at(sizes, tuple(range(sizes.layers))))
        except UnsupportedModelError as error:
            return str(error).rpartition(": ")[2]
        return None


def layer_of(name: str) -> int | None:
    """Index of the layer that a tensor belongs to; None for those outside the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def axes_of(name: str) -> tuple[Axis, ...]:
    """What each dimension of a tensor runs over.

    Raises:
        UnsupportedModelError: the layout has no such tensor.
    """
    layer = layer_of(name)
    known = OUTER.get(name) if layer is None else INNER.get(name.removeprefix(f"model.layers.{layer}."))
    if known is None:
        raise UnsupportedModelError(f"tensor {name} is not part of the dense layout: this model cannot be pruned")
    return known


def _require_dense(raw: Mapping[str, Any]) -> None:
    model_type = str(raw.get("model_type"))
    if model_type in FAMILIES:
        raise UnsupportedModelError(
            f"config.json: {FAMILIES[model_type].name} ({model_type}) is a Mixture-of-Experts: densify it first, then"
            " prune the dense student"
        )
    if model_type not in DENSE_FAMILIES:
        supported = ", ".join(f"{name} ({key})" for key, name in DENSE_FAMILIES.items())
        raise UnsupportedModelError(f"config.json: model_type {model_type!r} cannot be pruned; supported: {supported}")
    if raw.get("quantization_config"):
        raise UnsupportedModelError(
            "config.json: the weights are quantised, which cannot be pruned: give a checkpoint in bfloat16 or float16"
        )
