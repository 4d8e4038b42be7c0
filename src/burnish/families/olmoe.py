"""OLMoE -> itself with one expert: no stock dense class norms queries and keys over the whole projection, pre-norm."""

from burnish.families.family import (
    FUSED_EXPERTS,
    SEPARATE_EXPERTS,
    Config,
    DenseTwin,
    Family,
    softmax_router,
    uniform_shape,
)


def twin(config: Config) -> DenseTwin:
    """OLMoE with one expert, whose softmax over a single logit is 1."""
    return DenseTwin(
        "OlmoeForCausalLM",
        "olmoe",
        SEPARATE_EXPERTS,
        kind="one-expert",
        settings={"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1},
        zero_router={"model.layers.{layer}.mlp.gate.weight": True},
        why="no stock dense class has OLMoE's query and key norms over the whole projection with pre-norm layers, so"
        " the student is OlmoeForCausalLM with one expert behind a router of zeros",
    )


FAMILY = Family(
    name="OLMoE",
    model_type="olmoe",
    becomes=("OlmoeForCausalLM",),
    shape=uniform_shape,
    router=softmax_router,
    twin=twin,
    storages=(SEPARATE_EXPERTS, FUSED_EXPERTS),
    module_storage=FUSED_EXPERTS,
    router_tensors=("model.layers.{layer}.mlp.gate.weight",),
)
