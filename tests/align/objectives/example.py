"""The worked pair that all tests of objectives share: its log-ratios are 1 and -0.5, its margin 1.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from burnish.align.objectives.pairs import input_names, other

NUMBERS = {
    "chosen_logps": -12.0,
    "rejected_logps": -14.0,
    "ref_chosen_logps": -13.0,
    "ref_rejected_logps": -13.5,
    "chosen_lengths": 4.0,
    "rejected_lengths": 6.0,
    "chosen_rewards": 1.7,
    "rejected_rewards": 0.5,
}


def pair(**changes: float) -> dict[str, Tensor]:
    """The pair as a batch of one, float64; what a model computes takes gradients."""
    numbers = {**NUMBERS, **changes}
    return {
        name: torch.tensor([number], dtype=torch.float64, requires_grad=name in ("chosen_logps", "rejected_logps"))
        for name, number in numbers.items()
    }


def of(loss: Callable[..., Tensor], available: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The loss of what it asks for."""
    return loss(**{name: available[name] for name in input_names(loss)}, **options)


def value(loss: Callable[..., Tensor], /, *, changes: Mapping[str, float] = {}, **options: Any) -> float:
    """The loss of the pair."""
    return of(loss, pair(**changes), **options).item()


def slopes(loss: Callable[..., Tensor], /, *, changes: Mapping[str, float] = {}, **options: Any) -> tuple[float, float]:
    """Derivatives with respect to the log-probability of the chosen and of the rejected answer."""
    inputs = pair(**changes)
    found = torch.autograd.grad(
        of(loss, inputs, **options).sum(), [inputs["chosen_logps"], inputs["rejected_logps"]], materialize_grads=True
    )
    return found[0].item(), found[1].item()


def at_margin(loss: Callable[..., Tensor], margin: float, **options: Any) -> float:
    """The loss of a pair whose reference is indifferent, as a function of the margin alone."""
    changes = {"chosen_logps": margin - 14.0, "ref_chosen_logps": -13.5}
    return value(loss, changes=changes, **options)


def random_pairs(seed: int, batch: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Pairs of every length with everything that pair losses ask for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)).to(dtype)

    sides = ("chosen", "rejected")
    found = {f"{side}_lengths": draw(1, 30).round() for side in sides}
    found |= {f"{side}_logps": draw(-40, -1) for side in sides}
    found |= {f"ref_{side}_logps": draw(-40, -1) for side in sides}
    found |= {f"{side}_rewards": draw(-3, 3) for side in sides}
    return found | {"similarity": draw(-1, 1), "reliability": draw(0.55, 0.95)}


def swapped(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same pairs with the answers exchanged."""
    return {name: inputs[other(name)] for name in inputs}
