"""Router rules against transformers' own routers, and against hand-worked cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.families import FAMILIES, RouterRule, resolve_config
from tests.conftest import FAMILIES as NAMES
from tests.conftest import build_model


def router_of(model: Any, family: Any, layer: int) -> Any:
    return model.get_submodule(family.block.format(layer=layer)).get_submodule(family.router_module)


def compare(name: str, **changes: Any) -> None:
    model, family = build_model(name, **changes), FAMILIES[name]
    config = resolve_config(model.config.to_dict())
    rule = family.router(config)
    router = router_of(model, family, family.shape(config).moe_layers[-1])
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, weights, indices = router(hidden)
    routing = rule.route(logits)
    shape = (200, family.shape(config).num_experts)
    got = torch.zeros(shape).scatter(1, routing.indices, routing.weights)
    expected = torch.zeros(shape).scatter(1, indices, weights)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    totals = routing.weights.sum(-1)
    assert rule.weights_sum_to_one == bool((totals - 1).abs().max() < 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rule_equals_the_router_of_transformers(name: str) -> None:
    compare(name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("olmoe", {"norm_topk_prob": True}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "greedy", "routed_scaling_factor": 1.0}),
        ("deepseek_v2", {"n_group": 2, "topk_group": 1}),
    ],
)
def test_rule_follows_the_config(name: str, changes: dict[str, Any]) -> None:
    compare(name, **changes)


def test_sigmoid_with_correction_bias_and_groups_equals_deepseek_v3() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=8,
        norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    torch.manual_seed(0)
    block = DeepseekV3MoE(config)
    bias = 0.3 * torch.randn(16)
    with torch.no_grad():
        block.gate.weight.normal_()
        block.gate.e_score_correction_bias.copy_(bias)
    seen: list[torch.Tensor] = []
    block.experts.register_forward_pre_hook(lambda module, args: seen.extend(args))
    hidden = torch.randn(1, 100, 32)
    with torch.no_grad():
        block(hidden)
        logits = hidden[0] @ block.gate.weight.T
    rule = RouterRule(
        top_k=4, activation="sigmoid", renormalize=True, scaling_factor=2.5, num_groups=4, top_k_groups=2,
        group_score="top2-sum", correction_bias=True,
    )  # fmt: skip
    routing = rule.route(logits, bias)
    got = torch.zeros(100, 16).scatter(1, routing.indices, routing.weights)
    expected = torch.zeros(100, 16).scatter(1, seen[1], seen[2].float())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="correction_bias is missing"):
        rule.route(logits)


def test_softmax_over_the_top_k_logits_is_the_renormalised_softmax() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    routing = RouterRule(top_k=3).route(logits)
    torch.testing.assert_close(routing.weights, logits.topk(3).values.softmax(-1))


def test_bias_changes_the_choice_but_not_the_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    rule = RouterRule(top_k=1, activation="sigmoid", renormalize=False, correction_bias=True)
    routing = rule.route(logits, torch.tensor([0.0, 0.0, 5.0]))
    assert routing.indices.tolist() == [[2]] and routing.weights.tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("rule", "weight"),
    [
        (RouterRule(1), 1.0),
        (RouterRule(1, renormalize=False), 1.0),
        (RouterRule(1, renormalize=False, scaling_factor=1.5), 1.5),
        (RouterRule(1, activation="sigmoid", renormalize=False, scaling_factor=3.0), 1.5),
        (RouterRule(1, activation="sigmoid", renormalize=True, scaling_factor=3.0), 3.0),
    ],
)
def test_single_expert_weight_is_what_a_router_of_one_zero_row_gives(rule: RouterRule, weight: float) -> None:
    assert rule.single_expert_weight == weight == float(rule.route(torch.zeros(1, 1)).weights)


def test_experts_that_do_not_split_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="10 experts cannot be split into 4 groups"):
        RouterRule(2, num_groups=4, top_k_groups=1).route(torch.zeros(1, 10))
