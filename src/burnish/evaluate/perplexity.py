"""Negative log-likelihood of text under a model, and perplexity. Knows no model, only logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from burnish.evaluate.estimate import Estimate


def predicted(attention_mask: Tensor) -> Tensor:
    """Positions whose next token counts: Tensor `[batch, seq - 1]`, bool; both that position and the next are real."""
    mask = attention_mask.bool()
    return mask[:, :-1] & mask[:, 1:]


def negative_log_likelihood(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor, *, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each sequence, every token given those before it, in nats.

    Args:
        logits: Tensor `[batch, seq, vocab]`, float; position t predicts token t + 1.
        input_ids: Tensor `[batch, seq]`, int64.
        attention_mask: Tensor `[batch, seq]`, bool or int; 0 is padding and contributes nothing.
        chunk_tokens: tokens whose float32 log-softmax is in memory at a time.

    Returns:
        Sums, Tensor `[batch]` float64, and numbers of predicted tokens, Tensor `[batch]` int64.
    """
    mask = predicted(attention_mask)
    sums = logits.new_zeros(len(logits), dtype=torch.float64)
    step = max(1, chunk_tokens // len(logits))
    chunks = (torch.split(tensor, step, 1) for tensor in (logits[:, :-1], input_ids[:, 1:], mask))
    for scores, targets, counted in zip(*chunks, strict=True):
        nll = F.cross_entropy(scores.float().transpose(1, 2), targets, reduction="none")  # [batch, step]
        sums += nll.double().where(counted, 0.0).sum(1)
    return sums, mask.sum(1)


def perplexity(nll: Estimate) -> Estimate:
    """exp of the mean negative log-likelihood per predicted token; the error by the delta method: exp(nll) * SE(nll).

    Source: Jelinek et al., J. Acoust. Soc. Am. 62 (1977) S63; the error is ours.
    """
    value = math.exp(nll.value) if nll.value < 700 else math.inf  # exp overflows a double at 709.8
    return Estimate(value, value * nll.standard_error)
