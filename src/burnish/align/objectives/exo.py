"""EXO: the reverse KL from the policy's preference to a smoothed label."""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.align.objectives.option import Positive, Range
from burnish.align.objectives.sequences import log_ratio_margin


def exo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, Range(0, 0.5)] = 1e-3,
) -> Tensor:
    """KL((q, 1 - q) || (1 - eps, eps)) with q = sigma(beta margin): least where q = 1 - eps. Tensor [batch].

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        beta: as in `dpo`.
        label_smoothing: eps; 0 would make the divergence infinite.

    Source: arXiv 2402.00856, Eq. 16 (after TRL, where it is `exo_pair`).
    """
    logit = beta * log_ratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    won = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-label_smoothing))
    lost = (-logit).sigmoid() * (logsigmoid(-logit) - math.log(label_smoothing))
    return won + lost
