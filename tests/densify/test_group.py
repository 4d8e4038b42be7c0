"""Groupings: exactly k groups that partition the kept experts, and the clusters that are planted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.densify.group import GROUPINGS, average_linkage
from burnish.densify.statistics import LayerStatistics
from tests.densify.records import layer_statistics

PLANTED = [[0, 3], [1, 5], [2, 4]]


def planted() -> LayerStatistics:
    """Six experts in three pairs that are alike in outputs, router logits and weights."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.tensor([0, 1, 2, 0, 2, 1])
    logits = torch.randn(50, 3, generator=generator).double()[:, pair]
    logits = logits + 0.05 * torch.randn(50, 6, generator=generator).double()
    outputs = torch.randn(3, 50, 8, generator=generator).double()[pair]
    outputs = outputs + 0.05 * torch.randn(6, 50, 8, generator=generator).double()
    stats = layer_statistics(outputs, probabilities=logits.softmax(-1))
    weights = torch.randn(3, 90, generator=generator).double()[pair] + 0.05 * torch.randn(6, 90).double()
    unit = weights / weights.norm(dim=1, keepdim=True)
    return LayerStatistics(**stats.tensors() | {"weight_gram": unit @ unit.mT})


@pytest.mark.parametrize("name", ["weights", "outputs", "router"])
def test_planted_pairs_are_found(name: str) -> None:
    groups = GROUPINGS[name].function(planted(), [4, 0, 1, 2, 3, 5], 3, torch.Generator())
    assert sorted(sorted(group) for group in groups) == PLANTED


def test_dominant_experts_lead_and_others_join_the_most_similar() -> None:
    groups = GROUPINGS["dominant"].function(planted(), [0, 1, 2, 3, 4, 5], 3, torch.Generator())
    assert sorted(sorted(group) for group in groups) == PLANTED
    lead = GROUPINGS["dominant"].function(planted(), [4, 5, 3, 0, 1, 2], 3, torch.Generator())
    assert [group[0] for group in lead] == [4, 5, 3]


@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("num_groups", [1, 2, 4, 6])
def test_groups_partition_the_kept_experts(name: str, num_groups: int) -> None:
    kept = [5, 1, 0, 4, 2, 3]
    groups = GROUPINGS[name].function(planted(), kept, num_groups, torch.Generator().manual_seed(0))
    assert len(groups) == num_groups and all(groups)
    assert sorted(expert for group in groups for expert in group) == sorted(kept)


def test_balanced_groups_differ_by_one_and_follow_the_seed() -> None:
    def draw(seed: int) -> list[list[int]]:
        return GROUPINGS["balanced"].function(planted(), [0, 1, 2, 3, 4], 2, torch.Generator().manual_seed(seed))

    assert sorted(len(group) for group in draw(0)) == [2, 3]
    assert draw(3) == draw(3)
    assert len({repr(draw(seed)) for seed in range(8)}) > 1


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 16), st.integers(0, 1000), st.data())
def test_average_linkage_equals_scipy(size: int, seed: int, data: st.DataObject) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    squareform = pytest.importorskip("scipy.spatial.distance").squareform
    points = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = torch.cdist(points, points)
    distance = (distance + distance.mT).fill_diagonal_(0) / 2
    num_groups = data.draw(st.integers(1, size))
    labels = hierarchy.cut_tree(hierarchy.linkage(squareform(distance.numpy()), "average"), num_groups)[:, 0]
    expected = sorted([[int(i) for i in range(size) if labels[i] == label] for label in set(labels)])
    assert average_linkage(distance, num_groups) == expected
