"""Mixtral -> `MistralForCausalLM`, or `LlamaForCausalLM` where the config has no sliding window."""

from burnish.families.family import FUSED_EXPERTS, LLAMA_FFN, Config, DenseTwin, Family, softmax_router, uniform_shape
from burnish.families.storage import Separate


def twin(config: Config) -> DenseTwin:
    """Both dense classes compute Mixtral's attention; only Mistral's knows a window."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("sliding_window") is None:
        return DenseTwin("LlamaForCausalLM", "llama", LLAMA_FFN, settings={"head_dim": head_dim})
    return DenseTwin("MistralForCausalLM", "mistral", LLAMA_FFN, settings={"head_dim": head_dim})


FAMILY = Family(
    name="Mixtral",
    model_type="mixtral",
    becomes=("LlamaForCausalLM", "MistralForCausalLM"),
    shape=uniform_shape,
    router=softmax_router,
    twin=twin,
    storages=(
        Separate(
            gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        ),
        FUSED_EXPERTS,
    ),
    module_storage=FUSED_EXPERTS,
    router_tensors=("model.layers.{layer}.block_sparse_moe.gate.weight", "model.layers.{layer}.mlp.gate.weight"),
    renames=((".block_sparse_moe.", ".mlp."),),
)
