"""How far a student's next-token distribution is from its teacher's: pure functions of log-probabilities.

All take `log_p` (teacher) and `log_q` (student), Tensors `[tokens, outcomes]` of normalised log-probabilities, and give
nats per token, Tensor `[tokens]`. The outcomes are the vocabulary, or the teacher's best tokens and "any other".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]

LOG_ZERO = -1e4
"""Stands for log 0: exp of it is 0, and 0 times it is 0, where an infinity would give NaN."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q): the student covers all that the teacher does.

    Source: arXiv 2605.28207, Eq. 5 (confirmed); Hinton et al., arXiv 1503.02531, section 2.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p): the student settles on what the teacher likes best.

    Source: ablated and found worse in arXiv 2605.28207, Table 5; as a loss MiniLLM, arXiv 2306.08543, section 2.1.
    """
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, *, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Divided by beta it tends to KL(p || q) for beta -> 0, divided by 1 - beta to KL(q || p) for beta -> 1; it is at
    most the entropy of (beta, 1 - beta).

    Raises:
        ValueError: beta outside (0, 1).

    Source: GKD, arXiv 2306.13649, Eq. 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta}: expected a number between 0 and 1")
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


@dataclass(frozen=True)
class Loss:
    """A row of the table of losses."""

    function: Divergence
    title: str


LOSSES: dict[str, Loss] = {
    "forward-kl": Loss(forward_kl, "KL(teacher || student), the paper's"),
    "reverse-kl": Loss(reverse_kl, "KL(student || teacher)"),
    "jensen-shannon": Loss(partial(jensen_shannon, beta=0.5), "Jensen-Shannon with equal weights"),
}


def divergence(name: str) -> Divergence:
    """The divergence of a `--loss` value: a key of LOSSES, or `jensen-shannon:BETA`.

    Raises:
        ValueError: an unknown name or a weight outside (0, 1).
    """
    if name in LOSSES:
        return LOSSES[name].function
    kind, _, weight = name.partition(":")
    if kind != "jensen-shannon":
        raise ValueError(f"loss={name!r} is unknown: choose one of {', '.join(LOSSES)}, or jensen-shannon:BETA")
    try:
        beta = float(weight)
    except ValueError:
        raise ValueError(f"loss={name!r}: {weight!r} is not a number between 0 and 1") from None
    if not 0 < beta < 1:
        raise ValueError(f"loss={name!r}: expected a weight between 0 and 1")
    return partial(jensen_shannon, beta=beta)


def best_and_rest(log_probs: Tensor, best: Tensor) -> Tensor:
    """The distribution over chosen tokens and "any other", as log-probabilities.

    Merging outcomes can only lower a KL divergence, so that a loss over the result is a lower bound of the full one;
    it is exact where nothing is merged, and its gradient still holds the student's tail to the teacher's mass.

    Args:
        log_probs: Tensor `[tokens, vocab]`.
        best: Tensor `[tokens, k]`, int64, distinct token ids.

    Returns:
        Tensor `[tokens, k + 1]`; the last outcome is any other token.
    """
    rest = log_probs.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, best), rest.clamp(min=LOG_ZERO)], dim=-1)


def hidden_state_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of hidden states over the teacher's mean square, per token: `[tokens, hidden]` -> `[tokens]`.

    The form of the paper's ablated hidden-state loss is not known; this one is ours (0 when equal, 1 for a student
    that says nothing), so that layers of any size weigh the same.
    """
    energy = teacher.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return (teacher.float() - student.float()).square().mean(-1) / energy
