"""Decide: a pure function from activation statistics to a plan. No model, no disk, no device."""

from __future__ import annotations

from torch import Tensor

from burnish.prune.layout import Sizes
from burnish.prune.plan import LayerPlan, PrunePlan
from burnish.prune.score import block_influence, head_importance, hidden_importance, neuron_importance
from burnish.prune.statistics import ActivationStatistics


def decide(
    statistics: ActivationStatistics,
    target: Sizes,
    *,
    family: str,
    source: Sizes,
    head_dim: int,
    notes: list[str] | None = None,
) -> PrunePlan:
    """The plan that keeps what matters most at the target sizes; ties go to the lowest index.

    Layers are ranked by block influence, hidden channels once for the whole model, neurons and heads in each layer.
    Every key-value head keeps equally many of its query heads; where key-value heads go too, those whose query heads
    matter most together stay.

    Args:
        statistics: of all layers.
        target: sizes to reach.
        family: model type, written into the plan.
        source: sizes of the model.
        head_dim: channels of one head.
        notes: written into the plan.

    Source: arXiv 2407.14679, section 2.2; heads within their groups as in NVIDIA ModelOpt.
    """
    influence = [block_influence(stats) for stats in statistics.layers.values()]
    layers = []
    for index in strongest(Tensor(influence).double(), target.layers):
        stats = statistics.layers[index]
        layers.append(
            LayerPlan(
                layer=index,
                heads=keep_heads(head_importance(stats, head_dim), source, target),
                neurons=strongest(neuron_importance(stats), target.intermediate_size),
            )
        )
    return PrunePlan(
        family=family,
        source=source,
        target=target,
        notes=notes or [],
        block_influence=influence,
        hidden=strongest(hidden_importance(statistics), target.hidden_size),
        layers=layers,
    )


def strongest(importance: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest values, ascending; ties go to the lowest index."""
    order = importance.sort(descending=True, stable=True).indices[:count]
    return tuple(int(index) for index in order.sort().values)


def keep_heads(importance: Tensor, source: Sizes, target: Sizes) -> tuple[int, ...]:
    """Query heads [heads] that stay: the strongest groups, and in each of them equally many of its strongest heads."""
    grouped = importance.view(source.kv_heads, source.group)
    return tuple(
        group * source.group + head
        for group in strongest(grouped.sum(dim=1), target.kv_heads)
        for head in strongest(grouped[group], target.group)
    )
