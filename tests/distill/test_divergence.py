"""Divergences against closed forms, limits and each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.distill.divergence import (
    LOG_ZERO,
    LOSSES,
    best_and_rest,
    divergence,
    forward_kl,
    hidden_state_loss,
    jensen_shannon,
    reverse_kl,
)
from burnish.evaluate import divergence as measured


def log_probs(*logits: float) -> Tensor:
    return torch.tensor([logits], dtype=torch.float64).log_softmax(-1)


def random_pair(seed: int, tokens: int = 5, outcomes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, outcomes, generator=generator, dtype=torch.float64) * 2
    log_p, log_q = logits.log_softmax(-1)
    return log_p, log_q


def test_the_numbers_of_the_paper_card() -> None:
    teacher, student = log_probs(1.0, 0.0), log_probs(0.0, 0.0)
    assert forward_kl(teacher, student).item() == pytest.approx(0.1109441, abs=1e-7)
    assert reverse_kl(teacher, student).item() == pytest.approx(0.1201145, abs=1e-7)


@pytest.mark.parametrize("name", [*LOSSES, "jensen-shannon:0.1"])
def test_zero_for_equal_and_positive_for_different_distributions(name: str) -> None:
    log_p, log_q = random_pair(0)
    assert divergence(name)(log_p, log_p).abs().max() < 1e-15
    assert divergence(name)(log_p, log_q).min() > 1e-3


def test_reverse_kl_is_forward_kl_with_the_roles_exchanged() -> None:
    log_p, log_q = random_pair(1)
    assert torch.equal(reverse_kl(log_p, log_q), forward_kl(log_q, log_p))


def test_forward_kl_agrees_with_torch_and_with_what_evaluate_measures() -> None:
    log_p, log_q = random_pair(2)
    peer = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(forward_kl(log_p, log_q), peer, atol=1e-14)
    mask = torch.ones(1, len(log_p), dtype=torch.bool)
    total = measured.forward_kl(log_p.float()[None], log_q.float()[None], mask)
    assert forward_kl(log_p, log_q).sum().item() == pytest.approx(total.item(), rel=1e-5)


def test_gradient_of_forward_kl_is_student_minus_teacher() -> None:
    log_p, _ = random_pair(3)
    logits = torch.randn(log_p.shape, dtype=torch.float64, requires_grad=True)
    forward_kl(log_p, logits.log_softmax(-1)).sum().backward()
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - log_p.exp(), atol=1e-14)


def test_jensen_shannon_closed_form_of_disjoint_distributions() -> None:
    log_p = torch.tensor([[0.0, LOG_ZERO]], dtype=torch.float64)
    log_q = torch.tensor([[LOG_ZERO, 0.0]], dtype=torch.float64)
    for beta in (0.5, 0.1):
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert jensen_shannon(log_p, log_q, beta=beta).item() == pytest.approx(entropy, rel=1e-12)


def test_jensen_shannon_is_symmetric_and_tends_to_both_kls() -> None:
    log_p, log_q = random_pair(4)
    assert torch.allclose(jensen_shannon(log_p, log_q), jensen_shannon(log_q, log_p), atol=1e-15)
    small = 1e-6
    assert torch.allclose(jensen_shannon(log_p, log_q, beta=small) / small, forward_kl(log_p, log_q), rtol=1e-4)
    assert torch.allclose(jensen_shannon(log_p, log_q, beta=1 - small) / small, reverse_kl(log_p, log_q), rtol=1e-4)


@pytest.mark.parametrize("name", ["kl", "jensen-shannon:2", "jensen-shannon:x", "jensen-shannon:0"])
def test_unknown_losses_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"loss='{name}'"):
        divergence(name)


def test_best_and_rest_is_a_distribution_with_the_tail_in_its_last_outcome() -> None:
    log_p, _ = random_pair(5)
    best = log_p.topk(3).indices
    coarse = best_and_rest(log_p, best)
    assert torch.allclose(coarse.exp().sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-14)
    tail = log_p.exp().sum(-1) - log_p.exp().gather(-1, best).sum(-1)
    assert torch.allclose(coarse[:, -1].exp(), tail, atol=1e-14)


@given(seed=st.integers(0, 2**20), k=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_merging_outcomes_never_raises_kl_and_changes_nothing_when_all_are_kept(seed: int, k: int) -> None:
    log_p, log_q = random_pair(seed)
    best = log_p.topk(k).indices
    merged = forward_kl(best_and_rest(log_p, best), best_and_rest(log_q, best))
    full = forward_kl(log_p, log_q)
    assert (merged <= full + 1e-12).all()
    if k >= 6:  # one outcome or none is merged
        assert torch.allclose(merged, full, atol=1e-12)


def test_the_gradient_through_best_and_rest_is_right() -> None:
    log_p, _ = random_pair(6)
    best = log_p.topk(2).indices
    target = best_and_rest(log_p, best)
    logits = torch.randn(log_p.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: forward_kl(target, best_and_rest(x.log_softmax(-1), best)), logits)


def test_hidden_state_loss_is_zero_when_equal_and_one_for_a_silent_student() -> None:
    teacher = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert hidden_state_loss(teacher, teacher).max() == 0
    assert hidden_state_loss(teacher, torch.zeros_like(teacher)).mean().item() == pytest.approx(1.0)
    assert hidden_state_loss(10 * teacher, 11 * teacher).mean().item() == pytest.approx(0.01, rel=1e-4)
