"""DPO, and three that only change its curve or its margin."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import Positive
from burnish.align.objectives.sequences import log_ratio_margin, logistic, per_token


def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: Positive = 0.1,
) -> Tensor:
    """-ln sigma(beta margin), with the margin of ln(pi/ref) between the two answers: Tensor [batch].

    Args:
        chosen_logps: Tensor `[batch]`, float: log-probability of the preferred answer, summed over its tokens.
        rejected_logps: of the other answer.
        ref_chosen_logps: under the reference; a guiding model in its place makes this Pre-DPO (arXiv 2504.15843).
        ref_rejected_logps: of the other answer.
        beta: 1 / temperature of the implied reward; large stays close to the reference.

    Source: arXiv 2305.18290.

    Examples:
        >>> import torch
        >>> logps = torch.tensor([[-12.0], [-14.0], [-13.0], [-13.5]])
        >>> round(dpo(*logps, beta=0.1).item(), 6)
        0.620957
    """
    return logistic(beta * log_ratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))


def hinge(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: Positive = 0.1,
) -> Tensor:
    """max(0, 1 - beta margin): done with a pair once its margin is 1 / beta. Tensor [batch].

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        beta: 1 / the margin that is enough.

    Source: SLiC-HF, arXiv 2305.10425, with the margin of DPO as in RSO, arXiv 2309.06657.
    """
    return (1 - beta * log_ratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)).relu()


def sigmoid_norm(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: Positive = 5.0,
) -> Tensor:
    """DPO with log-ratios per token, so that length alone wins nothing. Tensor [batch].

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        chosen_lengths: Tensor `[batch]`: number of tokens of the preferred answer.
        rejected_lengths: of the other one.
        beta: per token, therefore larger than DPO's.

    Source: Tulu 3, arXiv 2411.15124 (`dpo_norm` of open-instruct, `sigmoid_norm` of TRL).
    """
    chosen = per_token(chosen_logps - ref_chosen_logps, chosen_lengths)
    rejected = per_token(rejected_logps - ref_rejected_logps, rejected_lengths)
    return logistic(beta * (chosen - rejected))
