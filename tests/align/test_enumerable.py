"""Language models over 64 sequences: enumeration, gradients, and where each objective ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from burnish.align.bandit import forward_kl, optimum
from burnish.align.enumerable import (
    Loss,
    PairCounts,
    all_sequences,
    entropy,
    fit,
    model_logps,
    pair_loss,
    random_tree,
    reverse_kl_loss,
    tiny_llama,
    tree_logps,
)
from burnish.align.objectives import objective, rkl

V, L, GAMMA = 4, 3, 0.5


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policies(seed: int, problems: int = 2, spread: float = 0.7) -> Tensor:
    return tree_logps(random_tree(draw(seed), problems, spread=spread), V, L)


def fitted(loss: Loss, problems: int = 2, steps: int = 600) -> Tensor:
    logits = torch.zeros(problems, 21, V, dtype=torch.float64, requires_grad=True)
    return fit([logits], lambda: tree_logps(logits, V, L), loss, steps=steps)


def test_sequences_are_in_lexicographic_order() -> None:
    assert all_sequences(3, 2).tolist() == [list(pair) for pair in itertools.product(range(3), repeat=2)]
    assert all_sequences(3, 1).tolist() == [[0], [1], [2]]


def test_a_tree_is_the_product_of_its_conditionals() -> None:
    logits = random_tree(draw(), 1)[0]
    prefixes = [prefix for length in range(L) for prefix in itertools.product(range(V), repeat=length)]
    found = tree_logps(logits, V, L)
    for row, sequence in enumerate(all_sequences(V, L).tolist()):
        conditionals = [logits[prefixes.index(tuple(sequence[:t]))].softmax(0)[sequence[t]] for t in range(L)]
        assert float(found[row].exp()) == pytest.approx(math.prod(map(float, conditionals)))
    assert float(found.exp().sum()) == pytest.approx(1)


def test_a_model_is_the_product_of_its_conditionals() -> None:
    model = tiny_llama(V, L, seed=0).eval()
    found = model_logps(model, V, L).detach()
    assert float(found.exp().sum()) == pytest.approx(1)
    for row in (0, 27, 63):
        sequence, total = all_sequences(V, L)[row], 0.0
        for t in range(L):
            prefix = torch.cat([torch.tensor([V]), sequence[:t]]).unsqueeze(0)
            total += model(prefix).logits[0, -1, :V].log_softmax(0)[sequence[t]].item()
        assert float(found[row]) == pytest.approx(total)


def test_a_model_is_drawn_from_its_seed_alone() -> None:
    state = torch.get_rng_state()
    one, other, third = (model_logps(tiny_llama(V, L, seed=seed), V, L) for seed in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_entropy_by_hand() -> None:
    assert float(entropy(tree_logps(torch.zeros(21, V), V, L))) == pytest.approx(math.log(64))
    assert float(entropy(torch.tensor([0.25, 0.75]).log())) == pytest.approx(0.5623351)


def test_reverse_kl_is_least_at_its_optimum() -> None:
    rewards, reference = 0.3 * policies(1), policies(2)
    loss = reverse_kl_loss(rewards, reference, gamma=0.3, beta=0.2)
    found = fitted(loss, steps=1500)
    expected = optimum(rewards, reference, gamma=0.3, beta=0.2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    scaled = (0.2 * reference + rewards) / 0.5
    torch.testing.assert_close(loss(expected), -0.5 * scaled.logsumexp(-1))


def test_the_score_function_estimator_has_the_exact_gradient() -> None:
    """Every outcome of two samples, weighted by its probability, against the gradient of the enumerated objective."""
    rewards, reference = policies(1, 1)[0], policies(2, 1)[0]
    logits = random_tree(draw(3), 1)[0].requires_grad_()
    exact = reverse_kl_loss(rewards, reference, gamma=0.3, beta=0.2)(tree_logps(logits, V, L))
    logps = tree_logps(logits, V, L)
    samples = torch.cartesian_prod(torch.arange(64), torch.arange(64))  # [64 * 64, 2]
    estimates = rkl(logps[samples], reference[samples], rewards[samples], gamma=0.3, beta=0.2)
    expected = (logps.detach()[samples].sum(1).exp() * estimates).sum()
    assert expected.item() == pytest.approx(exact.item())
    (ours,), (theirs,) = (torch.autograd.grad(one, logits) for one in (expected, exact))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_pairs_are_drawn_and_labelled_as_enumerated() -> None:
    sampler, target = policies(1), policies(2)
    n = 200_000
    exact, drawn = PairCounts.exact(sampler, target, GAMMA), PairCounts.draw(sampler, target, GAMMA, n, draw())
    assert len(exact.first) == 2016 and bool((exact.first < exact.second).all())
    ties = (2 * sampler).exp().sum(-1)
    torch.testing.assert_close((exact.wins + exact.losses).sum(-1) + ties, torch.ones(2).double())
    torch.testing.assert_close(
        exact.wins / exact.losses, ((target[:, exact.first] - target[:, exact.second]) * GAMMA).exp()
    )
    for found, expected in ((drawn.wins, n * exact.wins), (drawn.losses, n * exact.losses)):
        square = ((found - expected) ** 2 / expected).sum(-1)  # about chi squared with 2016 degrees of freedom
        assert bool(((square - 2016).abs() < 4 * math.sqrt(2 * 2016)).all())


def test_pairs_of_rounds_add_up() -> None:
    one, other = (PairCounts.draw(policies(1), policies(2), GAMMA, 100, draw(seed)) for seed in (0, 1))
    assert torch.equal((one + other).wins, one.wins + other.wins)
    assert torch.equal((one + other).losses, one.losses + other.losses)


def test_a_soft_label_is_the_mean_over_hard_ones() -> None:
    reference, logps = policies(1), policies(3)
    pairs = PairCounts.draw(reference, policies(2), GAMMA, 500, draw())
    bound = objective("dpo", beta=0.3)
    total = torch.zeros(2).double()
    for chosen, rejected, count in ((pairs.first, pairs.second, pairs.wins), (pairs.second, pairs.first, pairs.losses)):
        margin = logps[:, chosen] - logps[:, rejected] - reference[:, chosen] + reference[:, rejected]
        total += (count * torch.nn.functional.softplus(-0.3 * margin)).sum(-1)
    expected = total / (pairs.wins + pairs.losses).sum(-1)
    torch.testing.assert_close(pair_loss(bound, pairs, reference)(logps), expected)


TARGET, REFERENCE = policies(1), policies(2)
EXACT = PairCounts.exact(REFERENCE, TARGET, GAMMA)


@pytest.mark.parametrize("name", ["pmle", "pd", "rkl"])
def test_distribution_learning_ends_at_the_target(name: str) -> None:
    losses: dict[str, Callable[[], Loss]] = {
        "pmle": lambda: pair_loss(objective("pmle", gamma=GAMMA), EXACT, REFERENCE),
        "pd": lambda: pair_loss(objective("pd", gamma=GAMMA), EXACT, REFERENCE, GAMMA * TARGET),
        "rkl": lambda: reverse_kl_loss(GAMMA * TARGET, REFERENCE, gamma=GAMMA),
    }
    assert float(forward_kl(TARGET, fitted(losses[name]())).max()) < 1e-5


def test_dpo_ends_elsewhere() -> None:
    """Without a reference in the labels its limit is pi0 pi* / Z."""
    found = fitted(pair_loss(objective("dpo", beta=GAMMA), EXACT, REFERENCE))
    wrong = (REFERENCE + TARGET).log_softmax(-1)
    assert float(forward_kl(wrong, found).max()) < 1e-5
    assert float(forward_kl(TARGET, found).min()) > 0.3


def test_distillation_is_exact_once_pairs_connect_all_sequences() -> None:
    """O6: noiseless rewards, the pairs of one data set."""
    pairs = PairCounts.draw(REFERENCE, TARGET, GAMMA, 8000, draw())
    found = fitted(pair_loss(objective("pd", gamma=GAMMA), pairs, REFERENCE, GAMMA * TARGET), steps=1500)
    assert float(forward_kl(TARGET, found).max()) < 1e-3


def test_a_transformer_learns_the_target_too() -> None:
    model = tiny_llama(V, L, seed=0)
    target = TARGET[0]
    loss = pair_loss(objective("pd", gamma=GAMMA), PairCounts.exact(REFERENCE[0], target, GAMMA), REFERENCE[0],
                     GAMMA * target)  # fmt: skip
    before = float(forward_kl(target, model_logps(model, V, L).detach()))
    found = fit(model.parameters(), lambda: model_logps(model, V, L), loss, steps=300, lr=0.01)
    assert before > 0.2 and float(forward_kl(target, found)) < 0.01
