"""MADPO: each pair's weight follows from a reward model's margin."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.align.objectives.dpo import dpo
from burnish.align.objectives.option import Positive, Range

AboveOne = Annotated[float, Range(1, math.inf)]
BelowOne = Annotated[float, Range(0, 1)]


def madpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    beta: Positive = 0.1,
    c_max: AboveOne = 2.0,
    c_min: BelowOne = 0.5,
    tau: Positive = 2.0,
    steepness: Positive = 1.0,
) -> Tensor:
    """margin_weight times dpo: Tensor [batch].

    Over labels drawn with sigma(m), m the reward margin, a pair's best beta margin is c(|m|) m: stretched where answers
    are close, shrunk where one is far better.

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        chosen_rewards: Tensor `[batch]`.
        rejected_rewards: of the other answer.
        beta: as in `dpo`.
        c_max: what the stretch goes to for small margins.
        c_min: and for large ones.
        tau: the margin that stays as it is.
        steepness: of the way from c_max to c_min (lambda).

    Source: arXiv 2510.05342 and its code.
    """
    margin = chosen_rewards - rejected_rewards
    weight = margin_weight(margin, c_max=c_max, c_min=c_min, tau=tau, steepness=steepness)
    return weight * dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)


def margin_weight(
    margin: Tensor,
    *,
    c_max: AboveOne = 2.0,
    c_min: BelowOne = 0.5,
    tau: Positive = 2.0,
    steepness: Positive = 1.0,
) -> Tensor:
    """sigma(c m) / sigma(m), 1 for margins below -tau: Tensor like `margin`, without gradient; it may exceed 1.

    Args:
        margin: Tensor of any shape, float: reward of the chosen answer less that of the rejected one.
        c_max: as in `madpo`, and the three that follow.
    """
    # At -tau the stretch is 1 and so is the weight: clamping there is the rule for what lies below.
    margin = margin.detach().clamp(min=-tau)
    stretch = margin_stretch(margin, c_max=c_max, c_min=c_min, tau=tau, steepness=steepness)
    return torch.exp(logsigmoid(stretch * margin) - logsigmoid(margin))


def margin_stretch(
    margin: Tensor,
    *,
    c_max: AboveOne = 2.0,
    c_min: BelowOne = 0.5,
    tau: Positive = 2.0,
    steepness: Positive = 1.0,
) -> Tensor:
    """c(|m|) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(steepness (|m| - tau))): like `margin`.

    Args:
        margin: as in `margin_weight`, and the four that follow as in `madpo`.
    """
    offset = math.log((c_max - 1) / (1 - c_min))
    return c_min + (c_max - c_min) * torch.sigmoid(steepness * (tau - margin.abs()) - offset)
