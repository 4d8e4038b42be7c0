"""Which completions are compared, and the rows that come of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.align.assess import pairs_log_det
from burnish.align.pairs import (
    Pair,
    about_pairs,
    best_and_worst,
    choose_pairs,
    designed_pairs,
    disjoint_pairs,
    is_equal,
    pair_rows,
    preferred_first,
    rewards_of_pairs,
    tree,
)

SAMPLES: list[dict[str, Any]] = [
    {"prompt_ids": [1, 7], "branch_ids": [[4, 2], [5, 2], [6, 2]]},
    {"prompt_ids": [1, 8], "branch_ids": [[9], [9], [9, 2]]},
]
SCORES: list[dict[str, Any]] = [
    {"ref_logps": [-1.0, -2.0, -3.0], "rewards": [0.0, 3.0, 1.0], "features": [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]},
    {"ref_logps": [-4.0, -5.0, -6.0], "rewards": [5.0, 5.0, 4.0], "features": [[2.0, 2.0], [2.0, 2.0], [2.1, 2.0]]},
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_disjoint_pairs_share_no_completion() -> None:
    assert disjoint_pairs(2, 2) == [(0, 0, 1), (1, 0, 1)]
    assert disjoint_pairs(1, 5) == [(0, 0, 1), (0, 2, 3)]


def test_best_and_worst_of_equal_ones() -> None:
    assert best_and_worst([1.0, 3.0, 2.0]) == (1, 0)
    assert best_and_worst([2.0, 2.0, 1.0, 1.0]) == (0, 3)
    assert best_and_worst([1.0, 1.0]) == (0, 1)


def test_a_design_draws_the_triangle_evenly_and_leaves_pairs_of_little_information_out() -> None:
    """Features 0, e1, e2: all three pairs with weight 1/3, every leverage 2; the other prompt's pairs are short."""
    features = torch.tensor([score["features"] for score in SCORES], dtype=torch.float64)
    pairs, design = designed_pairs(features, 3000, generator())
    counts = [pairs.count(Pair(0, *places)) for places in ((0, 1), (0, 2), (1, 2))]
    assert sum(counts) == 3000 and all(abs(count - 1000) < 4 * 26 for count in counts)
    assert design.rank == 2 and design.leverage == pytest.approx(2.0, rel=0.02)


def test_each_sampler_chooses_its_pairs() -> None:
    assert choose_pairs("policy", "hard", SCORES, 3, generator()) == ([(0, 0, 1), (1, 0, 1)], None)
    assert choose_pairs("policy", "best-worst", SCORES, 3, generator()) == ([(0, 1, 0), (1, 0, 2)], None)
    pairs, design = choose_pairs("design", "soft", SCORES * 10, 3, generator())
    assert len(pairs) == 20 and design is not None and {pair.prompt % 2 for pair in pairs} == {0}
    pairs, design = choose_pairs("hybrid", "soft", SCORES * 10, 3, generator())
    assert pairs[:10] == disjoint_pairs(10, 2) and len(pairs) == 20
    assert {pair.prompt % 2 for pair in pairs[10:]} == {0} and design is not None


def test_what_is_preferred_comes_first_with_its_rewards_and_reference() -> None:
    assert preferred_first(Pair(0, 1, 2), 0.5) == ((0, 1, 2), 0.5)
    rows = pair_rows([Pair(0, 0, 1), Pair(1, 0, 2)], [0.25, 0.9], SAMPLES, SCORES)
    assert rows[0] == {"prompt_ids": [1, 7], "branch_ids": [[5, 2], [4, 2]], "rewards": [3.0, 0.0],
                       "ref_logps": [-2.0, -1.0], "label": 0.75}  # fmt: skip
    assert rows[1] == {"prompt_ids": [1, 8], "branch_ids": [[9], [9, 2]], "rewards": [5.0, 4.0],
                       "ref_logps": [-4.0, -6.0], "label": 0.9}  # fmt: skip
    whole = tree(SAMPLES[0], {"ref_logps": [-1.0, -2.0, -3.0]}, range(3))
    assert whole == {"prompt_ids": [1, 7], "branch_ids": [[4, 2], [5, 2], [6, 2]], "ref_logps": [-1.0, -2.0, -3.0]}


def test_rewards_of_pairs_are_in_their_order() -> None:
    first, second = rewards_of_pairs([Pair(0, 2, 1), Pair(1, 1, 2)], SCORES)
    assert (first.tolist(), second.tolist()) == ([1.0, 5.0], [3.0, 4.0])


def test_what_is_told_of_pairs() -> None:
    pairs = [Pair(0, 0, 1), Pair(0, 0, 2), Pair(1, 0, 1)]
    assert [is_equal(pair, SAMPLES) for pair in pairs] == [False, False, True]
    told = about_pairs(pairs, [0.5, 1.0], SAMPLES, SCORES, 0.25)
    assert told == {
        "pairs": 3.0,
        "equal_pairs": 1.0,
        "certainty": 0.75,
        # V = diag(1, 1) / 6
        "pairs_log_det": pytest.approx(2 * torch.tensor(1 + (1 / 6) / 0.25, dtype=torch.float64).log().item()),
    }
    assert "pairs_log_det" not in about_pairs(pairs, [0.5, 1.0], SAMPLES, SCORES, None)
    z = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    assert told["pairs_log_det"] == pairs_log_det(z, 0.25)
