"""Regularisers with their proximal maps, exact in the metric of a diagonal preconditioner. Importing it is light."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.penalties.box import Box as Box
    from burnish.penalties.group_lasso import GroupLasso as GroupLasso
    from burnish.penalties.l0_ball import L0Ball as L0Ball
    from burnish.penalties.lq import Lq as Lq
    from burnish.penalties.nuclear import Nuclear as Nuclear
    from burnish.penalties.penalty import Penalty as Penalty
    from burnish.penalties.penalty import mean_loss_strength as mean_loss_strength
    from burnish.penalties.quantized import NearQuantized as NearQuantized
    from burnish.penalties.wells import Wells as Wells
    from burnish.penalties.wells import uniform_levels as uniform_levels
    from burnish.penalties.zeros import sparsity as sparsity

_HOMES = {
    "Box": "box",
    "GroupLasso": "group_lasso",
    "L0Ball": "l0_ball",
    "Lq": "lq",
    "NearQuantized": "quantized",
    "Nuclear": "nuclear",
    "Penalty": "penalty",
    "Wells": "wells",
    "mean_loss_strength": "penalty",
    "sparsity": "zeros",
    "uniform_levels": "wells",
}
KINDS = ("Box", "GroupLasso", "L0Ball", "Lq", "NearQuantized", "Nuclear", "Wells")
__all__ = [
    "Box",
    "GroupLasso",
    "L0Ball",
    "Lq",
    "NearQuantized",
    "Nuclear",
    "Penalty",
    "Wells",
    "mean_loss_strength",
    "restore",
    "sparsity",
    "uniform_levels",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"burnish.penalties.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'burnish.penalties' has no attribute {name!r}")


def restore(plain: Mapping[str, Any]) -> Penalty:
    """The penalty that `Penalty.to_dict` wrote; one of your own if the module that defines it was imported.

    Raises:
        ValueError: the kind is unknown, or an option is.
    """
    options = dict(plain)
    kind = options.pop("kind", None)
    found = __getattr__(kind) if kind in KINDS else _own(kind)
    if found is None:
        raise ValueError(f"penalty kind={kind!r} is unknown: one of {', '.join(KINDS)}, or import what defines it")
    try:
        penalty: Penalty = found(**options)
    except TypeError as error:
        raise ValueError(f"penalty {dict(plain)}: {error}") from None
    return penalty


def _own(kind: Any) -> Any:
    from burnish.penalties.penalty import Penalty

    return next((one for one in Penalty.__subclasses__() if one.__name__ == kind), None)
