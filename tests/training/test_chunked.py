"""The chunked loss is the plain one, in value and gradient, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from burnish.distill.divergence import LOSSES, divergence
from burnish.training.chunked import chunked_loss


def problem(tokens: int = 7, vocab: int = 11, hidden: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, hidden), (vocab, hidden), (vocab,), (tokens, vocab)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", LOSSES)
@given(chunk_tokens=st.integers(1, 9), with_bias=st.booleans(), scale=st.floats(0.25, 4))
@settings(max_examples=12, deadline=None)
def test_u8_2_equal_to_the_plain_loss_in_value_and_gradient(
    name: str, chunk_tokens: int, with_bias: bool, scale: float
) -> None:
    hidden, weight, bias, teacher = problem()
    log_p = teacher.log_softmax(-1)
    labels = torch.arange(7)

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_q = (logits / 2).log_softmax(-1)
        total = divergence(name)(log_p[rows], log_q).sum() + F.cross_entropy(logits, labels[rows], reduction="sum")
        return total, torch.stack([logits.sum(), logits.square().sum()])

    leaves = [[tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)] for _ in range(2)]
    plain, others = loss(F.linear(leaves[0][0], leaves[0][1], leaves[0][2] if with_bias else None), slice(None))
    (plain * scale).backward()
    chunked, sums = chunked_loss(
        leaves[1][0], leaves[1][1], leaves[1][2] if with_bias else None, loss, chunk_tokens=chunk_tokens
    )
    (chunked * scale).backward()
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.allclose(sums, others.detach(), rtol=1e-12)
    for expected, found in zip(leaves[0], leaves[1], strict=True):
        if expected.grad is None:
            assert found.grad is None
        else:
            assert torch.allclose(found.grad, expected.grad, rtol=1e-11, atol=1e-11)


def test_a_frozen_head_or_frozen_states_get_no_gradient() -> None:
    hidden, weight, _, _ = problem()

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return logits.square().sum(), logits.sum()[None]

    hidden.requires_grad_()
    chunked_loss(hidden, weight, None, loss)[0].backward()
    assert torch.allclose(hidden.grad, 2 * hidden @ weight.T @ weight)
    assert weight.grad is None
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, None, loss)[0].requires_grad


def test_bfloat16_accumulates_the_weight_gradient_in_float32() -> None:
    hidden, weight, _, _ = problem(tokens=512, dtype=torch.bfloat16)

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return logits.float().square().sum() / 2, logits.sum()[None]

    master = weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        chunked_loss(hidden, master, None, loss, chunk_tokens=1)[0].backward()
    states = hidden.float()
    exact = (F.linear(hidden, weight).float().mT) @ states
    error = (master.grad - exact).norm() / exact.norm()
    assert error < 4e-3  # one rounding of each product to bfloat16; a sum kept in bfloat16 is off by 5e-2
