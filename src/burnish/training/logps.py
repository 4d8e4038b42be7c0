"""Log-probabilities of tokens without logits: any loss of them can be put on top, and none holds `tokens x vocab`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from burnish.training.chunked import add_product
from burnish.training.head import unchanged

Finish = Callable[[Tensor], Tensor]
"""What a model does to projected states: a scale, a soft cap, or nothing."""

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits of one chunk, beside which it holds them once in the type of the head, and their gradient."""
TRAINED_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Where the head is trained: each chunk goes over all of its gradient once more."""

Readout = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits [chunk, vocab], float32 at least, which it may overwrite; which tokens; whether their gradient is wanted) ->
values [chunk], and their derivative by the logits [chunk, vocab] or None."""


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    *,
    finish: Finish = unchanged,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probabilities of given tokens.

    Logits live a chunk at a time and are float32 at least. Where the head is not trained, the derivative by the hidden
    states is taken in the forward pass, so that the head is applied twice in all; where it is trained, the backward
    pass applies it once more.

    Args:
        hidden: Tensor `[tokens, hidden]`, any float: states from which each token is predicted.
        weight: Tensor `[vocab, hidden]`.
        bias: Tensor `[vocab]` or None.
        token_ids: Tensor `[tokens]`, int64.
        finish: what follows the projection.
        temperature: logits are divided by it.
        chunk_tokens: tokens at a time; None fits CHUNK_BYTES, or TRAINED_CHUNK_BYTES.

    Returns:
        Tensor `[tokens]`, float32, or float64 where the weight is; differentiable once.

    Source: ours; d ln p(y) / d logits = onehot(y) - p.
    """

    def read(logits: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        picked = token_ids[rows, None]
        logits /= temperature
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, picked) - top
        logits.sub_(top).exp_()  # in place: the chunk is the peak
        total = logits.sum(-1, keepdim=True)
        values = (chosen - total.log())[:, 0]
        if not wanted:
            return values, None
        logits.mul_(total.reciprocal().neg_())
        logits.scatter_add_(-1, picked, torch.ones_like(chosen))
        return values, logits.div_(temperature)

    return chunked_values(hidden, weight, bias, read, finish=finish, chunk_tokens=chunk_tokens)


def token_divergences(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Callable[[slice], Tensor],
    *,
    finish: Finish = unchanged,
    chunk_tokens: int | None = None,
) -> Tensor:
    """KL(target || model) over the vocabulary at each token.

    Args:
        hidden: Tensor `[tokens, hidden]`, any float.
        weight: Tensor `[vocab, hidden]`.
        bias: Tensor `[vocab]` or None.
        target: which tokens -> logits of the target `[chunk, vocab]`.
        finish: what follows the projection.
        chunk_tokens: tokens at a time; None fits CHUNK_BYTES, or TRAINED_CHUNK_BYTES.

    Returns:
        Tensor `[tokens]`, nats, float32, or float64 where the weight is; differentiable once.

    Source: ours; d KL(q || p) / d logits = p - q.
    """

    def read(logits: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            log_q = target(rows).to(logits.dtype).log_softmax(-1)
        log_p = logits.log_softmax(-1)
        q = log_q.exp()
        values = (q * (log_q - log_p)).sum(-1)
        return values, log_p.exp_().sub_(q) if wanted else None

    return chunked_values(hidden, weight, bias, read, finish=finish, chunk_tokens=chunk_tokens)


def chunked_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    read: Readout,
    *,
    finish: Finish = unchanged,
    chunk_tokens: int | None = None,
) -> Tensor:
    """One value per token of its logits, chunk by chunk.

    Args:
        hidden: Tensor `[tokens, hidden]`, any float.
        weight: Tensor `[vocab, hidden]`.
        bias: Tensor `[vocab]` or None.
        read: values and derivatives of a chunk.
        finish: what follows the projection.
        chunk_tokens: tokens at a time; None fits CHUNK_BYTES, or TRAINED_CHUNK_BYTES.

    Returns:
        Tensor `[tokens]`, differentiable once.
    """
    if chunk_tokens is None:
        kind = "cuda" if hidden.is_cuda else "cpu"
        trained = weight.requires_grad and torch.is_grad_enabled()
        chunk_bytes = (TRAINED_CHUNK_BYTES if trained else CHUNK_BYTES)[kind]
        chunk_tokens = max(1, chunk_bytes // (4 * len(weight)))
    return _ChunkedValues.apply(hidden, weight, bias, read, finish, chunk_tokens)  # type: ignore[no-untyped-call, no-any-return]


class _ChunkedValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        read: Readout,
        finish: Finish,
        chunk_tokens: int,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        trained = ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2])
        ahead = ctx.needs_input_grad[0] and not trained
        ctx.read, ctx.finish, ctx.chunk_tokens, ctx.dtype = read, finish, chunk_tokens, dtype
        values = torch.empty(len(hidden), dtype=_accurate(weight.dtype), device=hidden.device)
        derivative = torch.empty_like(hidden) if ahead else None
        with torch.autocast(device, enabled=False):
            used, used_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in _chunks(len(hidden), chunk_tokens):
                projected = F.linear(hidden[rows].to(dtype), used, used_bias)
                values[rows], gradient = _read(projected, rows, read, finish, wanted=ahead)
                if derivative is not None and gradient is not None:
                    derivative[rows] = gradient.to(dtype) @ used
        ctx.save_for_backward(*((derivative,) if ahead else (hidden, weight, bias)))
        ctx.ahead, ctx.shapes = ahead, (weight.shape, None if bias is None else bias.dtype)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ahead:
            (derivative,) = ctx.saved_tensors
            return derivative * upstream[:, None].to(derivative.dtype), None, None, None, None, None
        hidden, weight, bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        sums = _accurate(weight.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            used, used_bias = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
            for rows in _chunks(len(hidden), ctx.chunk_tokens):
                chunk = hidden[rows].to(ctx.dtype)
                projected = F.linear(chunk, used, used_bias)
                _, gradient = _read(projected, rows, ctx.read, ctx.finish, wanted=True)
                assert gradient is not None
                gradient = gradient.mul_(upstream[rows, None].to(gradient.dtype))
                if grad_bias is not None:
                    grad_bias += gradient.sum(0, dtype=sums)
                gradient = gradient.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = gradient @ used
                if grad_weight is not None:
                    add_product(grad_weight, gradient.mT, chunk)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _read(
    projected: Tensor, rows: slice, read: Readout, finish: Finish, *, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Values of a chunk and their derivative by the projected states, through what follows the projection."""
    with torch.no_grad():
        if finish is unchanged:
            return read(projected.to(_accurate(projected.dtype)), rows, wanted)
        if not wanted:
            return read(finish(projected).to(_accurate(projected.dtype)), rows, wanted)
    with torch.enable_grad():
        leaf = projected.detach().requires_grad_()
        finished = finish(leaf).to(_accurate(projected.dtype))
    with torch.no_grad():
        values, gradient = read(finished.detach().clone(), rows, wanted)
    (through,) = torch.autograd.grad(finished, leaf, gradient)
    return values, through


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
