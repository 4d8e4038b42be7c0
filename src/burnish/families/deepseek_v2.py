"""DeepSeek-V2(-Lite) -> itself with only dense layers: multi-head latent attention has no other stock class."""

from burnish.families.family import (
    FUSED_EXPERTS,
    LLAMA_FFN,
    SEPARATE_EXPERTS,
    Config,
    DenseTwin,
    Family,
    MoEShape,
    SharedExperts,
    num_experts,
)
from burnish.families.router import RouterRule
from burnish.families.storage import Separate


def shape(config: Config) -> MoEShape:
    """Sizes; the first `first_k_dense_replace` layers are dense, and shared experts are as wide as routed ones."""
    first = config["first_k_dense_replace"]
    return MoEShape(
        num_layers=config["num_hidden_layers"],
        moe_layers=tuple(range(first, config["num_hidden_layers"])),
        num_experts=num_experts(config),
        top_k=config["num_experts_per_tok"],
        hidden_size=config["hidden_size"],
        expert_width=config["moe_intermediate_size"],
        shared_width=(config.get("n_shared_experts") or 0) * config["moe_intermediate_size"],
        dense_width=config["intermediate_size"] if first else 0,
    )


def router(config: Config) -> RouterRule:
    """Softmax, top-k (of the best groups), never renormalised, times `routed_scaling_factor`."""
    limited = config.get("topk_method") == "group_limited_greedy"
    return RouterRule(
        top_k=config["num_experts_per_tok"],
        renormalize=False,
        scaling_factor=float(config["routed_scaling_factor"]),
        num_groups=config["n_group"] if limited else 1,
        top_k_groups=config["topk_group"] if limited else 1,
    )


def twin(config: Config) -> DenseTwin:
    """The class reads one `intermediate_size`, so that all layers, the first included, get the widest width."""
    return DenseTwin(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        LLAMA_FFN,
        settings={"first_k_dense_replace": config["num_hidden_layers"]},
        why="multi-head latent attention has no other stock class, so the student is DeepseekV2ForCausalLM with"
        " first_k_dense_replace = num_hidden_layers: every layer is an ordinary dense feed-forward",
    )


FAMILY = Family(
    name="DeepSeek-V2",
    model_type="deepseek_v2",
    becomes=("DeepseekV2ForCausalLM",),
    shape=shape,
    router=router,
    twin=twin,
    storages=(SEPARATE_EXPERTS, FUSED_EXPERTS),
    module_storage=FUSED_EXPERTS,
    router_tensors=("model.layers.{layer}.mlp.gate.weight",),
    shared=SharedExperts(
        Separate(
            gate="model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
            up="model.layers.{layer}.mlp.shared_experts.up_proj.weight",
            down="model.layers.{layer}.mlp.shared_experts.down_proj.weight",
        )
    ),
    dense_ffn=LLAMA_FFN,
)
