"""Align a model with preferences: distributions learned from pairs, offline and on-policy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from burnish.doors import make_callable
from burnish.errors import BurnishError

if TYPE_CHECKING:
    from burnish.align.objectives import OBJECTIVES as OBJECTIVES
    from burnish.align.objectives import objective as objective
    from burnish.align.options import RoundOptions as RoundOptions
    from burnish.align.policy import Policy as Policy
    from burnish.align.rounds import OnPolicyRounds as OnPolicyRounds
    from burnish.align.train import AlignResult as AlignResult
    from burnish.align.train import align as align
    from burnish.align.trainer import PreferenceTrainer as PreferenceTrainer

# Loaded on first use: the laboratory and the objectives need no trainer, whose import takes seconds.
_PLACES = {
    "AlignResult": "train",
    "OBJECTIVES": "objectives",
    "OnPolicyRounds": "rounds",
    "Policy": "policy",
    "PreferenceTrainer": "trainer",
    "RoundOptions": "options",
    "align": "train",
    "objective": "objectives",
}
__all__ = [
    "OBJECTIVES",
    "AlignResult",
    "OnPolicyRounds",
    "Policy",
    "PreferenceTrainer",
    "RoundOptions",
    "align",
    "objective",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        try:
            return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name == "trl":
                raise BurnishError('alignment needs the package trl: pip install "burnish[align]"') from error
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


make_callable(__name__)
