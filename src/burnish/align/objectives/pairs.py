"""Losses made of a pair loss in both orders of its answers: soft labels, and what else needs the swap."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

PairLoss = Callable[..., Tensor]
"""A loss [batch] whose inputs are named by their answer: `chosen_...`, `rejected_...`, `ref_chosen_...`."""


def input_names(loss: Callable[..., Tensor]) -> tuple[str, ...]:
    """Names of what a loss is computed from: its positional parameters, in order."""
    return tuple(one.name for one in inspect.signature(loss).parameters.values() if one.kind is not one.KEYWORD_ONLY)


def other(name: str) -> str:
    """The input that takes this one's place when the answers are exchanged; what belongs to neither keeps its own."""
    if "chosen" in name:
        return name.replace("chosen", "rejected")
    return name.replace("rejected", "chosen")


def in_both_orders(
    loss: PairLoss, extra: str, combine: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[..., Tensor]:
    """A function of the inputs of `loss` and of one more [batch]: what `combine` makes of both orders and of it.

    Args:
        loss: its options stay options; inputs that it has for one of the answers alone are asked for both.
        extra: name of the further input, which follows those of `loss`.
        combine: (loss as given, loss with the answers exchanged, the further input) -> Tensor `[batch]`.
    """
    own = inspect.signature(loss)
    options = [one for one in own.parameters.values() if one.kind is one.KEYWORD_ONLY]
    names = input_names(loss)
    asked = dict.fromkeys([*names, *map(other, names), extra])
    inputs = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor") for name in asked]
    signature = own.replace(parameters=[*inputs, *options])

    @functools.wraps(loss)
    def combined(*positional: Tensor, **named: Any) -> Tensor:
        given = signature.bind(*positional, **named).arguments
        settings = {option.name: given[option.name] for option in options if option.name in given}
        kept = loss(**{name: given[name] for name in names}, **settings)
        flipped = loss(**{name: given[other(name)] for name in names}, **settings)
        return combine(kept, flipped, given[extra])

    combined.__signature__ = signature  # type: ignore[attr-defined]
    return combined


def mixture(loss: PairLoss) -> Callable[..., Tensor]:
    """`loss` with one more input, `labels` [batch]: the probability that the chosen answer is the better one.

    labels loss(chosen, rejected) + (1 - labels) loss(rejected, chosen), the mean over labels drawn with it. Of `pmle`
    this is preference distillation.

    Examples:
        >>> import torch
        >>> from burnish.align.objectives import dpo
        >>> logps = torch.tensor([[-12.0], [-14.0], [-13.0], [-13.5]])
        >>> round(mixture(dpo)(*logps, torch.tensor([0.9])).item(), 6)
        0.635957
    """
    return in_both_orders(loss, "labels", lambda kept, flipped, labels: labels * kept + (1 - labels) * flipped)
