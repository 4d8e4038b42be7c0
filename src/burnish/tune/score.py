"""Scores of a generated answer against the right one: objectives that have no gradient."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles.

    Examples:
        >>> normalized("The answer: a cat!")
        ['answer', 'cat']

    Source: Rajpurkar et al., SQuAD, arXiv 1606.05250, its evaluation script.
    """
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def exact_match(found: str, right: str) -> float:
    """1 where both are the same words, else 0."""
    return float(normalized(found) == normalized(right))


def f1(found: str, right: str) -> float:
    """Harmonic mean of the share of found words that are right and the share of right words that are found.

    Examples:
        >>> f1("a black cat", "the cat sat")
        0.5

    Source: as `normalized`; two answers without words are equal.
    """
    words, wanted = normalized(found), normalized(right)
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


SCORES: dict[str, Callable[[str, str], float]] = {"exact-match": exact_match, "f1": f1}
