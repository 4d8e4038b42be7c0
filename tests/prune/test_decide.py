"""Decisions on records with known answers: what stays, in which order, and ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.prune import ActivationStatistics, LayerStatistics, Sizes
from burnish.prune.decide import decide, keep_heads, strongest

SOURCE = Sizes(layers=3, hidden_size=4, intermediate_size=5, heads=4, kv_heads=2)


def record(cosines: list[float] = [0.9, 0.2, 0.5]) -> ActivationStatistics:  # noqa: B006
    layers = {}
    for index, cosine in enumerate(cosines):
        layers[index] = LayerStatistics(
            num_sequences=torch.tensor(1),
            num_tokens=torch.tensor(10),
            cosine_sum=torch.tensor(10 * cosine).double(),
            neurons=torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0]).roll(index),
            head_channels=torch.tensor([1.0, 0, 4, 0, 9, 0, 2, 0]),  # heads of two channels
            attention_channels=torch.tensor([1.0, 0, 1, 0]),
            feed_forward_channels=torch.tensor([0.0, 0, 1, 4]),
        )
    return ActivationStatistics(layers)


def test_the_strongest_stay_in_their_order() -> None:
    target = Sizes(layers=2, hidden_size=2, intermediate_size=3, heads=2, kv_heads=2)
    plan = decide(record(), target, family="llama", source=SOURCE, head_dim=2)
    assert plan.block_influence == pytest.approx([0.1, 0.8, 0.5])
    assert [layer.layer for layer in plan.layers] == [1, 2]
    assert plan.hidden == (2, 3)  # sqrt: 1 + 0, 0, 1 + 1, 0 + 2 in every layer
    assert [layer.neurons for layer in plan.layers] == [(0, 2, 4), (0, 1, 3)]
    assert [layer.heads for layer in plan.layers] == [(1, 2)] * 2  # the best of (1, 2) and of (3, sqrt 2)
    plan.require_fits("llama", SOURCE)


def test_fewer_groups_keep_the_one_whose_heads_matter_most_together() -> None:
    scores = torch.tensor([5.0, 0.0, 3.0, 2.5])
    target = SOURCE.model_copy(update={"heads": 2, "kv_heads": 1})
    assert keep_heads(scores, SOURCE, target) == (2, 3)
    assert keep_heads(scores, SOURCE, SOURCE.model_copy(update={"heads": 1, "kv_heads": 1})) == (2,)


def test_ties_go_to_the_lowest_index() -> None:
    assert strongest(torch.tensor([1.0, 2.0, 2.0, 2.0, 1.0]), 2) == (1, 2)
    assert strongest(torch.zeros(100), 30) == tuple(range(30))
    plan = decide(record([0.5, 0.5, 0.5]), SOURCE.model_copy(update={"layers": 2}), family="llama", source=SOURCE,
                  head_dim=2)  # fmt: skip
    assert [layer.layer for layer in plan.layers] == [0, 1]


@given(st.data())
def test_groups_shrink_equally(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    source = SOURCE.model_copy(update={"heads": kv_heads * group, "kv_heads": kv_heads})
    fewer, smaller = data.draw(st.integers(1, kv_heads)), data.draw(st.integers(1, group))
    target = source.model_copy(update={"heads": fewer * smaller, "kv_heads": fewer})
    scores = torch.tensor(data.draw(st.lists(st.floats(0, 9), min_size=source.heads, max_size=source.heads))).double()
    kept = keep_heads(scores, source, target)
    assert list(kept) == sorted(set(kept))
    counts = [sum(head // group == index for head in kept) for index in range(kv_heads)]
    assert sorted(counts) == [0] * (kv_heads - fewer) + [smaller] * fewer
    for index, count in enumerate(counts):
        if count:  # no head that went was better than one that stayed beside it
            own = range(index * group, (index + 1) * group)
            gone = [float(scores[head]) for head in own if head not in kept]
            assert not gone or max(gone) <= min(float(scores[head]) for head in own if head in kept)
