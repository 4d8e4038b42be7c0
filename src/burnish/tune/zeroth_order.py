"""Optimizers of forward passes, built for a model from the options of the command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from burnish.optim.mezo import MeZO
from burnish.optim.mezo_bcd import MeZOBCD
from burnish.optim.perturbation import perturbation
from burnish.optim.table import OPTIMIZERS

OPTIONS = ("eps", "queries", "perturbation")
BLOCK_OPTIONS = ("blocks", "order", "interval")
DEFAULTS = {"queries": 1, "perturbation": "gaussian", "order": "random", "interval": 100}
STEPS = 20_000
"""Of the published runs."""
EPS = {False: 1e-3, True: 1e-2}
"""For all weights of a model, and for LoRA."""
LR = {("mezo", False): 1e-6, ("mezo", True): 5e-5, ("mezo-bcd", False): 1e-5, ("mezo-bcd", True): 5e-4}


def is_forward_only(optimizer: str) -> bool:
    """Whether an optimizer needs no gradients."""
    return optimizer in OPTIMIZERS and OPTIMIZERS[optimizer].forward_only


def has_blocks(optimizer: str) -> bool:
    """Whether it moves one block of weights at a time."""
    return is_forward_only(optimizer) and issubclass(OPTIMIZERS[optimizer].load(), MeZOBCD)


def zeroth_order(model: nn.Module, options: Mapping[str, Any], **more: Any) -> MeZO:
    """The optimizer of a model's tensors that require grad.

    Args:
        model: with its adapters, if it has some.
        options: of the verb.
        more: further options of the class: `log`, `base`, `process_group`.

    Raises:
        ValueError: an option out of range; a pattern of blocks that matches nothing.
    """
    chosen = {name: options[name] for name in ("lr", "weight_decay", "seed", "eps", "queries")}
    chosen["perturbation"] = perturbation(options["perturbation"])
    if has_blocks(options["optimizer"]):
        chosen |= {name: options[name] for name in BLOCK_OPTIONS}
    return cast(Any, OPTIMIZERS[options["optimizer"]].load())(model, **chosen, **more)  # type: ignore[no-any-return]
