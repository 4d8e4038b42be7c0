"""Deciding: what is filled in, what is refused, and that the same record always gives the same plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.densify.decide import Choice, decide, make_choice
from burnish.densify.group import GROUPINGS
from burnish.densify.plan import DensifyPlan
from burnish.densify.scale import SCALINGS
from burnish.densify.score import SCORES
from burnish.densify.statistics import LayerStatistics, RoutingStatistics
from burnish.families import MoEShape, RouterRule
from tests.densify.records import random_layer

SHAPE = MoEShape(num_layers=2, moe_layers=(0, 1), num_experts=6, top_k=2, hidden_size=8, expert_width=4)
ASKED: dict[str, Any] = {"score": "do-acp", "keep": None, "grouping": "weights", "scaling": "auto"}


def record() -> RoutingStatistics:
    layers = {}
    for layer in (0, 1):
        stats = random_layer(seed=layer)
        layers[layer] = LayerStatistics(**stats.tensors() | {"weight_gram": torch.eye(6, dtype=torch.float64)})
    return RoutingStatistics(layers)


@pytest.mark.parametrize(
    ("rule", "scaling"),
    [
        (RouterRule(2), "uniform"),
        (RouterRule(2, renormalize=False), "conditional"),
        (RouterRule(2, scaling_factor=2.5), "conditional"),
    ],
)
def test_auto_scaling_follows_the_router_and_says_so(rule: RouterRule, scaling: str) -> None:
    choice, notes = make_choice(SHAPE, rule, **ASKED)
    assert choice.scaling == scaling and choice.keep == 2
    assert any(scaling in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1}, r"keep=1 is less than the router's top_k=2"),
        ({"keep": 7}, r"keep=7, but a layer has 6 experts"),
        ({"score": "best"}, r"score='best' is unknown: choose one of sf, pp"),
        ({"grouping": "x"}, r"grouping='x'"),
        ({"scaling": "x"}, r"scaling='x'"),
        ({"scaling": "least-squares", "keep": 4}, r"least-squares.*blocks of one expert"),
        ({"ridge": -1.0}, r"ridge=-1\.0"),
        ({"ridge": float("nan")}, r"ridge=nan"),
    ],
)
def test_bad_options_are_refused_with_the_cure(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_choice(SHAPE, RouterRule(2), **ASKED | change)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_score_and_scaling_gives_a_sound_plan(score: str, scaling: str) -> None:
    choice, _ = make_choice(SHAPE, RouterRule(2), score=score, keep=2, grouping="weights", scaling=scaling)
    plan = decide(record(), choice, family="f", top_k=2)
    plan.require_fits("f", SHAPE)
    assert plan.num_groups == 2
    assert plan == decide(record(), choice, family="f", top_k=2)


@pytest.mark.parametrize("grouping", [*GROUPINGS, "none"])
@pytest.mark.parametrize("keep", [3, 6])
def test_every_grouping_gives_a_sound_plan(grouping: str, keep: int) -> None:
    choice, _ = make_choice(SHAPE, RouterRule(2), score="acp", keep=keep, grouping=grouping, scaling="uniform")
    plan = decide(record(), choice, family="f", top_k=2).require_fits("f", SHAPE)
    assert plan.num_groups == (keep if grouping == "none" else 2)
    for layer in plan.layers:
        assert len([expert for group in layer.groups for expert in group]) == keep


def test_pure_pruning_makes_the_grouping_irrelevant() -> None:
    plans = []
    for grouping in (*GROUPINGS, "none"):
        choice, _ = make_choice(SHAPE, RouterRule(2), score="acp", keep=2, grouping=grouping, scaling="uniform")
        plans.append(decide(record(), choice, family="f", top_k=2))
    assert all(plan == plans[0] for plan in plans)


def test_kept_experts_are_ordered_by_index_and_merge_weights_are_the_scores() -> None:
    plan = decide(record(), Choice("acp", 4, "router", "uniform"), family="f", top_k=2)
    for layer in plan.layers:
        assert layer.groups == sorted(sorted(group) for group in layer.groups)
        assert layer.scores is not None
        for group, weights in zip(layer.groups, layer.weights, strict=True):
            assert weights == [layer.scores[expert] for expert in group]


def test_experts_that_no_token_chose_merge_with_equal_weights() -> None:
    stats = random_layer()
    empty = LayerStatistics(**stats.tensors() | {n: torch.zeros_like(getattr(stats, n)) for n in
                                                 ("counts", "selected_probability_sum", "gate_sum")})  # fmt: skip
    plan = decide(RoutingStatistics({0: empty}), Choice("cp", 4, "router", "uniform"), family="f", top_k=2)
    assert all(weights == [1.0] * len(weights) for weights in plan.layers[0].weights)


def test_a_plan_survives_its_file_exactly(tmp_path: Path) -> None:
    plan = decide(record(), Choice("do-acp", 4, "outputs", "score"), family="f", top_k=2, notes=["a note"])
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert DensifyPlan.load(tmp_path / "plan.json") == plan
    assert max(len(line) for line in plan.to_json().splitlines()) < 400  # readable: lists on one line, layers apart
