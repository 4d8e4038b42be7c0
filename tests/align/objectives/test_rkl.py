"""Objectives of samples: values and gradients against enumeration over all tuples of samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from burnish.align.objectives import on_policy_kl, rkl, rkl_token, rlhf
from burnish.align.objectives.rkl import leave_one_out, token_entropy

GAMMA, BETA = 0.01, 0.05


def problem(outcomes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, log-probabilities of a reference, rewards."""
    generator = torch.Generator().manual_seed(0)
    logits, reference, rewards = torch.randn(3, outcomes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(0), 3 * rewards


def over_all_tuples(log_probs: Tensor, k: int, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a loss of k outcomes over all tuples of them; no gradient flows through their probability."""
    tuples = torch.tensor(list(itertools.product(range(len(log_probs)), repeat=k)))
    weights = log_probs.detach()[tuples].sum(1).exp()
    return (weights * loss(tuples)).sum()


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize(("gamma", "beta"), [(GAMMA, BETA), (0.5, 0.0), (0.0, 0.3)])
def test_value_and_gradient_are_those_of_the_enumerated_objective(k: int, gamma: float, beta: float) -> None:
    logits, reference, rewards = problem()
    log_pi = logits.log_softmax(0)
    pi = log_pi.exp()
    exact = (pi * (-rewards + gamma * log_pi + beta * (log_pi - reference))).sum()

    def loss(t: Tensor) -> Tensor:
        return rkl(log_pi[t], reference[t], rewards[t], gamma=gamma, beta=beta)

    estimate = over_all_tuples(log_pi, k, loss)
    assert estimate.item() == pytest.approx(exact.item(), abs=1e-12)
    assert (gradient(estimate, logits) - gradient(exact, logits)).abs().max() < 1e-10


def test_the_baseline_lowers_the_variance_of_the_gradient() -> None:
    logits, reference, rewards = problem()
    log_pi = logits.log_softmax(0)
    rewards = rewards + 10

    def spread(loss: Callable[[Tensor], Tensor]) -> float:
        found = []
        for t in itertools.product(range(5), repeat=3):
            chosen = torch.tensor([t])
            weight = log_pi.detach()[chosen].sum().exp()
            found.append(weight * torch.autograd.grad(loss(chosen).sum(), logits, retain_graph=True)[0].square().sum())
        return float(torch.stack(found).sum())

    plain = spread(lambda t: -((rewards - GAMMA * log_pi.detach())[t] * log_pi[t]).mean(1))
    ours = spread(lambda t: rkl(log_pi[t], reference[t], rewards[t], gamma=GAMMA, beta=0.0))
    assert ours < 0.2 * plain


def test_the_closed_form_of_the_card_is_a_stationary_point_with_its_value() -> None:
    prior = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    rewards = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)
    logits = ((0.2 * prior + rewards) / 0.5).requires_grad_()
    log_pi = logits.log_softmax(0)
    assert log_pi.exp().tolist() == pytest.approx([0.03450, 0.20780, 0.00784, 0.74986], abs=5e-6)
    estimate = over_all_tuples(log_pi, 2, lambda t: rkl(log_pi[t], prior[t], rewards[t], gamma=0.3, beta=0.2))
    assert estimate.item() == pytest.approx(-1.544789, abs=5e-7)
    assert gradient(estimate, logits).abs().max() < 1e-15


def test_rlhf_is_rkl_without_entropy_and_rkl_with_a_uniform_prior_rlhf_at_the_summed_temperature() -> None:
    logits, reference, rewards = problem()
    log_pi = logits.log_softmax(0)[None]
    one = rlhf(log_pi, reference[None], rewards[None], beta=BETA)
    assert torch.equal(one, rkl(log_pi, reference[None], rewards[None], gamma=0.0, beta=BETA))
    flat = torch.full_like(log_pi, -2.0)
    both = rkl(log_pi, flat, rewards[None], gamma=0.3, beta=0.2)
    hot = rlhf(log_pi, flat, rewards[None], beta=0.5)
    assert torch.allclose(gradient(both.sum(), logits), gradient(hot.sum(), logits), atol=1e-14)


def test_rewards_may_move_by_any_function_of_the_prompt() -> None:
    logits, reference, rewards = problem()
    log_pi = logits.log_softmax(0)[None]
    before = gradient(rkl(log_pi, reference[None], rewards[None]).sum(), logits)
    after = gradient(rkl(log_pi, reference[None], rewards[None] + 7.0).sum(), logits)
    assert torch.allclose(before, after, atol=1e-13)


def test_the_on_policy_kl_and_what_backpropagation_through_it_would_give() -> None:
    logits, reference, _ = problem()
    log_pi = logits.log_softmax(0)
    exact = (log_pi.exp() * (log_pi - reference)).sum()
    estimate = over_all_tuples(log_pi, 3, lambda t: on_policy_kl(log_pi[t], reference[t]))
    assert estimate.item() == pytest.approx(exact.item(), abs=1e-13)
    assert (gradient(estimate, logits) - gradient(exact, logits)).abs().max() < 1e-12
    naive = over_all_tuples(log_pi, 3, lambda t: (log_pi[t] - reference[t]).mean(1))
    assert gradient(naive, logits).abs().max() < 1e-15 < gradient(exact, logits).abs().max()


def test_the_shortcut_by_token_leaves_out_what_a_token_does_to_later_entropy() -> None:
    vocab = 3
    generator = torch.Generator().manual_seed(1)
    leaf = torch.randn(1 + vocab, vocab, generator=generator, dtype=torch.float64).requires_grad_()
    first, second = leaf[0].log_softmax(0), leaf[1:].log_softmax(1)
    answers = torch.tensor(list(itertools.product(range(vocab), repeat=2)))
    tokens = torch.stack([first[answers[:, 0]], second[answers[:, 0], answers[:, 1]]], dim=1)  # [answers, 2]
    whole = tokens.sum(1)
    reference, rewards = torch.randn(2, len(answers), generator=generator, dtype=torch.float64)

    def own_entropy(log_p: Tensor) -> Tensor:
        return -(log_p.exp() * log_p).sum(-1)

    pi = whole.exp()
    regularised = (pi * (-rewards + BETA * (whole - reference))).sum()
    greedy = own_entropy(first) + (first.exp().detach() * own_entropy(second)).sum()
    padded = torch.cat([tokens, torch.zeros(len(answers), 1).double()], dim=1)
    estimate = over_all_tuples(whole, 2, lambda t: rkl_token(padded[t], reference[t], rewards[t], gamma=0.7, beta=BETA))
    assert estimate.item() == pytest.approx((regularised - 0.7 * own_entropy(whole)).item(), abs=1e-12)
    assert (gradient(estimate, leaf) - gradient(regularised - 0.7 * greedy, leaf)).abs().max() < 1e-12
    exact = gradient(regularised - 0.7 * own_entropy(whole), leaf)
    assert (gradient(regularised - 0.7 * greedy, leaf) - exact).abs().max() > 1e-2
    assert token_entropy(padded[None]).item() == pytest.approx(-whole.mean().item(), abs=1e-13)


def test_a_score_is_compared_with_the_mean_of_the_others() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0]])
    assert leave_one_out(scores).tolist() == [[-3.0, -1.5, 4.5]]


@pytest.mark.parametrize("loss", [rkl, rlhf])
def test_one_sample_has_no_baseline(loss: Callable[..., Tensor]) -> None:
    one = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"num_samples=1: the baseline of an answer is the mean over the others"):
        loss(one, one, one)
