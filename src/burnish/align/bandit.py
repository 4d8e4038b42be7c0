"""An exact laboratory: contextual bandits in which every policy, divergence and coverage is known without sampling.

Contexts stand for prompts and are equally likely, actions for responses. Pairs are unordered and counted by kind, so
that a data set of any size is two counts a kind of pair, and many runs, in leading dimensions, are fitted at once.
Everything is float64.

Sources: the linear softmax class and its rounds, arXiv 2601.08421 (abstract and a public note; forms reconstructed);
the tables, arXiv 2506.01523, figure 1 and appendix D.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from burnish.align.coverage import sampling_covariance, spectral_coverage
from burnish.align.design import Design, g_optimal_design, pair_differences

Labels = Literal["hard", "soft"]


def forward_kl(log_target: Tensor, log_policy: Tensor) -> Tensor:
    """KL(pi* || pi) in nats over the last dimension."""
    return (log_target.exp() * (log_target - log_policy)).sum(-1)


def optimum(rewards: Tensor, log_reference: Tensor, *, gamma: float, beta: float) -> Tensor:
    """log of pi(a) proportional to pi0(a)^(beta / (beta + gamma)) exp(R(a) / (beta + gamma)), over the last dimension.

    It maximises E[R] + gamma H(pi) - beta KL(pi || pi0) over all distributions: reverse KL. Its limits are the other
    optima: gamma = 0 is RLHF and, with the rewards that Bradley-Terry fits to the pairs, DPO; beta = 0 is PMLE and
    preference distillation.

    Args:
        rewards: [..., actions].
        log_reference: log pi0, [..., actions].
        gamma: weight of the entropy.
        beta: weight of the KL to the reference.

    Source: arXiv 2506.01523, appendix B (RKL, RLHF); equations 6, 8 and 9 (DPO, PMLE).
    """
    return ((beta * log_reference + rewards) / (beta + gamma)).log_softmax(-1)


def counts_of(count: Tensor | float, probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """How often each outcome comes up in that many independent draws, [..., outcomes] float64.

    Args:
        count: number of draws, a scalar or [...].
        probabilities: [..., outcomes]; what they lack of 1 is the probability of any other outcome.
        generator: a binomial draw splits each half of the outcomes in two, whatever the number of draws.
    """
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0)
    outcomes = torch.cat([probabilities, rest], -1)
    leaves = 1 << (outcomes.shape[-1] - 1).bit_length()
    levels = [F.pad(outcomes, (0, leaves - outcomes.shape[-1]))]
    while levels[-1].shape[-1] > 2:
        levels.append(levels[-1].view(*outcomes.shape[:-1], -1, 2).sum(-1))
    counts = torch.as_tensor(count, dtype=probabilities.dtype).expand(probabilities.shape[:-1]).unsqueeze(-1)
    for level in reversed(levels):
        left, right = level[..., ::2], level[..., 1::2]
        share = (left / (left + right)).nan_to_num(0.0)
        drawn = torch.binomial(counts, share, generator=generator)
        counts = torch.stack([drawn, counts - drawn], -1).flatten(-2)
    return counts[..., : probabilities.shape[-1]]


def fit_preferences(
    differences: Tensor, wins: Tensor, losses: Tensor, *, scale: float, ridge: float = 1e-9, cap: float = math.inf
) -> Tensor:
    """The theta of greatest likelihood of labels drawn from sigma(scale theta' z), [..., d], by Newton's method.

    In a linear softmax class it is DPO: the margin beta [log(pi / pi0)(a) - log(pi / pi0)(b)] is beta theta' z, since
    the normaliser is the same for both. With one feature an action it fits a table: Bradley-Terry rewards at scale 1,
    PMLE at scale gamma. Wins and losses may be fractions, which are soft labels.

    Args:
        differences: z of each kind of pair, [pairs, d].
        wins: how often its first response won, [..., pairs].
        losses: how often its second one did, [..., pairs].
        scale: beta or gamma.
        ridge: ridge / 2 |theta|^2 is added to the negative log-likelihood, a sum over pairs.
        cap: the largest norm of theta; where the fit exceeds it, it is the best fit of that norm.
    """
    problem = _Logistic(differences, wins, losses, scale)
    theta = problem.solve(wins.new_full(wins.shape[:-1], ridge))
    if not bool((theta.norm(dim=-1) > cap).any()):
        return theta
    # The best fit of norm cap is a fit with a larger ridge, whose norm falls with it.
    low = wins.new_full(wins.shape[:-1], ridge).log()
    high = (scale * (wins + losses).sum(-1) * differences.norm(dim=-1).max() / cap + ridge).log()
    for _ in range(60):
        middle = (low + high) / 2
        found = problem.solve(middle.exp())
        outside = found.norm(dim=-1) > cap
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return torch.where((theta.norm(dim=-1) > cap).unsqueeze(-1), problem.solve(high.exp()), theta)


@dataclass(frozen=True)
class _Logistic:
    """The penalised negative log-likelihood of `fit_preferences`, whose arguments these are."""

    differences: Tensor
    wins: Tensor
    losses: Tensor
    scale: float

    def value(self, theta: Tensor, ridge: Tensor) -> Tensor:
        margins = self.scale * theta @ self.differences.mT
        likelihood = self.wins * F.logsigmoid(margins) + self.losses * F.logsigmoid(-margins)
        return ridge / 2 * theta.square().sum(-1) - likelihood.sum(-1)

    def solve(self, ridge: Tensor) -> Tensor:
        """The minimiser for a ridge [...] of each problem: Newton steps, halved until the value falls."""
        z, total = self.differences, self.wins + self.losses
        theta = self.wins.new_zeros(*self.wins.shape[:-1], z.shape[1])
        for _ in range(200):
            first = torch.sigmoid(self.scale * theta @ z.mT)
            slope = self.scale * (total * first - self.wins) @ z + ridge.unsqueeze(-1) * theta
            weighted = (total * first * (1 - first)).unsqueeze(-1) * z  # [..., pairs, d]
            curvature = self.scale**2 * weighted.mT @ z + ridge[..., None, None] * torch.eye(z.shape[1]).to(z)
            step = torch.linalg.solve(curvature, slope)
            gain = (step * slope).sum(-1)
            size, before = torch.ones_like(ridge), self.value(theta, ridge)
            for _ in range(40):
                short = self.value(theta - size.unsqueeze(-1) * step, ridge) > before - 1e-4 * size * gain
                short &= gain > 1e-12 * (1 + before.abs())  # below, both values are the same number but for rounding
                if not bool(short.any()):
                    break
                size = torch.where(short, size / 2, size)
            theta = theta - size.unsqueeze(-1) * step
            if bool((gain <= 1e-20 * (1 + before.abs())).all()):
                break
        return theta


@dataclass(frozen=True)
class Bandit:
    """A contextual bandit with the class pi_theta(a|x) proportional to pi0(a|x) exp(theta' phi(x, a)).

    Attributes:
        features: phi, [contexts, actions, d].
        log_reference: log pi0, [contexts, actions].
        theta: of the target pi*, [d].
        beta: labels are P(a beats b | x) = sigma(beta theta*' z), so that the reward is beta theta*' phi.

    Source: arXiv 2601.08421 (the class is named in its abstract; this form of it is reconstructed).
    """

    features: Tensor
    log_reference: Tensor
    theta: Tensor
    beta: float

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """z of every pair of different actions of every context [pairs, d]; context, first and second [pairs, 3]."""
        return pair_differences(self.features)

    @cached_property
    def design(self) -> Design:
        """The preferential G-optimal design over all pairs of all contexts."""
        return g_optimal_design(self.pairs[0], tolerance=1e-3)

    @cached_property
    def preferences(self) -> Tensor:
        """Probability that the first action of each pair is preferred, [pairs]."""
        return torch.sigmoid(self.beta * self.pairs[0] @ self.theta)

    def log_policy(self, theta: Tensor) -> Tensor:
        """log pi_theta(a|x) for theta [..., d]: [..., contexts, actions]."""
        return (self.log_reference + torch.einsum("xad,...d->...xa", self.features, theta)).log_softmax(-1)

    def kl(self, theta: Tensor) -> Tensor:
        """E_x KL(pi* || pi_theta) in nats, exact, [...]."""
        return forward_kl(self.log_policy(self.theta), self.log_policy(theta)).mean(-1)

    def covariance(self, theta: Tensor) -> Tensor:
        """Sampling covariance of pi_theta, [..., d, d]."""
        return sampling_covariance(self.log_policy(theta).exp(), self.features)

    def coverage(self, theta: Tensor) -> Tensor:
        """Spectral coverage of the target by pi_theta, [...]."""
        return spectral_coverage(self.covariance(theta), self.covariance(self.theta))

    def pair_probabilities(self, theta: Tensor) -> Tensor:
        """Probability of each pair if two actions are drawn from pi_theta, [..., pairs].

        They sum to less than 1: a pair of equal actions says nothing, costs a label, and has no kind.
        """
        policy, (context, first, second) = self.log_policy(theta).exp(), self.pairs[1].unbind(1)
        return 2 * policy[..., context, first] * policy[..., context, second] / len(self.features)


SAMPLERS: dict[str, Callable[[Bandit, Tensor], Tensor]] = {
    "policy": lambda bandit, theta: bandit.pair_probabilities(theta),
    "reference": lambda bandit, theta: bandit.pair_probabilities(torch.zeros_like(theta)),
    "design": lambda bandit, theta: bandit.design.weights.expand(*theta.shape[:-1], -1),
    "hybrid": lambda bandit, theta: (bandit.design.weights + bandit.pair_probabilities(theta)) / 2,
}
"""(bandit, current theta [..., d]) -> probability of each pair to be labelled, [..., pairs]."""


@dataclass(frozen=True)
class Course:
    """What rounds did, a row a round.

    Attributes:
        theta: after the round, [rounds, runs, d].
        kl: KL(pi* || pi) after the round, [rounds, runs].
        coverage: spectral coverage of the target by the policy that the round began with, [rounds, runs].
    """

    theta: Tensor
    kl: Tensor
    coverage: Tensor


def label(
    bandit: Bandit, probabilities: Tensor, count: int, generator: torch.Generator, labels: Labels = "hard"
) -> tuple[Tensor, Tensor]:
    """Wins and losses of each pair in that many pairs that are drawn and labelled, both [..., pairs].

    Hard labels are drawn from Bradley-Terry; soft ones are its probabilities.
    """
    counts = counts_of(count, probabilities, generator)
    preferences = bandit.preferences.expand_as(counts)
    wins = counts * preferences if labels == "soft" else torch.binomial(counts, preferences, generator=generator)
    return wins, counts - wins


def preference_rounds(
    bandit: Bandit,
    samplers: Sequence[str],
    count: int,
    *,
    runs: int,
    generator: torch.Generator,
    accumulate: bool = False,
    labels: Labels = "hard",
    ridge: float = 0.01,
    cap: float = 1.5,
) -> Course:
    """Sample pairs, label them, fit DPO; the reference is pi0 in every round, only the sampler is refreshed.

    Args:
        bandit: the problem.
        samplers: for each round a key of SAMPLERS.
        count: pairs a round.
        runs: independent repetitions, done at once.
        generator: draws pairs and labels.
        accumulate: fit to the pairs of all rounds so far, not to the last ones alone.
        labels: "hard" or "soft".
        ridge: of `fit_preferences`.
        cap: of the norm of theta, in norms of theta*.

    Raises:
        ValueError: an unknown sampler or kind of labels.

    Source: on-policy DPO and hybrid sampling of arXiv 2601.08421 (abstract; the mixture of the hybrid sampler and the
    use of both batches in the last fit are reconstructed).
    """
    if unknown := [sampler for sampler in samplers if sampler not in SAMPLERS]:
        raise ValueError(f"sampler={unknown[0]!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    if labels not in get_args(Labels):
        raise ValueError(f"labels={labels!r} is unknown: choose one of {', '.join(get_args(Labels))}")
    differences, theta = bandit.pairs[0], bandit.theta.new_zeros(runs, len(bandit.theta))
    wins = losses = theta.new_zeros(runs, len(differences))
    largest = cap * float(bandit.theta.norm())
    thetas, coverages = [], []
    for sampler in samplers:
        coverages.append(bandit.coverage(theta))
        new_wins, new_losses = label(bandit, SAMPLERS[sampler](bandit, theta), count, generator, labels)
        wins, losses = (wins + new_wins, losses + new_losses) if accumulate else (new_wins, new_losses)
        theta = fit_preferences(differences, wins, losses, scale=bandit.beta, ridge=ridge, cap=largest)
        thetas.append(theta)
    stacked = torch.stack(thetas)
    return Course(stacked, bandit.kl(stacked), torch.stack(coverages))


def distil(bandit: Bandit, counts: Tensor, *, base: Tensor, eta: float) -> Tensor:
    """The theta, [..., d], whose log-ratios to `base` are nearest to eta times the rewards, over pairs in squares.

    With base = 0, the reference, and eta = 1 / beta it is on-policy reward distillation, which stays at the target.
    With base = the current theta it is REBEL, whose target moves on by eta times the reward in each round.

    Args:
        bandit: its rewards are beta theta*' phi, without noise.
        counts: of each pair, [..., pairs].
        base: theta of the policy that log-ratios are taken to, [..., d].
        eta: step in log-ratio for a unit of reward.

    Source: REBEL, arXiv 2404.16767; the fixed-reference form is a reconstruction of ours (arXiv 2601.08421 names such
    schemes in its abstract, its update could not be read).
    """
    differences = bandit.pairs[0]
    wanted = eta * bandit.beta * differences @ bandit.theta  # [pairs]
    moment = (counts.unsqueeze(-1) * differences).mT @ differences
    return base + ((counts * wanted) @ differences).unsqueeze(-2).matmul(torch.linalg.pinv(moment)).squeeze(-2)


def rare_arms(rarity: float, *, arms: int = 8, beta: float = 0.5) -> Bandit:
    """One context, a common action and rare ones; the target gives half of its mass to the rare ones.

    Args:
        rarity: mass of all rare actions together under the reference.
        arms: rare actions, one feature each; the common one has none.
        beta: of the labels.

    Source: ours.
    """
    log_reference = torch.tensor([1 - rarity] + [rarity / arms] * arms, dtype=torch.float64).log()
    logits = torch.cat([torch.tensor([math.log(arms)]), torch.linspace(-0.5, 0.5, arms)]).double()
    theta = (logits - log_reference)[1:] - (logits - log_reference)[0]
    features = torch.cat([torch.zeros(1, arms), torch.eye(arms)]).double()
    return Bandit(features.unsqueeze(0), log_reference.unsqueeze(0), theta, beta)


def well_covered(
    generator: torch.Generator, *, contexts: int = 20, actions: int = 50, dimension: int = 8, norm: float = 3.0
) -> Bandit:
    """Random unit features under a uniform reference: the reference covers the target as well as can be.

    Source: ours.
    """
    features = F.normalize(torch.randn(contexts, actions, dimension, generator=generator).double(), dim=-1)
    theta = norm * F.normalize(torch.randn(dimension, generator=generator).double(), dim=0)
    return Bandit(features, features.new_zeros(contexts, actions).log_softmax(-1), theta, 0.5)


@dataclass(frozen=True)
class Tables:
    """Problems whose class is every distribution: a table of probabilities for each context.

    Attributes:
        log_target: log pi*, [problems, contexts, actions].
        log_reference: log pi0, [problems, contexts, actions].
        gamma: labels are P(a beats b | x) = sigma(gamma log(pi*(a|x) / pi*(b|x))); no reference is in them.

    Source: arXiv 2506.01523, equations 2 and 3.
    """

    log_target: Tensor
    log_reference: Tensor
    gamma: float

    @classmethod
    def draw(
        cls,
        generator: torch.Generator,
        problems: int,
        *,
        contexts: int = 10,
        actions: int = 10,
        gamma: float = 0.5,
        spread: float = 0.1,
    ) -> Tables:
        """Logits of pi* and pi0 that are normal of that standard deviation (arXiv 2506.01523, appendix D.1)."""
        logits = spread * torch.randn(2, problems, contexts, actions, generator=generator, dtype=torch.float64)
        target, reference = logits.log_softmax(-1)
        return cls(target, reference, gamma)

    @cached_property
    def differences(self) -> Tensor:
        """Of one feature an action, [pairs, actions]."""
        return pair_differences([torch.eye(self.log_target.shape[-1], dtype=torch.float64)])[0]

    @property
    def preferences(self) -> Tensor:
        """Probability that the first action of each pair is preferred, [problems, contexts, pairs]."""
        return torch.sigmoid(self.gamma * self.log_target @ self.differences.mT)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Wins and losses in `count` pairs of uniform actions of uniform contexts, both [problems, contexts, pairs]."""
        preferences = self.preferences
        contexts, actions = self.log_target.shape[1:]
        each = torch.full_like(preferences, 2 / (actions**2 * contexts)).flatten(1)
        counts = counts_of(count, each, generator).view_as(preferences)
        wins = torch.binomial(counts, preferences, generator=generator)
        return wins, counts - wins

    def rewards(self, wins: Tensor, losses: Tensor, *, ridge: float = 1e-3) -> Tensor:
        """Bradley-Terry's rewards of greatest likelihood, [problems, contexts, actions], of mean 0 (equation 9)."""
        return fit_preferences(self.differences, wins, losses, scale=1.0, ridge=ridge)

    def pmle(self, wins: Tensor, losses: Tensor, *, ridge: float = 1e-3) -> Tensor:
        """log of the PMLE without KL, fitted in log-probabilities (equation 4)."""
        fitted = fit_preferences(self.differences, wins, losses, scale=self.gamma, ridge=ridge * self.gamma**2)
        return fitted.log_softmax(-1)

    def distilled(self, rewards: Tensor, counts: Tensor, *, ridge: float = 1e-9) -> Tensor:
        """log of the policy that PD fits to the soft labels of the rewards over pairs of these counts (equation 11)."""
        soft = torch.sigmoid(rewards @ self.differences.mT)
        fitted = fit_preferences(
            self.differences, counts * soft, counts * (1 - soft), scale=self.gamma, ridge=ridge * self.gamma**2
        )
        return fitted.log_softmax(-1)

    def kl(self, log_policy: Tensor) -> Tensor:
        """E_x KL(pi* || pi) in nats, [problems]."""
        return forward_kl(self.log_target, log_policy).mean(-1)
