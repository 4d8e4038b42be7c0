"""Log-probabilities without logits, against the plain ones (U8.2)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from burnish.training.head import unchanged
from burnish.training.logps import token_divergences, token_logps

FINISHES = {
    "unchanged": unchanged,
    "scaled": lambda logits: logits * 0.3,
    "capped": lambda logits: 2 * torch.tanh(logits / 2),
}


def inputs(*, tokens=11, size=5, vocab=17, bias=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()  # noqa: E731
    ids = torch.randint(vocab, (tokens,), generator=draw)
    return make(tokens, size), make(vocab, size), make(vocab) if bias else None, ids


def gradients(values, upstream, tensors):
    return torch.autograd.grad((values * upstream).sum(), [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_u8_2_values_and_gradients_equal_the_plain_ones(finish, chunk, bias, temperature):
    hidden, weight, offset, ids = inputs(bias=bias)
    upstream = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    plain = finish(F.linear(hidden, weight, offset)).div(temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    ours = token_logps(hidden, weight, offset, ids, finish=finish, temperature=temperature, chunk_tokens=chunk)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    tensors = (hidden, weight, offset)
    for found, wanted in zip(gradients(ours, upstream, tensors), gradients(plain, upstream, tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
def test_the_gradient_of_a_frozen_head_is_taken_ahead_and_is_the_same(finish):
    hidden, weight, bias, ids = inputs()
    upstream = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    (trained,) = gradients(token_logps(hidden, weight, bias, ids, finish=finish, chunk_tokens=3), upstream, [hidden])
    frozen = token_logps(hidden, weight.detach(), bias.detach(), ids, finish=finish, chunk_tokens=3)
    (ahead,) = gradients(frozen, upstream, [hidden])
    torch.testing.assert_close(ahead, trained, rtol=1e-11, atol=1e-12)


def test_only_the_bias_can_be_trained():
    hidden, weight, bias, ids = inputs()
    ours = token_logps(hidden.detach(), weight.detach(), bias, ids, chunk_tokens=3).sum()
    plain = F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, ids[:, None]).sum()
    torch.testing.assert_close(torch.autograd.grad(ours, bias), torch.autograd.grad(plain, bias))


def test_no_tokens_give_no_values_and_zero_gradients():
    hidden, weight, bias, _ = inputs(tokens=0)
    values = token_logps(hidden, weight, bias, torch.zeros(0, dtype=torch.int64))
    assert values.shape == (0,)
    assert all((grad == 0).all() for grad in gradients(values, 1.0, (hidden, weight, bias)))


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[1.0], [-1.0]])
    values = token_logps(hidden, weight, None, torch.tensor([0, 0]))
    assert values.tolist() == [0.0, -2e4]


def test_half_precision_heads_sum_in_float32():
    hidden, weight, _, ids = (tensor.detach().bfloat16() if tensor.is_floating_point() else tensor
                              for tensor in inputs(tokens=64, size=32, vocab=301))  # fmt: skip
    values = token_logps(hidden, weight, None, ids, chunk_tokens=7)
    wanted = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)


def test_autocast_projects_in_its_type():
    hidden, weight, _, ids = inputs()
    hidden, weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values = token_logps(hidden, weight, None, ids)
        wanted = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    values.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
def test_divergences_equal_the_plain_ones(finish):
    hidden, weight, bias, _ = inputs()
    target = torch.randn(len(hidden), len(weight), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    upstream = torch.linspace(-1, 2, len(hidden), dtype=torch.float64)
    log_p = finish(F.linear(hidden, weight, bias)).log_softmax(-1)
    plain = F.kl_div(log_p, target.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    ours = token_divergences(hidden, weight, bias, lambda rows: target[rows], finish=finish, chunk_tokens=4)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    tensors = (hidden, weight, bias)
    for found, wanted in zip(gradients(ours, upstream, tensors), gradients(plain, upstream, tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
