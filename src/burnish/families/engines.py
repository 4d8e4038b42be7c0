"""Which engines were really tried with which student class, and what stands in the way of the others.

Facts with a date, not predictions: an absent row means untested. The slow tests of `tests/densify/test_real_model.py`
are where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ENGINES = ("transformers 5", "transformers 4", "vLLM", "llama.cpp")
Engine = Literal["transformers 5", "transformers 4", "vLLM", "llama.cpp"]


@dataclass(frozen=True)
class Trial:
    """One engine with one class: whether it gave the same result, with which version, when, and what to know."""

    works: bool
    version: str
    date: str
    note: str = ""


TRIALS: dict[tuple[str, str], Trial] = {}


def tried(engine: str, architecture: str) -> str:
    """A cell of the support matrix: "yes (version)", "no: reason", or "untested"."""
    trial = TRIALS.get((engine, architecture))
    if trial is None:
        return "untested"
    return f"yes ({trial.version})" if trial.works else f"no ({trial.version}): {trial.note}"
