"""What one model family is, as data: its tensor names, its MoE shape, its router rule and its dense twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from burnish.families.router import RouterRule
from burnish.families.storage import ExpertStorage, Fused, Separate, WritableStorage

Config = Mapping[str, Any]


@dataclass(frozen=True)
class MoEShape:
    """The sizes of a Mixture-of-Experts model.

    Attributes:
        num_layers: decoder layers in all.
        moe_layers: indices of those with routed experts.
        num_experts: routed experts of each such layer (E).
        top_k: routed experts per token (k).
        hidden_size: width of the residual stream (d).
        expert_width: intermediate width of one expert (m).
        shared_width: intermediate width of all always-on shared experts together; 0 when there are none.
        dense_width: intermediate width of the layers that are dense already; 0 when there are none.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    shared_width: int = 0
    dense_width: int = 0


@dataclass(frozen=True)
class SharedExperts:
    """Experts that every token uses, fused into the dense feed-forward beside the kept ones.

    Attributes:
        storage: their tensor names.
        gate: name of a [1, hidden] weight whose sigmoid multiplies their output per token. It is replaced by its
            mean over the calibration tokens (ours: a plain dense layer has no such gate).
        gate_module: name of the linear module of that gate inside the MoE block.
    """

    storage: Separate
    gate: str | None = None
    gate_module: str | None = None


@dataclass(frozen=True)
class DenseTwin:
    """The stock class that the dense student is written for.

    Attributes:
        architecture: class name in transformers.
        model_type: its `model_type`.
        kind: "dense" for an ordinary feed-forward in every layer; "one-expert" where only the family's own class
            computes the rest of the layer, so that it is kept with a single expert behind a router of zeros.
        storage: where the feed-forward of a layer is written.
        width_key: config key of the feed-forward width.
        settings: config keys to set.
        zero_router: tensors of zeros that a one-expert student needs: name template -> has a hidden dimension.
        why: one sentence where the class is not a plain dense one, and what that means.
    """

    architecture: str
    model_type: str
    storage: WritableStorage
    kind: Literal["dense", "one-expert"] = "dense"
    width_key: str = "intermediate_size"
    settings: Mapping[str, Any] | None = None
    zero_router: Mapping[str, bool] | None = None
    why: str | None = None


@dataclass(frozen=True)
class Family:
    """Everything the verbs need to know of one family. Functions take the resolved config (all defaults filled in).

    Attributes:
        name: for people.
        model_type: of the config.
        becomes: classes that `twin` can choose, for the tables of the documentation.
        shape: config -> MoEShape.
        router: config -> RouterRule.
        twin: config -> DenseTwin.
        storages: the ways in which experts can lie on disk, the published one first.
        module_storage: how transformers holds the experts in memory (state-dict names).
        router_tensors: templates of the tensors that only the router uses; they have no place in a dense model.
        block: module path of the MoE block of a layer.
        router_module: name of the router inside the block; its first output must be the logits [tokens, E].
        shared: shared experts, if the family has them.
        dense_ffn: where the feed-forward of a layer that is dense already lies.
        renames: (disk prefix part, in-memory part) pairs for tensors that transformers renames when it loads them.
    """

    name: str
    model_type: str
    becomes: tuple[str, ...]
    shape: Callable[[Config], MoEShape]
    router: Callable[[Config], RouterRule]
    twin: Callable[[Config], DenseTwin]
    storages: tuple[ExpertStorage, ...]
    module_storage: Fused
    router_tensors: tuple[str, ...]
    block: str = "model.layers.{layer}.mlp"
    router_module: str = "gate"
    shared: SharedExperts | None = None
    dense_ffn: Separate | None = None
    renames: tuple[tuple[str, str], ...] = ()

    def module_name(self, disk_name: str) -> str:
        """The state-dict name in transformers of a tensor that is stored as `disk_name`."""
        for old, new in self.renames:
            disk_name = disk_name.replace(old, new)
        return disk_name


LLAMA_FFN = Separate(
    gate="model.layers.{layer}.mlp.gate_proj.weight",
    up="model.layers.{layer}.mlp.up_proj.weight",
    down="model.layers.{layer}.mlp.down_proj.weight",
)
"""The feed-forward names that Llama, Mistral, Qwen, Granite and DeepSeek share."""

SEPARATE_EXPERTS = Separate(
    gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
)
"""One 2-D tensor for each expert matrix, as Qwen, OLMoE and DeepSeek publish them."""

FUSED_EXPERTS = Fused(
    gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    down="model.layers.{layer}.mlp.experts.down_proj",
)
"""The 3-D tensors that transformers 5 holds in memory, and some tools save."""


def num_experts(config: Config) -> int:
    """Routed experts per MoE layer, under whichever of its three names the config has."""
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key) is not None:
            return int(config[key])
    raise KeyError("num_experts")


def uniform_shape(config: Config) -> MoEShape:
    """Sizes of the families in which every layer has experts and `intermediate_size` is the width of one."""
    return MoEShape(
        num_layers=config["num_hidden_layers"],
        moe_layers=tuple(range(config["num_hidden_layers"])),
        num_experts=num_experts(config),
        top_k=config["num_experts_per_tok"],
        hidden_size=config["hidden_size"],
        expert_width=config["intermediate_size"],
    )


def qwen_shape(config: Config) -> MoEShape:
    """Sizes of the Qwen families: experts in every `decoder_sparse_step`-th layer, but not in `mlp_only_layers`."""
    num_layers = config["num_hidden_layers"]
    step = config.get("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or ()
    layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    return MoEShape(
        num_layers=num_layers,
        moe_layers=layers,
        num_experts=num_experts(config),
        top_k=config["num_experts_per_tok"],
        hidden_size=config["hidden_size"],
        expert_width=config["moe_intermediate_size"],
        shared_width=config.get("shared_expert_intermediate_size") or 0,
        dense_width=config["intermediate_size"] if len(layers) < num_layers else 0,
    )


def softmax_router(config: Config) -> RouterRule:
    """Softmax over all experts, then top-k; renormalised iff `norm_topk_prob`, or where the family has no such key."""
    return RouterRule(top_k=config["num_experts_per_tok"], renormalize=bool(config.get("norm_topk_prob", True)))
