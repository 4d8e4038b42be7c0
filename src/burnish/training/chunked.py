"""Losses of logits that never exist whole: the head is applied to a few tokens at a time, and its gradient with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TokenLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(projected states [tokens, vocab], which tokens) -> (loss summed over them, what else to sum [m], no gradient)."""

CHUNK_BYTES = {"cpu": 152 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits of one chunk; a divergence holds about eight such tensors at a time."""


def chunked_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, function: TokenLoss, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of a loss over tokens whose logits are `hidden @ weight.T + bias`, chunk by chunk.

    The gradient of each chunk is taken at once, while its logits are there, so that nothing is computed twice and the
    peak holds one chunk of logits, not `tokens x vocab`. Sums over chunks are float32 at least.

    Args:
        hidden: Tensor `[tokens, hidden]`, any float.
        weight: Tensor `[vocab, hidden]`.
        bias: Tensor `[vocab]` or None.
        function: the loss of a chunk.
        chunk_tokens: tokens at a time; None fits CHUNK_BYTES.

    Returns:
        The summed loss [], which can be differentiated once, and the other sums [m].
    """
    if chunk_tokens is None:
        kind = "cuda" if hidden.is_cuda else "cpu"
        chunk_tokens = max(1, CHUNK_BYTES[kind] // (4 * len(weight)))
    return _ChunkedLoss.apply(hidden, weight, bias, function, chunk_tokens)  # type: ignore[no-untyped-call, no-any-return]


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients, too; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, function: TokenLoss, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        needs_bias = bias is not None and ctx.needs_input_grad[2]
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        sums = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=sums, device=hidden.device)
        others: Tensor | None = None
        with torch.autocast(device, enabled=False):
            used, used_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, max(1, len(hidden)), chunk_tokens):
                rows = slice(start, min(start + chunk_tokens, len(hidden)))
                chunk = hidden[rows].to(dtype)
                logits = F.linear(chunk, used, used_bias)  # [chunk, vocab]
                needs = needs_hidden or needs_weight or needs_bias
                with torch.set_grad_enabled(needs):
                    loss, other = function(logits.requires_grad_(needs), rows)
                total += loss.detach()
                others = other.detach() if others is None else others + other.detach()
                if not needs:
                    continue
                (grad,) = torch.autograd.grad(loss, logits)
                del logits, loss
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ used
                if grad_weight is not None:
                    add_product(grad_weight, grad.mT, chunk)
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=sums)
        assert others is not None
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(others)
        return total, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else grad.mul_(scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the type of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
