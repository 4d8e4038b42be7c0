"""The exact laboratory: closed forms, the objectives of the library, asymptotics, rounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.align.bandit import (
    SAMPLERS,
    Bandit,
    Tables,
    counts_of,
    distil,
    fit_preferences,
    forward_kl,
    label,
    optimum,
    preference_rounds,
    rare_arms,
    well_covered,
)
from burnish.align.coverage import trace_coverage
from burnish.align.objectives import objective


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small() -> Bandit:
    return Bandit(seeded(3, 5, 2), seeded(3, 5, seed=1).log_softmax(-1), torch.tensor([0.7, -1.1]).double(), 0.4)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value(policy: Tensor, rewards: Tensor, log_reference: Tensor, gamma: float, beta: float) -> Tensor:
    """E[R] + gamma H - beta KL to the reference."""
    return (policy.exp() * (rewards - gamma * policy - beta * (policy - log_reference))).sum(-1)


REFERENCE = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
REWARDS = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=torch.float64)


def test_optimum_of_the_worked_example() -> None:
    found = optimum(REWARDS, REFERENCE, gamma=0.3, beta=0.2)
    assert found.exp().tolist() == pytest.approx([0.03450, 0.20780, 0.00784, 0.74986], abs=5e-6)
    assert float(value(found, REWARDS, REFERENCE, 0.3, 0.2)) == pytest.approx(1.544789, abs=5e-7)
    rlhf = optimum(REWARDS, REFERENCE, gamma=0.0, beta=0.5)
    assert rlhf.exp().tolist() == pytest.approx([0.09088, 0.40291, 0.01003, 0.49618], abs=5e-6)


@pytest.mark.parametrize(("gamma", "beta"), [(0.3, 0.2), (0.0, 0.5), (0.4, 0.0)])
def test_the_optimum_is_better_than_anything_near_it(gamma: float, beta: float) -> None:
    found = optimum(REWARDS, REFERENCE, gamma=gamma, beta=beta)
    near = (found + 0.01 * seeded(200, 4)).log_softmax(-1)
    best = value(found, REWARDS, REFERENCE, gamma, beta)
    assert bool((value(near, REWARDS, REFERENCE, gamma, beta) < best).all())
    scaled = (beta * REFERENCE + REWARDS) / (beta + gamma)
    assert float(best) == pytest.approx((beta + gamma) * float(scaled.logsumexp(-1)))


def test_limits_of_the_optimum() -> None:
    uniform = torch.full((4,), 0.25, dtype=torch.float64).log()
    torch.testing.assert_close(
        optimum(REWARDS, uniform, gamma=0.3, beta=0.2), optimum(REWARDS, uniform, gamma=0.0, beta=0.5)
    )
    target = seeded(4, seed=4).log_softmax(-1)
    torch.testing.assert_close(optimum(0.3 * target, REFERENCE, gamma=0.3, beta=0.0), target)
    torch.testing.assert_close(
        optimum(REWARDS + 7, REFERENCE, gamma=0.3, beta=0.2), optimum(REWARDS, REFERENCE, gamma=0.3, beta=0.2)
    )
    # DPO at its beta, on labels that know no reference, ends at pi0 pi* / Z
    wrong = optimum(0.3 * target, REFERENCE, gamma=0.0, beta=0.3)
    torch.testing.assert_close(wrong, (REFERENCE + target).log_softmax(-1))


def test_forward_kl_by_hand() -> None:
    target, policy = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.5], [0.25, 0.75]))
    assert float(forward_kl(target, policy)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_counts_are_those_of_independent_draws() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.05, 0.3, 0.05], dtype=torch.float64)  # the rest is another outcome
    counts = counts_of(50, probabilities.expand(40_000, -1), draw())
    assert bool((counts[:, 1] == 0).all()) and bool((counts == counts.round()).all())
    assert bool((counts.sum(1) <= 50).all())
    mean, spread = counts.mean(0), counts.T.cov()
    expected = 50 * (torch.diag(probabilities) - torch.outer(probabilities, probabilities))
    errors = (expected.diagonal() / 40_000).sqrt()
    assert bool(((mean - 50 * probabilities).abs() <= 4 * errors).all())
    torch.testing.assert_close(spread, expected, atol=0.25, rtol=0)
    whole = counts_of(1000, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), draw())
    assert float(whole.sum()) == 1000


@pytest.mark.parametrize("scale", [0.02, 0.5, 3.0])
def test_fit_of_one_kind_of_pair_is_its_log_odds(scale: float) -> None:
    z, wins, losses = (torch.tensor(value, dtype=torch.float64) for value in ([[2.0]], [30.0], [10.0]))
    found = fit_preferences(z, wins, losses, scale=scale)
    assert float(found) == pytest.approx(math.log(3) / (2 * scale), rel=1e-7)


def test_the_fit_is_where_the_gradient_of_dpo_vanishes() -> None:
    """O4: in the linear class DPO is a logistic regression on the differences of features."""
    bandit = small()
    wins, losses = label(bandit, bandit.pair_probabilities(torch.zeros(2).double()), 500, draw())
    theta = fit_preferences(bandit.pairs[0], wins, losses, scale=bandit.beta).requires_grad_()
    context, first, second = bandit.pairs[1].unbind(1)
    policy, reference = bandit.log_policy(theta), bandit.log_reference
    named = {
        "chosen_logps": policy[context, first],
        "rejected_logps": policy[context, second],
        "ref_chosen_logps": reference[context, first],
        "ref_rejected_logps": reference[context, second],
        "labels": (wins / (wins + losses)).nan_to_num(0.5),
    }
    loss = ((wins + losses) * objective("dpo", beta=bandit.beta)(named)).sum()
    (slope,) = torch.autograd.grad(loss, theta)
    assert float(slope.abs().max()) < 1e-6 < 0.1 < float(theta.detach().abs().max())


def test_a_pair_of_equal_responses_says_nothing() -> None:
    """O5: it costs ln 2, whatever the policy, and moves nothing."""
    logps = torch.tensor([-3.0], requires_grad=True)
    named = dict.fromkeys(("chosen_logps", "rejected_logps"), logps) | dict.fromkeys(
        ("ref_chosen_logps", "ref_rejected_logps"), torch.tensor([-4.0])
    )
    loss = objective("dpo", beta=0.5)(named)
    assert loss.item() == pytest.approx(math.log(2))
    assert float(torch.autograd.grad(loss.sum(), logps)[0]) == 0
    one = fit_preferences(seeded(6, 2), seeded(6).exp(), seeded(6, seed=1).exp(), scale=1.0)
    differences = torch.cat([seeded(6, 2), torch.zeros(1, 2)])
    more = fit_preferences(differences, torch.cat([seeded(6).exp(), torch.tensor([9.0])]),
                           torch.cat([seeded(6, seed=1).exp(), torch.tensor([2.0])]), scale=1.0)  # fmt: skip
    torch.testing.assert_close(one, more)


def test_a_capped_fit_is_the_best_of_its_norm() -> None:
    differences, wins, losses = seeded(20, 3), seeded(2, 20).exp(), seeded(2, 20, seed=1).exp()

    def likelihood(theta: Tensor) -> Tensor:
        margins = theta @ differences.mT
        positive, negative = (torch.nn.functional.logsigmoid(m) for m in (margins, -margins))
        return (wins * positive + losses * negative).sum(-1)

    free = fit_preferences(differences, wins, losses, scale=1.0)
    cap = float(free.norm(dim=-1).min()) * 0.5
    found = fit_preferences(differences, wins, losses, scale=1.0, cap=cap)
    torch.testing.assert_close(found.norm(dim=-1), torch.full((2,), cap).double(), atol=1e-6, rtol=0)
    others = torch.nn.functional.normalize(found + 0.1 * seeded(500, 2, 3), dim=-1) * cap
    assert bool((likelihood(others) < likelihood(found) + 1e-6).all())
    above = float(free.norm(dim=-1).max()) * 1.01
    torch.testing.assert_close(fit_preferences(differences, wins, losses, scale=1.0, cap=above), free)


def test_problems_side_by_side_are_fitted_as_if_alone() -> None:
    differences, wins, losses = seeded(20, 3), seeded(4, 20).exp() * 50, seeded(4, 20, seed=1).exp()
    together = fit_preferences(differences, wins, losses, scale=0.3, ridge=0.01)
    alone = fit_preferences(differences, wins[2], losses[2], scale=0.3, ridge=0.01)
    torch.testing.assert_close(together[2], alone)


def test_labels_that_are_always_the_same_stay_finite() -> None:
    wins, losses = torch.full((1,), 1e6).double(), torch.zeros(1).double()
    found = fit_preferences(torch.ones(1, 1).double(), wins, losses, scale=1.0, ridge=0.01)
    slope = 1e6 * torch.sigmoid(-found) - 0.01 * found  # of ridge and likelihood
    assert 10 < float(found) < 30 and abs(float(slope)) < 1e-6


def test_the_policy_and_its_pairs_by_enumeration() -> None:
    bandit, theta = small(), torch.tensor([0.3, 0.2]).double()
    policy = bandit.log_policy(theta).exp()
    direct = bandit.log_reference.exp() * (bandit.features @ theta).exp()
    torch.testing.assert_close(policy, direct / direct.sum(-1, keepdim=True))
    torch.testing.assert_close(bandit.log_policy(torch.zeros(2).double()), bandit.log_reference)
    probabilities = bandit.pair_probabilities(theta)
    ties = policy.square().sum(-1).mean()
    assert float(probabilities.sum() + ties) == pytest.approx(1)
    differences = bandit.pairs[0]
    square = torch.einsum("p,pd,pe->de", probabilities, differences, differences)
    torch.testing.assert_close(square, 2 * bandit.covariance(theta))
    assert float(bandit.kl(bandit.theta)) == 0 and float(bandit.coverage(bandit.theta)) == pytest.approx(1)


def test_labels_are_bradley_terry_in_rewards() -> None:
    bandit = small()
    rewards = bandit.beta * (bandit.log_policy(bandit.theta) - bandit.log_reference)
    context, first, second = bandit.pairs[1].unbind(1)
    torch.testing.assert_close(bandit.preferences, torch.sigmoid(rewards[context, first] - rewards[context, second]))
    wins, losses = label(bandit, bandit.pair_probabilities(torch.zeros(2).double()), 10**6, draw())
    shares = wins / (wins + losses)
    errors = (bandit.preferences * (1 - bandit.preferences) / (wins + losses)).sqrt()
    assert bool(((shares - bandit.preferences).abs() < 4 * errors).all())


def test_soft_labels_find_the_target_without_noise() -> None:
    for bandit in (small(), rare_arms(0.05)):
        kinds = torch.full_like(bandit.preferences, 1 / len(bandit.preferences))
        wins, losses = label(bandit, kinds, 10**5, draw(), "soft")
        found = fit_preferences(bandit.pairs[0], wins, losses, scale=bandit.beta)
        torch.testing.assert_close(found, bandit.theta, atol=1e-6, rtol=0)


def test_distillation_with_the_fixed_reference_is_exact_and_stays() -> None:
    """O6, O7: noiseless rewards and pairs that span give the target; REBEL goes on past it."""
    bandit = small()
    counts = counts_of(400, bandit.pair_probabilities(torch.zeros(2).double()), draw())
    fixed = moving = torch.zeros(2).double()
    for round in range(1, 4):
        fixed = distil(bandit, counts, base=torch.zeros(2).double(), eta=1 / bandit.beta)
        moving = distil(bandit, counts, base=moving, eta=1 / bandit.beta)
        assert abs(float(bandit.kl(fixed))) < 1e-15
        torch.testing.assert_close(moving, round * bandit.theta)
    target = bandit.log_policy(bandit.theta)
    sharpened = (bandit.log_reference + 3 * (target - bandit.log_reference)).log_softmax(-1)
    past = float(bandit.kl(moving))
    assert past == pytest.approx(float(forward_kl(target, sharpened).mean())) and past > 0.3


def test_distillation_learns_nothing_outside_of_the_span() -> None:
    bandit = small()
    counts = torch.zeros(len(bandit.preferences)).double()
    counts[3] = 5
    found, z = distil(bandit, counts, base=torch.zeros(2).double(), eta=1.0), bandit.pairs[0][3]
    torch.testing.assert_close(found, z * (bandit.beta * z @ bandit.theta) / (z @ z))


@pytest.mark.parametrize(
    ("rarity", "spectral", "trace"), [(0.01, 76.93, 381.7), (0.05, 15.39, 76.56), (0.002, 384.7, 1907.7)]
)
def test_rare_arms_are_badly_covered(rarity: float, spectral: float, trace: float) -> None:
    bandit = rare_arms(rarity)
    start = torch.zeros(8).double()
    assert float(bandit.coverage(start)) == pytest.approx(spectral, rel=1e-3)
    covariances = bandit.covariance(start), bandit.covariance(bandit.theta)
    assert float(trace_coverage(*covariances)) == pytest.approx(trace, rel=1e-3)
    target = bandit.log_policy(bandit.theta)[0].exp()
    logits = torch.cat([torch.tensor([math.log(8)]), torch.linspace(-0.5, 0.5, 8)]).double()
    torch.testing.assert_close(target, logits.softmax(-1))
    assert float(bandit.log_reference.exp()[0, 1:].sum()) == pytest.approx(rarity)


def test_the_error_of_one_round_is_that_of_its_information() -> None:
    """n E KL -> tr(Sigma* I^-1) / 2 with I = beta^2 E[sigma' z z']; where margins are small about C_tr / beta^2."""
    bandit = well_covered(draw(), contexts=2, actions=6, dimension=3, norm=0.5)
    start, n, runs = torch.zeros(3).double(), 200_000, 400
    course = preference_rounds(bandit, ["reference"], n, runs=runs, generator=draw(1), ridge=1e-9)
    differences, p = bandit.pairs[0], bandit.preferences
    weight = bandit.beta**2 * bandit.pair_probabilities(start) * p * (1 - p)
    information = torch.einsum("p,pd,pe->de", weight, differences, differences)
    target = bandit.covariance(bandit.theta)
    expected = float((target @ information.inverse()).trace()) / 2
    found = n * course.kl[0]
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(runs)
    simple = float(trace_coverage(bandit.covariance(start), target)) / bandit.beta**2
    assert simple == pytest.approx(expected, rel=0.05)


def rounds(*samplers: str, n: int = 4000, rarity: float = 0.01, **options: Any) -> Any:
    return preference_rounds(rare_arms(rarity), samplers, n, runs=20, generator=draw(), **options)


def test_the_first_round_is_offline_and_the_end_is_not() -> None:
    online, offline = (rounds(*[sampler] * 6, accumulate=True) for sampler in ("policy", "reference"))
    torch.testing.assert_close(online.theta[0], offline.theta[0])
    assert float(online.coverage[0, 0]) == pytest.approx(76.93, rel=1e-3)
    assert float(online.coverage[-1].median()) < 2 and bool((offline.coverage[1:] != 76.93).any())
    assert float(offline.kl[-1].median() / online.kl[-1].median()) > 10


def test_accumulation_keeps_what_earlier_rounds_learned() -> None:
    fresh, kept = (rounds(*["policy"] * 6, accumulate=keep, rarity=0.05) for keep in (False, True))
    assert 2 < float(fresh.kl[-1].median() / kept.kl[-1].median()) < 10


@pytest.mark.parametrize("samplers", [("design", "policy"), ("hybrid", "hybrid")])
def test_a_design_needs_two_rounds_however_badly_covered(samplers: tuple[str, str]) -> None:
    for rarity in (0.05, 0.002):
        assert float(rounds(*samplers, accumulate=True, rarity=rarity).kl[-1].median()) < 0.015


def test_norms_are_capped_and_runs_are_repeatable() -> None:
    first, again = (rounds("reference", n=250, ridge=1e-6) for _ in range(2))
    assert torch.equal(first.theta, again.theta)
    assert float(first.theta.norm(dim=-1).max()) == pytest.approx(1.5 * float(rare_arms(0.01).theta.norm()), rel=1e-6)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="sampler='on-policy' is unknown: choose one of policy, reference"):
        rounds("policy", "on-policy")
    with pytest.raises(ValueError, match="labels='mild' is unknown: choose one of hard, soft"):
        rounds("policy", labels="mild")


def test_samplers_are_distributions_over_pairs() -> None:
    bandit, theta = small(), seeded(4, 2)
    found = {name: sampler(bandit, theta) for name, sampler in SAMPLERS.items()}
    assert all(each.shape == (4, 30) and float(each.sum(-1).max()) <= 1 + 1e-12 for each in found.values())
    torch.testing.assert_close(found["hybrid"], (found["design"] + found["policy"]) / 2)
    torch.testing.assert_close(found["reference"][1], bandit.pair_probabilities(torch.zeros(2).double()))
    assert float(found["design"].sum(-1)[0]) == pytest.approx(1)


def test_pmle_is_the_table_of_bradley_terry_rewards() -> None:
    """Equations 8 and 9: the same policy, fitted in log-probabilities or in rewards."""
    tables = Tables.draw(draw(), 3, contexts=2, actions=4)
    wins, losses = tables.sample(3000, draw(1))
    rewards = tables.rewards(wins, losses)
    torch.testing.assert_close(tables.pmle(wins, losses), optimum(rewards, tables.log_reference, gamma=0.5, beta=0.0))
    torch.testing.assert_close(rewards.mean(-1), torch.zeros(3, 2).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(
        tables.distilled(rewards, wins + losses), (rewards / 0.5).log_softmax(-1), atol=1e-6, rtol=0
    )


def test_labels_of_tables_know_no_reference() -> None:
    tables = Tables.draw(draw(), 1, contexts=1, actions=3, spread=1.0)
    target = tables.log_target[0, 0]
    expected = [target[a].exp() ** 0.5 / (target[a].exp() ** 0.5 + target[b].exp() ** 0.5)
                for a, b in ((0, 1), (0, 2), (1, 2))]  # fmt: skip
    torch.testing.assert_close(tables.preferences[0, 0], torch.stack(expected))
    wins, losses = tables.sample(90_000, draw(1))
    assert float((wins + losses).sum()) == pytest.approx(60_000, abs=4 * math.sqrt(90_000 * 2 / 9))
    assert bool(((wins / (wins + losses))[0, 0] - tables.preferences[0, 0]).abs().lt(0.015).all())


def test_pmle_converges_at_the_rate_of_its_information() -> None:
    """Contexts times (actions - 1) over gamma^2 n: 360 / n, by 4 standard errors over 60 problems."""
    tables = Tables.draw(draw(), 60)
    n = 2**18
    found = n * tables.kl(tables.pmle(*tables.sample(n, draw(1)))) / 360
    assert abs(float(found.mean()) - 1) < 4 * float(found.std()) / math.sqrt(60) + 0.01
    assert float(found.std()) < 0.3
