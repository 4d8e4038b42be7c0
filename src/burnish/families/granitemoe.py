"""Granite-MoE -> `GraniteForCausalLM`: the same embedding, residual, attention and logits multipliers."""

from burnish.families.family import LLAMA_FFN, Config, DenseTwin, Family, softmax_router, uniform_shape
from burnish.families.storage import Fused

BLOCK = "model.layers.{layer}.block_sparse_moe"
MODULE_STORAGE = Fused(f"{BLOCK}.experts.gate_up_proj", f"{BLOCK}.experts.down_proj")


def twin(config: Config) -> DenseTwin:
    """Granite has all of Granite-MoE's multipliers under the same names."""
    return DenseTwin("GraniteForCausalLM", "granite", LLAMA_FFN)


FAMILY = Family(
    name="Granite-MoE",
    model_type="granitemoe",
    becomes=("GraniteForCausalLM",),
    shape=uniform_shape,
    router=softmax_router,
    twin=twin,
    storages=(Fused(f"{BLOCK}.input_linear.weight", f"{BLOCK}.output_linear.weight"), MODULE_STORAGE),
    module_storage=MODULE_STORAGE,
    router_tensors=(f"{BLOCK}.router.layer.weight", f"{BLOCK}.router.weight"),
    block=BLOCK,
    router_module="router",
    renames=((".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),),
)
