"""Decide: a pure function from routing statistics to a plan. No model, no disk, no device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from burnish.densify.group import GROUPINGS, NO_GROUPING
from burnish.densify.plan import DensifyPlan, LayerPlan
from burnish.densify.scale import SCALINGS, relative_block_error
from burnish.densify.score import SCORES, Probability, importance
from burnish.densify.select import d_optimal, effective_rank, importance_kernel, top_k
from burnish.densify.statistics import LayerStatistics, RoutingStatistics
from burnish.families import MoEShape, RouterRule


@dataclass(frozen=True)
class Choice:
    """How to decide.

    Attributes:
        score: a key of SCORES.
        keep: experts kept per layer, top_k..num_experts.
        grouping: a key of GROUPINGS, or "none" for a student of `keep` blocks; without effect when keep = top_k.
        scaling: a key of SCALINGS.
        probability: which router weight CP averages: "softmax" (the paper) or "gate".
        ridge: of the D-optimal selection, see `select.d_optimal`.
        normalize_gram: cosines in the D-optimal kernel, see `select.importance_kernel`.
        seed: of random groupings.
    """

    score: str
    keep: int
    grouping: str
    scaling: str
    probability: Probability = "softmax"
    ridge: float | None = None
    normalize_gram: bool = False
    seed: int = 0

    def num_groups(self, top_k: int) -> int:
        """Blocks of the dense feed-forward for a router of `top_k`."""
        return self.keep if self.grouping == NO_GROUPING else top_k

    @property
    def needs_outputs(self) -> bool:
        """Whether every expert must be run on every calibration token."""
        grouping = GROUPINGS.get(self.grouping)
        return (
            SCORES[self.score].needs_outputs
            or SCALINGS[self.scaling].needs_outputs
            or (grouping is not None and grouping.needs_outputs)
        )

    @property
    def needs_weights(self) -> bool:
        """Whether the similarity of the experts' weights is needed."""
        grouping = GROUPINGS.get(self.grouping)
        return grouping is not None and grouping.needs_weights


def make_choice(
    shape: MoEShape,
    rule: RouterRule,
    *,
    score: str,
    keep: int | None,
    grouping: str,
    scaling: str,
    probability: Probability = "softmax",
    ridge: float | None = None,
    normalize_gram: bool = False,
    seed: int = 0,
) -> tuple[Choice, list[str]]:
    """Check what the user asked for against a model, and fill in what was left open.

    `scaling="auto"` becomes "uniform" where the router's weights sum to 1 and "conditional" elsewhere.

    Returns:
        The choice, and notes that say what was filled in.

    Raises:
        ValueError: an unknown name, `keep` outside top_k..num_experts, or a combination that cannot work.
    """
    for name, value, known in (
        ("score", score, [*SCORES]),
        ("grouping", grouping, [*GROUPINGS, NO_GROUPING]),
        ("scaling", scaling, ["auto", *SCALINGS]),
        ("probability", probability, ["softmax", "gate"]),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(known)}")
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge={ridge}: expected a number >= 0")
    keep = shape.top_k if keep is None else keep
    if keep < shape.top_k:
        raise ValueError(f"keep={keep} is less than the router's top_k={shape.top_k}: choose {shape.top_k} or more")
    if keep > shape.num_experts:
        raise ValueError(
            f"keep={keep}, but a layer has {shape.num_experts} experts: choose {shape.num_experts} or less"
        )
    notes = []
    if keep == shape.top_k and grouping != NO_GROUPING:
        grouping = NO_GROUPING
    if scaling == "auto":
        scaling = "uniform" if rule.weights_sum_to_one else "conditional"
        reason = "sum to 1" if rule.weights_sum_to_one else "do not sum to 1"
        notes.append(f"scaling is {scaling}: the router's weights {reason}")
    if scaling == "least-squares" and grouping != NO_GROUPING:
        raise ValueError("scaling='least-squares' needs blocks of one expert: keep=top_k, or grouping='none'")
    choice = Choice(score, keep, grouping, scaling, probability, ridge, normalize_gram, seed)
    return choice, notes


def decide(
    statistics: RoutingStatistics, choice: Choice, *, family: str, top_k: int, notes: list[str] | None = None
) -> DensifyPlan:
    """The plan that a choice makes of a record of statistics.

    Args:
        statistics: of all MoE layers.
        choice: as `make_choice` gives it.
        family: model type, written into the plan.
        top_k: the router's k: the number of groups, unless the grouping is "none".
        notes: written into the plan.
    """
    layers = [
        _decide_layer(layer, stats, choice, choice.num_groups(top_k)) for layer, stats in statistics.layers.items()
    ]
    num_experts = next(iter(statistics.layers.values())).num_experts
    return DensifyPlan(
        family=family,
        num_experts=num_experts,
        top_k=top_k,
        score=choice.score,
        keep=choice.keep,
        grouping=choice.grouping,
        scaling=choice.scaling,
        notes=notes or [],
        layers=layers,
    )


def _decide_layer(layer: int, stats: LayerStatistics, choice: Choice, num_groups: int) -> LayerPlan:
    scores = importance(stats, choice.score, choice.probability)
    kept = select_experts(stats, scores, choice)
    if choice.grouping == NO_GROUPING:
        groups = [[expert] for expert in sorted(kept)]
    else:
        generator = torch.Generator().manual_seed(choice.seed + layer)
        found = GROUPINGS[choice.grouping].function(stats, kept, num_groups, generator)
        groups = sorted(sorted(group) for group in found)
    scales = SCALINGS[choice.scaling].function(stats, groups, scores)
    rank = None if stats.gram is None else effective_rank(stats.gram[kept][:, kept])
    return LayerPlan(
        layer=layer,
        groups=groups,
        weights=[_merge_weights(scores[group].tolist()) for group in groups],
        scales=scales.tolist(),
        shared_scale=1.0 if stats.shared_gate_sum is None else float(stats.shared_gate_sum / stats.num_tokens),
        scores=scores.tolist(),
        relative_block_error=relative_block_error(stats, groups, scales),
        effective_rank=rank,
    )


def select_experts(stats: LayerStatistics, scores: torch.Tensor, choice: Choice) -> list[int]:
    """The experts that a choice keeps in a layer, in order of preference."""
    if not SCORES[choice.score].diverse:
        return top_k(scores, choice.keep)
    assert stats.gram is not None
    kernel = importance_kernel(scores, stats.gram / stats.num_tokens, normalize_gram=choice.normalize_gram)
    return d_optimal(kernel, choice.keep, ridge=choice.ridge)


def _merge_weights(scores: list[float]) -> list[float]:
    """The scores, or equal weights where they are all zero (experts that no token chose)."""
    return scores if sum(scores) > 0 else [1.0] * len(scores)
