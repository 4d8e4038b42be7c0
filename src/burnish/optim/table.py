"""The optimizers by name: what `--optimizer` offers, and how each is built for a model."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer.

    Attributes:
        home: module and class.
        description: one line.
        source: the paper.
        averaged: the model to evaluate and save is an average; it needs no schedule, and refuses one.
        matrix_rule: weight matrices are orthogonalised.
        warmup: it warms up by itself, over `warmup_steps`.
        least_warmup: steps that it needs at least.
        forward_only: it takes a closure that returns a loss, and no gradient.
        options: what a command sets besides lr and weight decay: a scale that takes an AdamW user's numbers, a rho that
            suits a short warmup.
    """

    home: str
    description: str
    source: str
    averaged: bool = False
    matrix_rule: bool = False
    warmup: bool = False
    least_warmup: int = 0
    forward_only: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> type[torch.optim.Optimizer]:
        """The class."""
        module, _, name = self.home.partition(":")
        found: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), name)
        return found


OPTIMIZERS: dict[str, OptimizerInfo] = {
    "amuse": OptimizerInfo(
        "burnish.optim.amuse:AMUSE",
        "Muon without a schedule: the averaged model is usable at every step",
        "arXiv 2605.22432",
        averaged=True,
        matrix_rule=True,
        warmup=True,
        least_warmup=2,
        # A verb's warmup is short, and with the released 0.8 the average then spans too few steps (measured).
        options={"rho": 0.2},
    ),
    "muon": OptimizerInfo(
        "burnish.optim.muon:Muon",
        "orthogonalised momentum for weight matrices, AdamW for the rest",
        "K. Jordan et al. 2024; arXiv 2502.16982",
        matrix_rule=True,
        options={"scale": "match_rms_adamw"},
    ),
    "normuon": OptimizerInfo(
        "burnish.optim.normuon:NorMuon",
        "Muon whose rows are brought to one length",
        "arXiv 2510.05491",
        matrix_rule=True,
        options={"scale": "match_rms_adamw"},
    ),
    "adamw-schedule-free": OptimizerInfo(
        "burnish.optim.adamw_schedule_free:AdamWScheduleFree",
        "AdamW without a schedule",
        "arXiv 2405.15682",
        averaged=True,
        warmup=True,
    ),
    "radam-schedule-free": OptimizerInfo(
        "burnish.optim.radam_schedule_free:RAdamScheduleFree",
        "RAdam without a schedule and without warmup",
        "arXiv 2405.15682",
        averaged=True,
    ),
    "sgd-schedule-free": OptimizerInfo(
        "burnish.optim.sgd_schedule_free:SGDScheduleFree",
        "SGD without a schedule",
        "arXiv 2405.15682",
        averaged=True,
        warmup=True,
    ),
    "proxgen": OptimizerInfo(
        "burnish.optim.proxgen:ProxGen",
        "AdamW and others with an exact proximal step: weights that are zero or on levels",
        "arXiv 2007.07484",
    ),
    "block-diagonal": OptimizerInfo(
        "burnish.optim.block_diagonal:BlockDiagonal",
        "Adam with the full second moment of small blocks of weights",
        "arXiv 1905.10757",
        # At each step the decompositions of a language model would take longer than its passes.
        options={"remainder": "smaller", "update_every": 10},
    ),
    "mezo": OptimizerInfo(
        "burnish.optim.mezo:MeZO",
        "forward passes only, in the memory of inference",
        "arXiv 2305.17333",
        forward_only=True,
    ),
    "mezo-bcd": OptimizerInfo(
        "burnish.optim.mezo_bcd:MeZOBCD",
        "forward passes only, a block of weights at a time",
        "arXiv 2501.19099",
        forward_only=True,
    ),
}
