"""Qwen3-MoE -> `Qwen3ForCausalLM`: attention with per-head query and key norms is the same in both classes."""

from burnish.families.family import (
    FUSED_EXPERTS,
    LLAMA_FFN,
    SEPARATE_EXPERTS,
    Config,
    DenseTwin,
    Family,
    qwen_shape,
    softmax_router,
)


def twin(config: Config) -> DenseTwin:
    """Qwen3. Its window covers only the layers from `max_window_layers` on, the MoE class's covers all of them."""
    windowed = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    kind = "sliding_attention" if windowed else "full_attention"
    settings = {
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "layer_types": [kind] * config["num_hidden_layers"],
        "max_window_layers": 0 if windowed else config["num_hidden_layers"],
    }
    return DenseTwin("Qwen3ForCausalLM", "qwen3", LLAMA_FFN, settings=settings)


FAMILY = Family(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    becomes=("Qwen3ForCausalLM",),
    shape=qwen_shape,
    router=softmax_router,
    twin=twin,
    storages=(SEPARATE_EXPERTS, FUSED_EXPERTS),
    module_storage=FUSED_EXPERTS,
    router_tensors=("model.layers.{layer}.mlp.gate.weight",),
    dense_ffn=LLAMA_FFN,
)
