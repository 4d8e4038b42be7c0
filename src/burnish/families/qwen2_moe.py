"""Qwen2-MoE (Qwen1.5-MoE) -> `Qwen2ForCausalLM`; the shared expert's sigmoid gate becomes its calibration mean."""

from burnish.families.family import (
    FUSED_EXPERTS,
    LLAMA_FFN,
    SEPARATE_EXPERTS,
    Config,
    DenseTwin,
    Family,
    SharedExperts,
    qwen_shape,
    softmax_router,
)
from burnish.families.storage import Separate


def twin(config: Config) -> DenseTwin:
    """Qwen2, with the same query, key and value biases. Which layers have a window is stated layer by layer."""
    layer_types = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    settings = {"layer_types": layer_types, "sliding_window": config.get("sliding_window") or None}
    return DenseTwin("Qwen2ForCausalLM", "qwen2", LLAMA_FFN, settings=settings)


FAMILY = Family(
    name="Qwen2-MoE",
    model_type="qwen2_moe",
    becomes=("Qwen2ForCausalLM",),
    shape=qwen_shape,
    router=softmax_router,
    twin=twin,
    storages=(SEPARATE_EXPERTS, FUSED_EXPERTS),
    module_storage=FUSED_EXPERTS,
    router_tensors=("model.layers.{layer}.mlp.gate.weight",),
    shared=SharedExperts(
        storage=Separate(
            gate="model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
            up="model.layers.{layer}.mlp.shared_expert.up_proj.weight",
            down="model.layers.{layer}.mlp.shared_expert.down_proj.weight",
        ),
        gate="model.layers.{layer}.mlp.shared_expert_gate.weight",
        gate_module="shared_expert_gate",
    ),
    dense_ffn=LLAMA_FFN,
)
