"""Importance by closed forms: worked examples, padding, heads, and the identity layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.prune import ActivationStatistics, LayerStatistics
from burnish.prune.score import block_influence, head_importance, hidden_importance, neuron_importance
from burnish.prune.statistics import cosine_sum, magnitude_squares


def record(**sums: Tensor) -> LayerStatistics:
    empty = dict.fromkeys(("neurons", "head_channels", "attention_channels", "feed_forward_channels"), torch.zeros(2))
    counts = {"num_sequences": torch.tensor(1), "num_tokens": torch.tensor(1), "cosine_sum": torch.tensor(0.0)}
    return LayerStatistics(**{**empty, **counts, **sums})


def test_the_worked_example_of_a_neuron() -> None:
    activations = torch.tensor([[[1.0], [-3.0]], [[2.0], [2.0]]])  # two sequences of two tokens
    sums = magnitude_squares(activations, torch.ones(2, 2, dtype=torch.bool))
    assert float(neuron_importance(record(neurons=sums))) == pytest.approx(2.8284271247461903, rel=1e-15)


def test_the_worked_example_of_a_layer() -> None:
    before, after = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    total = cosine_sum(before, after, torch.ones(1, 1, dtype=torch.bool))
    assert block_influence(record(cosine_sum=total)) == pytest.approx(0.2928932188134524, rel=1e-12)


def test_a_layer_that_only_scales_has_no_influence_and_one_that_reverses_has_two() -> None:
    states = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    live = torch.ones(3, 5, dtype=torch.bool)
    for factor, expected in ((2.5, 0.0), (-1.0, 2.0)):
        sums = record(cosine_sum=cosine_sum(states, factor * states, live), num_tokens=live.sum())
        assert block_influence(sums) == pytest.approx(expected, abs=1e-12)


def test_a_head_is_the_length_of_its_channels() -> None:
    squares = torch.tensor([9.0, 16.0, 0.0, 25.0, 1.0, 0.0]).double()
    assert head_importance(record(head_channels=squares), 2).tolist() == [5.0, 5.0, 1.0]
    assert head_importance(record(head_channels=squares), 3).tolist() == [5.0, 26.0**0.5]


def test_hidden_channels_add_up_over_norms_and_layers_after_the_root() -> None:
    one = record(attention_channels=torch.tensor([4.0, 0.0]), feed_forward_channels=torch.tensor([9.0, 1.0]))
    two = record(attention_channels=torch.tensor([1.0, 16.0]), feed_forward_channels=torch.tensor([0.0, 0.0]))
    assert hidden_importance(ActivationStatistics({0: one, 1: two})).tolist() == [6.0, 5.0]


def test_padding_counts_for_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(3, 6, 4, generator=generator)
    live = torch.ones(3, 6, dtype=torch.bool)
    live[1, 2:], live[2] = False, False
    parts = [activations[:1], activations[1:2, :2]]
    expected = sum(part.double().abs().mean(dim=1).square().sum(dim=0) for part in parts)
    torch.testing.assert_close(magnitude_squares(activations, live), expected, rtol=1e-14, atol=0)
    other = torch.randn(3, 6, 4, generator=generator)
    cosines = torch.nn.functional.cosine_similarity(activations.double(), other.double(), dim=-1)
    torch.testing.assert_close(cosine_sum(activations, other, live), cosines[live].sum(), rtol=1e-14, atol=1e-14)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(2))
    live = torch.rand(2, 50, generator=torch.Generator().manual_seed(3)) > 0.3
    whole = magnitude_squares(states, live), cosine_sum(states, states.roll(1, 1), live)
    monkeypatch.setattr("burnish.prune.statistics.DOUBLE_BYTES", {"cpu": 8 * 8 * 3})
    pieces = magnitude_squares(states, live), cosine_sum(states, states.roll(1, 1), live)
    torch.testing.assert_close(pieces, whole, rtol=1e-14, atol=1e-14)
