"""Scores of answers: worked examples of SQuAD's rules."""

from __future__ import annotations

import pytest

from burnish.tune.score import exact_match, f1


@pytest.mark.parametrize(
    ("found", "right", "exact", "overlap"),
    [
        ("The Cat!", "a cat", 1.0, 1.0),
        ("cat", "dog", 0.0, 0.0),
        ("black cat", "cat", 0.0, 2 / 3),  # precision 1/2, recall 1
        ("cat", "black fat cat", 0.0, 1 / 2),  # precision 1, recall 1/3
        ("b b c", "b d", 0.0, 2 / 5),  # a word counts as often as both have it
        ("anthem", "them", 0.0, 0.0),  # articles are words, not letters
        ("", "cat", 0.0, 0.0),
        ("the", "", 1.0, 1.0),
    ],
)
def test_worked_examples(found: str, right: str, exact: float, overlap: float) -> None:
    assert exact_match(found, right) == exact
    assert f1(found, right) == pytest.approx(overlap)
    assert f1(right, found) == pytest.approx(overlap)
