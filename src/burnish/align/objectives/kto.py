"""KTO: single answers that are desirable or not, each against a running estimate of the divergence."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import NonNegative, Positive


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """weight (1 - sigma(beta (h - kl))) for a desirable answer, kl - h for an undesirable one. Tensor [batch].

    Args:
        logps: Tensor `[batch]`, float: log-probability of the answer, summed over its tokens; h is it less `ref_logps`.
        ref_logps: under the reference.
        labels: Tensor `[batch]`, 1 desirable, 0 not, or the probability of desirable.
        kl: Tensor `[]`: `kto_kl`; no gradient flows through it.
        beta: as in `dpo`.
        desirable_weight: keep weight x number of the desirable to that of the undesirable between 1:1 and 4:3.
        undesirable_weight: of those with label 0.

    Source: arXiv 2402.01306, Eq. 7 (after TRL).
    """
    logit = beta * (logps - ref_logps - kl.detach())
    desirable = desirable_weight * (-logit).sigmoid()
    undesirable = undesirable_weight * logit.sigmoid()
    return labels * desirable + (1 - labels) * undesirable


def kto_kl(mismatched_logps: Tensor, ref_mismatched_logps: Tensor) -> Tensor:
    """max(0, mean ln(pi/ref)) of answers under prompts that are not theirs: Tensor [], without gradient.

    Args:
        mismatched_logps: Tensor `[batch]`, float: of the answer to another prompt, summed over its tokens.
        ref_mismatched_logps: under the reference.

    Source: arXiv 2402.01306 and TRL.
    """
    return (mismatched_logps - ref_mismatched_logps).detach().mean().clamp(min=0)
