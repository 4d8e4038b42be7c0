"""DPO for labels of which a known share is wrong: cDPO expects the flips, rDPO takes their bias out."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import FlipRate, Positive
from burnish.align.objectives.sequences import log_ratio_margin, logistic


def cdpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.1,
) -> Tensor:
    """(1 - eps) dpo + eps dpo of the flipped pair: least at beta margin = ln((1 - eps) / eps). Tensor [batch].

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        beta: as in `dpo`.
        label_smoothing: eps, the share of labels that are wrong.

    Source: E. Mitchell, "A note on DPO with noisy preferences" (2023); `label_smoothing` of OpenRLHF and open-instruct.
    """
    logit = beta * log_ratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (1 - label_smoothing) * logistic(logit) + label_smoothing * logistic(-logit)


def rdpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: Positive = 0.1,
    label_smoothing: FlipRate = 0.1,
) -> Tensor:
    """((1 - eps) dpo - eps dpo of the flipped pair) / (1 - 2 eps): over flips its mean is dpo of the true pair.

    It is not bounded below: a pair that is won clearly goes on to be pushed. Tensor [batch].

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        beta: as in `dpo`.
        label_smoothing: eps, the share of labels that are wrong.

    Source: arXiv 2403.00409 (`robust` of TRL).
    """
    logit = beta * log_ratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    kept, flipped = logistic(logit), logistic(-logit)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)
