"""Which completions of a round are compared, and the rows that follow from their labels. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from burnish.align.assess import pairs_log_det, stacked
from burnish.align.design import Design, g_optimal_design, pair_differences

Row = dict[str, Any]
"""A line of a file: a prompt with its completions, or what belongs to one."""


class Pair(NamedTuple):
    """Two completions of one prompt, by their numbers."""

    prompt: int
    first: int
    second: int


def disjoint_pairs(num_prompts: int, num_samples: int) -> list[Pair]:
    """Pairs that share no completion: the first with the second, the third with the fourth, of every prompt."""
    return [Pair(prompt, at, at + 1) for prompt in range(num_prompts) for at in range(0, num_samples - 1, 2)]


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int]:
    """The places of the largest and of the smallest reward; of equal ones the first is best and the last is worst.

    Source: RLHFlow/Online-RLHF pairs the best with the worst of 8.
    """
    order = sorted(range(len(rewards)), key=lambda place: -rewards[place])
    return order[0], order[-1]


def designed_pairs(features: Tensor, count: int, generator: torch.Generator) -> tuple[list[Pair], Design]:
    """Pairs drawn from the G-optimal design over all pairs of all prompts, and the design.

    Args:
        features: Tensor `[prompts, k, d]`, float64.
        count: pairs to draw; one of large weight comes up more than once.
        generator: of the draws.

    Source: arXiv 2601.08421 names a preferential G-optimal design; see `burnish.align.design`.
    """
    differences, places = pair_differences(features)
    design = g_optimal_design(differences)
    return [Pair(*place) for place in places[design.sample(count, generator)].tolist()], design


def choose_pairs(
    sampler: str, labels: str, scores: Sequence[Row], num_samples: int, generator: torch.Generator
) -> tuple[list[Pair], Design | None]:
    """The pairs of a round, and the design that they were drawn from.

    Args:
        sampler, labels: see `RoundOptions`.
        scores: of each prompt, with `rewards` or `features` where they are needed.
        num_samples: completions of each prompt.
        generator: of draws from a design.
    """
    count = len(scores)
    if labels == "best-worst":
        return [Pair(at, *best_and_worst(score["rewards"])) for at, score in enumerate(scores)], None
    if sampler not in ("design", "hybrid"):
        return disjoint_pairs(count, num_samples), None
    features = stacked(scores, "features")
    assert features is not None
    designed = count if sampler == "design" else count // 2
    found, design = designed_pairs(features, designed, generator)
    return [*disjoint_pairs(count - designed, 2), *found], design


def preferred_first(pair: Pair, label: float) -> tuple[Pair, float]:
    """The pair with the completion first that is preferred, and its label, at least one half."""
    if label >= 0.5:
        return pair, label
    return Pair(pair.prompt, pair.second, pair.first), 1 - label


def is_equal(pair: Pair, samples: Sequence[Row]) -> bool:
    """Whether both completions are the same tokens: such a pair says nothing."""
    branches = samples[pair.prompt]["branch_ids"]
    return bool(branches[pair.first] == branches[pair.second])


def rewards_of_pairs(pairs: Iterable[Pair], scores: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Rewards of the first and of the second completion, Tensors `[pairs]`, float64."""
    rewards = [[scores[pair.prompt]["rewards"][place] for place in pair[1:]] for pair in pairs]
    first, second = torch.tensor(rewards, dtype=torch.float64).unbind(1)
    return first, second


def tree(sample: Row, score: Row, places: Sequence[int]) -> Row:
    """A prompt with some of its completions, as a row to train on."""
    names = [name for name in ("rewards", "ref_logps") if name in score]
    return {
        "prompt_ids": sample["prompt_ids"],
        "branch_ids": [sample["branch_ids"][place] for place in places],
        **{name: [score[name][place] for place in places] for name in names},
    }


def pair_rows(
    pairs: Sequence[Pair], labels: Sequence[float], samples: Sequence[Row], scores: Sequence[Row]
) -> list[Row]:
    """Rows to train on, what is preferred first."""
    rows = []
    for pair, label in zip(pairs, labels, strict=True):
        turned, certainty = preferred_first(pair, label)
        row = tree(samples[pair.prompt], scores[pair.prompt], turned[1:])
        rows.append(row | {"label": certainty})
    return rows


def about_pairs(
    pairs: Sequence[Pair], labels: Sequence[float], samples: Sequence[Row], scores: Sequence[Row], unit: float | None
) -> dict[str, float]:
    """What is told of the pairs of a round.

    Args:
        pairs: all that were chosen.
        labels: of the rows that came of them.
        samples, scores: of the round.
        unit: of `variance_unit`; None where there are no features.

    Returns:
        `pairs`, `equal_pairs`, `certainty` (the mean label, of what is preferred) and `pairs_log_det`.
    """
    told = {
        "pairs": float(len(pairs)),
        "equal_pairs": float(sum(is_equal(pair, samples) for pair in pairs)),
        "certainty": sum(labels) / len(labels),
    }
    features = stacked(scores, "features")
    if features is None or unit is None:
        return told
    prompt, first, second = torch.tensor(pairs).unbind(1)
    return told | {"pairs_log_det": pairs_log_det(features[prompt, first] - features[prompt, second], unit)}
