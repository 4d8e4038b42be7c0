"""How far a student's next-token distribution is from its teacher's. Knows no model, only logits."""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, mask: Tensor, *, chunk_tokens: int = 1024) -> Tensor:
    r"""Kullback-Leibler divergence KL(teacher || student) summed over the tokens of each sequence, in nats.

    $\sum_t \sum_v p_t(v) (\log p_t(v) - \log q_t(v))$ with p the teacher and q the student; a token of probability
    zero under the teacher contributes 0.

    Args:
        teacher_logits: Tensor `[batch, seq, vocab]`, float.
        student_logits: Tensor `[batch, seq, vocab]`, float.
        mask: Tensor `[batch, seq]`, bool; False contributes nothing.
        chunk_tokens: tokens whose float32 distributions are in memory at a time.

    Returns:
        Tensor `[batch]`, float64; divide by `mask.sum(1)` for nats per token.

    Source: Kullback and Leibler, Ann. Math. Statist. 22 (1951) 79, section 2; as a distillation loss Hinton et al.,
    arXiv:1503.02531, section 2, whose cross-entropy is larger by the teacher's entropy.
    """
    sums = teacher_logits.new_zeros(len(mask), dtype=torch.float64)
    step = max(1, chunk_tokens // len(mask))
    chunks = (torch.split(tensor, step, 1) for tensor in (teacher_logits, student_logits, mask))
    for teacher, student, counted in zip(*chunks, strict=True):
        log_p = teacher.float().log_softmax(-1)  # [batch, step, vocab]
        log_q = student.float().log_softmax(-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).where(p > 0, 0.0).sum(-1)
        sums += kl.double().where(counted, 0.0).sum(1)
    return sums


def top1_agreement(teacher_logits: Tensor, student_logits: Tensor, mask: Tensor) -> Tensor:
    """Tokens of each sequence where both rank the same token first, Tensor `[batch]` int64; see `forward_kl`."""
    return ((teacher_logits.argmax(-1) == student_logits.argmax(-1)) & mask).sum(1)
