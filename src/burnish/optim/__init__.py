"""Optimizers for any training loop, with gradients and without. Importing it is light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.optim.adamw_schedule_free import AdamWScheduleFree as AdamWScheduleFree
    from burnish.optim.amuse import AMUSE as AMUSE
    from burnish.optim.block_diagonal import BlockDiagonal as BlockDiagonal
    from burnish.optim.block_diagonal import SpectrumClip as SpectrumClip
    from burnish.optim.mezo import MeZO as MeZO
    from burnish.optim.mezo_bcd import MeZOBCD as MeZOBCD
    from burnish.optim.muon import Muon as Muon
    from burnish.optim.normuon import NorMuon as NorMuon
    from burnish.optim.orthogonalization import orthogonalize as orthogonalize
    from burnish.optim.proxgen import ProxGen as ProxGen
    from burnish.optim.radam_schedule_free import RAdamScheduleFree as RAdamScheduleFree
    from burnish.optim.routing import param_groups as param_groups
    from burnish.optim.routing import split_parameters as split_parameters
    from burnish.optim.sgd_schedule_free import SGDScheduleFree as SGDScheduleFree

_HOMES = {
    "AMUSE": "amuse",
    "AdamWScheduleFree": "adamw_schedule_free",
    "BlockDiagonal": "block_diagonal",
    "MeZO": "mezo",
    "MeZOBCD": "mezo_bcd",
    "Muon": "muon",
    "NorMuon": "normuon",
    "orthogonalize": "orthogonalization",
    "ProxGen": "proxgen",
    "RAdamScheduleFree": "radam_schedule_free",
    "SGDScheduleFree": "sgd_schedule_free",
    "SpectrumClip": "block_diagonal",
    "param_groups": "routing",
    "split_parameters": "routing",
}
__all__ = [
    "AMUSE",
    "AdamWScheduleFree",
    "BlockDiagonal",
    "MeZO",
    "MeZOBCD",
    "Muon",
    "NorMuon",
    "ProxGen",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "SpectrumClip",
    "orthogonalize",
    "param_groups",
    "split_parameters",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"burnish.optim.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'burnish.optim' has no attribute {name!r}")
