"""GPT-OSS -> itself with one expert: clamped gate, biases, sinks and alternating windows have no other stock class."""

from burnish.families.family import Config, DenseTwin, Family, softmax_router, uniform_shape
from burnish.families.storage import Fused, PackedMxfp4

GATE_UP = "model.layers.{layer}.mlp.experts.gate_up_proj"
DOWN = "model.layers.{layer}.mlp.experts.down_proj"
STORAGE = Fused(GATE_UP, DOWN, f"{GATE_UP}_bias", f"{DOWN}_bias", interleaved=True, transposed=True)
ROUTER = ("model.layers.{layer}.mlp.router.weight", "model.layers.{layer}.mlp.router.bias")


def twin(config: Config) -> DenseTwin:
    """GPT-OSS with one expert, whose softmax over a single logit is 1. MXFP4 weights are written as bfloat16."""
    return DenseTwin(
        "GptOssForCausalLM",
        "gpt_oss",
        STORAGE,
        kind="one-expert",
        settings={"num_local_experts": 1, "num_experts_per_tok": 1},
        zero_router={ROUTER[0]: True, ROUTER[1]: False},
        why="no stock dense class has GPT-OSS's clamped gate, expert biases and attention sinks, so the student is"
        " GptOssForCausalLM with one expert behind a router of zeros",
    )


FAMILY = Family(
    name="GPT-OSS",
    model_type="gpt_oss",
    becomes=("GptOssForCausalLM",),
    shape=uniform_shape,
    router=softmax_router,
    twin=twin,
    storages=(PackedMxfp4(GATE_UP, DOWN, f"{GATE_UP}_bias", f"{DOWN}_bias"), STORAGE),
    module_storage=STORAGE,
    router_tensors=ROUTER,
    router_module="router",
)
