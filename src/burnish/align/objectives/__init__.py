"""Objectives of alignment: pure functions of log-probabilities, and the table of them."""

from burnish.align.objectives.cpo import cpo
from burnish.align.objectives.dpo import dpo, hinge, sigmoid_norm
from burnish.align.objectives.exo import exo
from burnish.align.objectives.ipo import ipo
from burnish.align.objectives.kto import kto, kto_kl
from burnish.align.objectives.lcpo import lcpo, updated_reliability
from burnish.align.objectives.madpo import madpo, margin_weight
from burnish.align.objectives.noisy_labels import cdpo, rdpo
from burnish.align.objectives.npo import npo, npo_gd, npo_kl
from burnish.align.objectives.orpo import orpo
from burnish.align.objectives.pairs import mixture
from burnish.align.objectives.pd import preference_distillation
from burnish.align.objectives.pmle import pmle
from burnish.align.objectives.rebel import rebel, reward_distillation, reward_distillation_ce
from burnish.align.objectives.rkl import on_policy_kl, rkl, rkl_token, rlhf
from burnish.align.objectives.sem_dpo import sem_dpo
from burnish.align.objectives.simpo import simpo
from burnish.align.objectives.sparse_po import TokenMask, activation_mask, sparse_po
from burnish.align.objectives.table import OBJECTIVES, Bound, Objective, objective

__all__ = [
    "OBJECTIVES",
    "Bound",
    "Objective",
    "TokenMask",
    "activation_mask",
    "cdpo",
    "cpo",
    "dpo",
    "exo",
    "hinge",
    "ipo",
    "kto",
    "kto_kl",
    "lcpo",
    "madpo",
    "margin_weight",
    "mixture",
    "npo",
    "npo_gd",
    "npo_kl",
    "objective",
    "on_policy_kl",
    "orpo",
    "pmle",
    "preference_distillation",
    "rdpo",
    "rebel",
    "reward_distillation",
    "reward_distillation_ce",
    "rkl",
    "rkl_token",
    "rlhf",
    "sem_dpo",
    "sigmoid_norm",
    "simpo",
    "sparse_po",
    "updated_reliability",
]
