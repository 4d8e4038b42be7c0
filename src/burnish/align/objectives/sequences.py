"""What is made of the log-probabilities of two answers before a loss sees them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def log_ratio_margin(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    """ln(pi/ref) of the chosen answer less that of the rejected one; Tensors of one shape."""
    return (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the tokens of each answer, from the sum; 0 for an answer without tokens."""
    return logps / lengths.clamp(min=1)


def logistic(logit: Tensor) -> Tensor:
    """-ln sigma(logit) = ln(1 + exp(-logit)), exact for any size of the logit."""
    return -logsigmoid(logit)


def soft_logistic(logit: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of sigma(logit) with the soft label sigma(target), through which no gradient flows."""
    target = target.detach()
    return target.sigmoid() * logistic(logit) + (-target).sigmoid() * logistic(-logit)
