"""Penalties of `--optimizer proxgen` by name."""

from __future__ import annotations

from collections.abc import Callable

from burnish.penalties import GroupLasso, Lq, Penalty

PENALTIES: dict[str, Callable[[float], Penalty]] = {
    "l0": lambda strength: Lq(0.0, strength),
    "l1/2": lambda strength: Lq(1 / 2, strength),
    "l2/3": lambda strength: Lq(2 / 3, strength),
    "l1": lambda strength: Lq(1.0, strength),
    "group-lasso": GroupLasso,
}
OPTIONS = ("penalty", "penalty_strength")
DEFAULTS = {"penalty": "l1", "penalty_strength": 1e-4}


def penalty(name: str, strength: float) -> Penalty:
    """The penalty of a name.

    Raises:
        ValueError: the name is unknown, or the strength negative.
    """
    if name not in PENALTIES:
        raise ValueError(f"penalty={name!r}: choose one of {', '.join(PENALTIES)}")
    return PENALTIES[name](strength)
