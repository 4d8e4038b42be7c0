"""How K kept experts form k groups when more are kept than the router uses: five groupings.

Only "weights" (weight clustering, WC) is named in the sources of arXiv 2605.28207, and its metric and algorithm are
not known; all five are ours. None of them helps much: the spread between groupings is about 1 point where the spread
between scores is about 6 (an independent implementation's finding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.densify.statistics import LayerStatistics

Groups = list[list[int]]


def by_weights(stats: LayerStatistics, kept: list[int], num_groups: int, generator: torch.Generator) -> Groups:
    """Average linkage on the cosine distance between the experts' flattened weights."""
    assert stats.weight_gram is not None
    return _cluster(_cosine_distance(_submatrix(stats.weight_gram, kept)), kept, num_groups)


def by_outputs(stats: LayerStatistics, kept: list[int], num_groups: int, generator: torch.Generator) -> Groups:
    """Average linkage on the root-mean-square distance between the experts' outputs over all tokens."""
    assert stats.gram is not None
    gram = _submatrix(stats.gram, kept) / stats.num_tokens
    size = gram.diagonal()
    squared = size[:, None] + size[None, :] - 2 * gram
    return _cluster(squared.clamp(min=0).sqrt(), kept, num_groups)


def by_router(stats: LayerStatistics, kept: list[int], num_groups: int, generator: torch.Generator) -> Groups:
    """Average linkage on the cosine distance between the experts' router logits over all tokens."""
    return _cluster(_cosine_distance(_submatrix(stats.logit_gram, kept)), kept, num_groups)


def by_nearest_dominant(stats: LayerStatistics, kept: list[int], num_groups: int, generator: torch.Generator) -> Groups:
    """The first experts of `kept` lead a group each; every other joins the one with the most similar router logits.

    The assignment rule of M-SMoE (arXiv 2310.01334), with the order of `kept` in the place of usage frequency.
    """
    distance = _cosine_distance(_submatrix(stats.logit_gram, kept))
    groups = [[expert] for expert in kept[:num_groups]]
    for position in range(num_groups, len(kept)):
        groups[int(distance[position, :num_groups].argmin())].append(kept[position])
    return groups


def balanced(stats: LayerStatistics, kept: list[int], num_groups: int, generator: torch.Generator) -> Groups:
    """Random groups whose sizes differ by one at most; the control."""
    order = torch.randperm(len(kept), generator=generator)
    return [[kept[int(position)] for position in order[start::num_groups]] for start in range(num_groups)]


@dataclass(frozen=True)
class Grouping:
    """A row of the table of groupings: the function and the statistics it needs."""

    function: Callable[[LayerStatistics, list[int], int, torch.Generator], Groups]
    title: str
    needs_outputs: bool = False
    needs_weights: bool = False


GROUPINGS: dict[str, Grouping] = {
    "weights": Grouping(by_weights, "clusters of similar weights", needs_weights=True),
    "outputs": Grouping(by_outputs, "clusters of similar outputs", needs_outputs=True),
    "router": Grouping(by_router, "clusters of similar router logits"),
    "dominant": Grouping(by_nearest_dominant, "best experts, others join the nearest by router logits"),
    "balanced": Grouping(balanced, "random groups of equal size"),
}
NO_GROUPING = "none"
"""Keep every expert as a block of its own: the student is K experts wide instead of top-k."""


def average_linkage(distance: Tensor, num_groups: int) -> Groups:
    """Agglomerative clustering with average linkage (UPGMA), cut at exactly `num_groups` clusters.

    Args:
        distance: [n, n] symmetric.
        num_groups: 1..n.

    Returns:
        Clusters of positions, each sorted, ordered by their first member.
    """
    between = distance.double().clone().fill_diagonal_(torch.inf)
    clusters: list[list[int]] = [[position] for position in range(len(distance))]
    while len(clusters) > num_groups:
        first, second = sorted(divmod(int(between.argmin()), len(clusters)))
        a, b = len(clusters[first]), len(clusters[second])
        merged = (a * between[first] + b * between[second]) / (a + b)
        between[first], between[:, first] = merged, merged
        between[first, first] = torch.inf
        rest = [position for position in range(len(clusters)) if position != second]
        between = between[rest][:, rest]
        clusters[first] = sorted(clusters[first] + clusters.pop(second))
    return sorted(clusters)


def _cluster(distance: Tensor, kept: list[int], num_groups: int) -> Groups:
    return [[kept[position] for position in cluster] for cluster in average_linkage(distance, num_groups)]


def _submatrix(matrix: Tensor, kept: list[int]) -> Tensor:
    return matrix[kept][:, kept]


def _cosine_distance(gram: Tensor) -> Tensor:
    norm = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    return 1 - gram / torch.outer(norm, norm)
