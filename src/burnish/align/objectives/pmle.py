"""PMLE: the model itself is the preference model, so that its likelihood of the choices is the loss."""

from __future__ import annotations

from torch import Tensor

from burnish.align.objectives.option import Positive
from burnish.align.objectives.sequences import logistic


def pmle(chosen_logps: Tensor, rejected_logps: Tensor, *, gamma: Positive = 0.01) -> Tensor:
    """-ln sigma(gamma (chosen_logps - rejected_logps)): Tensor [batch].

    Of answers that both were sampled, an annotator takes the one that the target model gives more probability:
    P(a over b) = pi*(a)^gamma / (pi*(a)^gamma + pi*(b)^gamma). No reference enters; the regulariser is the exact KL to
    one (option `kl` of the objective, see `on_policy_kl`).

    Args:
        chosen_logps: Tensor `[batch]`, float: log-probability summed over tokens.
        rejected_logps: of the other answer.
        gamma: how sharply probability decides; 0.005 to 0.1 for answers of many tokens.

    Source: arXiv 2506.01523 v2, Eq. 4.
    """
    return logistic(gamma * (chosen_logps - rejected_logps))
