"""IPO: a square around a finite margin, which pairs that are always won cannot push further."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import Positive
from burnish.align.objectives.sequences import per_token


def ipo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: Positive = 0.1,
    average: bool = False,
) -> Tensor:
    """(margin - 1 / (2 beta))^2: Tensor [batch].

    Args:
        chosen_logps: as in `dpo`, and the three that follow.
        chosen_lengths: Tensor `[batch]`: number of tokens; read only with `average`.
        rejected_lengths: of the other answer.
        beta: tau of the paper.
        average: the margin is of log-ratios per token, as TRL has it, not of their sums as in the paper.

    Source: arXiv 2310.12036, Eq. 17 (after TRL).
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    if average:
        chosen, rejected = per_token(chosen, chosen_lengths), per_token(rejected, rejected_lengths)
    return (chosen - rejected - 1 / (2 * beta)).square()
