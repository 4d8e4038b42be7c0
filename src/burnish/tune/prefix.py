"""Layers below the one whose weights are displaced give the same states in every evaluation: run them once.

Source: ours; the evaluations of a step differ only in the active block, so that the result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from burnish.training.head import decoder


@dataclass
class _Seen:
    """What the layers gave in the first evaluation: states of the last of them, and what else each returned."""

    states: Any = None
    rest: dict[int, tuple[Any, ...]] = field(default_factory=dict)


class PrefixReuse:
    """Evaluations of one batch that differ from some layer on.

    Args:
        model: a causal language model whose decoder is a list of layers, each handing its states to the next.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = _layers(model)

    def first_moved(self, tensors: Collection[Tensor]) -> int:
        """The first layer whose output depends on these tensors; 0 where they are not all in layers."""
        wanted, found = {id(tensor) for tensor in tensors}, []
        for number, layer in enumerate(self.layers):
            here = {id(tensor) for tensor in layer.parameters()} & wanted
            if here:
                found.append(number)
                wanted -= here
        return min(found) if found and not wanted else 0

    @contextmanager
    def below(self, first: int) -> Iterator[None]:
        """Within, the layers before number `first` run in the first evaluation only."""
        below, seen = self.layers[:first], _Seen()
        before = [vars(layer).get("forward") for layer in below]  # put there by another library
        try:
            for number, layer in enumerate(below):
                layer.forward = _once(layer.forward, number, number == first - 1, seen)
            yield
        finally:
            for layer, own in zip(below, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own

    @torch.no_grad()
    def holds(self, input_ids: Tensor) -> bool:
        """Whether states computed with and without the layers below are equal, bit for bit.

        Args:
            input_ids: Tensor `[batch, seq]`, int64; a few tokens are enough.
        """

        def states() -> Tensor:
            found: Tensor = decoder(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state
            return found

        expected = states()
        for first in {1, len(self.layers) // 2, len(self.layers) - 1, len(self.layers)} - {0}:
            with self.below(first):
                if not (torch.equal(states(), expected) and torch.equal(states(), expected)):
                    return False
        return True


def prefix_reuse(model: PreTrainedModel, input_ids: Tensor) -> PrefixReuse | None:
    """Reuse for a model, or None where its layers are not found or do more than hand states to the next.

    Args:
        model: in evaluation mode.
        input_ids: as for `PrefixReuse.holds`.
    """
    reuse = PrefixReuse(model)
    try:
        return reuse if reuse.layers and reuse.holds(input_ids) else None
    except (TypeError, IndexError, AttributeError):  # layers that are called or answer in a way of their own
        return None


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [module for module in decoder(model).modules() if isinstance(module, nn.ModuleList)]
    return next((list(found) for found in lists if len(found) == count), [])


def _once(forward: Callable[..., Any], number: int, last: bool, seen: _Seen) -> Callable[..., Any]:
    """A layer's forward that runs in the first evaluation and hands on what is known in the others."""

    def run(*args: Any, **options: Any) -> Any:
        if seen.states is not None:
            states = seen.states if last else args[0] if args else options["hidden_states"]
            return (states, *seen.rest[number]) if number in seen.rest else states
        output = forward(*args, **options)
        states = output
        if isinstance(output, tuple):
            states, seen.rest[number] = output[0], output[1:]
        if last:
            seen.states = states
        return output

    return run
