"""Numbers as people write them, and random states that survive other libraries."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from burnish.runs.randomness import random_state_kept
from burnish.runs.units import parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("4B", 4 * 10**9), ("1.5M", 1_500_000), ("300k", 300_000), ("1_246_592", 1_246_592), (7, 7), ("2T", 2 * 10**12)],
)
def test_counts(text: str | int, count: int) -> None:
    assert parse_count(text, "tokens") == count


@pytest.mark.parametrize("text", ["", "0", "-1", "4GB", "M", "1e6", "four", "1.5.2M"])
def test_what_is_no_count_is_refused_with_its_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"tokens='{text}': write a positive number"):
        parse_count(text, "tokens")


def test_u12_2_random_states_are_kept_even_when_it_fails() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    with pytest.raises(KeyError), random_state_kept():
        random.seed(2), numpy.random.seed(2), torch.manual_seed(2)
        raise KeyError
    assert draw() == expected
