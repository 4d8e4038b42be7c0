"""Claims of "Coverage Improvement and Fast Convergence of On-policy Preference Learning", arXiv 2601.08421.

Only the abstract and a public reading note could be read: the paper's own theorems, designs, updates and numbers are
not known, and none is quoted. What is measured is what the abstract says, on constructions of ours: a bandit whose
target puts half of its mass on eight rare actions, and language models of 64 sequences. What counts as reproduced was
set from runs of an independent script with other seeds; for the language models, from a pilot with ten of them.

Everything is exact but for the pairs and labels that are drawn; the spread is over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.align.bandit import (
    Bandit,
    Course,
    counts_of,
    distil,
    forward_kl,
    preference_rounds,
    rare_arms,
    well_covered,
)
from burnish.align.coverage import trace_coverage
from burnish.align.enumerable import PairCounts, fit, pair_loss, random_tree, tree_logps
from burnish.align.objectives import objective
from burnish.runs.claims import Claim, Measurement, Verdict

RUNS, ROUNDS = 200, 6
RARITIES = (0.05, 0.01, 0.002)
BATCHES = (250, 500, 1000, 2000, 4000, 8000)


def verdict(whole: bool, part: bool) -> Verdict:
    return "reproduced" if whole else "partly" if part else "not reproduced"


def shown(values: Tensor) -> str:
    """The median of runs and, in brackets, their middle 90 %."""
    low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype)).tolist()
    return f"{middle:.3g} ({low:.2g}-{high:.2g})"


def medians(rounds: Tensor) -> list[float]:
    """Median over runs of each round; `rounds` is [rounds, runs]."""
    found: list[float] = rounds.median(1).values.tolist()
    return found


@cache
def course(rarity: float, samplers: tuple[str, ...], count: int, accumulate: bool) -> Course:
    return preference_rounds(
        rare_arms(rarity), samplers, count, runs=RUNS, generator=torch.Generator().manual_seed(0), accumulate=accumulate
    )


def online(rarity: float, count: int, accumulate: bool = False) -> Course:
    return course(rarity, ("policy",) * ROUNDS, count, accumulate)


def offline(rarity: float, count: int) -> Course:
    return course(rarity, ("reference",) * ROUNDS, count, True)


def record(found: Course) -> dict[str, Any]:
    """For the results: per round the median KL, its middle 90 %, and the coverage by the sampler."""
    levels = torch.tensor([0.05, 0.95], dtype=found.kl.dtype)
    return {
        "median kl": medians(found.kl),
        "middle 90 %": found.kl.quantile(levels, 1).T.tolist(),
        "median coverage": medians(found.coverage),
    }


def floor(bandit: Bandit, count: int) -> float:
    """d / (n beta^2): the KL that as many pairs of the target itself would leave, for small margins."""
    return len(bandit.theta) / (count * bandit.beta**2)


def exponential(scratch: Path) -> Measurement:
    """KL by round and batch, each batch used once."""
    found = {count: medians(online(0.01, count).kl) for count in BATCHES}
    above, below, bound = found[4000], found[250], 3 * floor(rare_arms(0.01), 4000)
    falls = all(later < earlier / 3 or later < bound for earlier, later in pairwise(above[:4]))
    fast = falls and above[0] > 10 * bound and max(above[3:]) < bound
    stuck = below[-1] > below[0] / 2
    return Measurement(
        verdict(fast and stuck, fast or stuck),
        "median KL by round: "
        + "; ".join(f"n={count} " + ", ".join(f"{kl:.3g}" for kl in kls) for count, kls in found.items()),
        {str(count): record(online(0.01, count)) for count in BATCHES} | {"runs": RUNS},
    )


def coverage_improves(scratch: Path) -> Measurement:
    """Coverage of the target by the sampler of each round."""
    details, ends, text = {}, [], []
    for rarity in RARITIES:
        found = online(rarity, 4000).coverage
        ends.append(float(found[-1].median()))
        details[f"rarity {rarity:g}"] = record(online(rarity, 4000))
        text.append(f"rarity {rarity:g}: " + ", ".join(f"{value:.3g}" for value in medians(found)))
    small = online(0.01, 250).coverage
    stays = float(small[-1].median()) > 30
    covered = max(ends) < 2
    return Measurement(
        verdict(covered and stays, covered),
        f"median C by round, n=4000: {'; '.join(text)}; n=250, rarity 0.01, at the end {shown(small[-1])}",
        details | {"n 250": record(online(0.01, 250)), "runs": RUNS},
    )


def against_offline(scratch: Path) -> Measurement:
    """Both fitted to all labels so far, 24,000 at the end."""
    ratios, monotone, details, text = {}, True, {}, []
    for rarity in RARITIES:
        mine, other = online(rarity, 4000, True), offline(rarity, 4000)
        ratios[rarity] = float(other.kl[-1].median() / mine.kl[-1].median())
        kls = medians(mine.kl)
        monotone &= all(later < earlier for earlier, later in pairwise(kls))
        details[f"rarity {rarity:g}"] = {"online": record(mine), "offline": record(other)}
        text.append(
            f"rarity {rarity:g}: {shown(mine.kl[-1])} against {shown(other.kl[-1])}, {ratios[rarity]:.0f} times"
        )
    apart = ratios[0.01] >= 10 and ratios[0.002] >= 10 and ratios[0.05] >= 4
    return Measurement(
        verdict(apart and monotone, apart or monotone),
        f"KL after 24,000 labels, on-policy against offline: {'; '.join(text)}",
        details | {"runs": RUNS, "monotone": monotone},
    )


def accumulated(scratch: Path) -> Measurement:
    """The last of six rounds."""
    ratios, text, details = [], [], {}
    for rarity in (0.05, 0.01):
        fresh, kept = online(rarity, 4000).kl[-1], online(rarity, 4000, True).kl[-1]
        ratios.append(float(fresh.median() / kept.median()))
        text.append(f"rarity {rarity:g}: {shown(fresh)} against {shown(kept)}, {ratios[-1]:.1f} times")
        details[f"rarity {rarity:g}"] = {"fresh": fresh.tolist(), "accumulated": kept.tolist()}
    return Measurement(
        verdict(all(3 < ratio < 9 for ratio in ratios), all(ratio > 1.5 for ratio in ratios)),
        f"KL after six rounds of 4,000, fresh against accumulated: {'; '.join(text)}",
        details,
    )


def two_rounds(scratch: Path) -> Measurement:
    """A design and then the policy, half of each, and the policy alone."""
    ways = {"design, policy": ("design", "policy"), "half and half": ("hybrid",) * 2, "policy": ("policy",) * 2}
    found = {name: {r: course(r, samplers, 4000, True).kl[-1] for r in RARITIES} for name, samplers in ways.items()}
    bound = 3 * floor(rare_arms(0.01), 8000)
    spans = {
        name: max(float(kl.median()) for kl in by.values()) / min(float(kl.median()) for kl in by.values())
        for name, by in found.items()
    }
    ours = ("design, policy", "half and half")
    good = [spans[name] < 3 and all(float(kl.median()) < bound for kl in found[name].values()) for name in ours]
    return Measurement(
        verdict(all(good) and spans["policy"] > 10, any(good)),
        f"KL after 8,000 labels at rarities {RARITIES} (floor {bound / 3:.3g}): "
        + "; ".join(f"{name} " + ", ".join(shown(kl) for kl in by.values()) for name, by in found.items()),
        {
            "spans": spans,
            "runs": RUNS,
            "kl": {name: {str(r): kl.tolist() for r, kl in by.items()} for name, by in found.items()},
        },
    )


def no_gap(scratch: Path) -> Measurement:
    """20 contexts, 50 actions, random unit features, a uniform reference: nothing is rare."""
    bandit = well_covered(torch.Generator().manual_seed(0))
    start = torch.zeros_like(bandit.theta)

    def run(sampler: str) -> Course:
        draw = torch.Generator().manual_seed(0)
        return preference_rounds(bandit, [sampler] * ROUNDS, 1000, runs=40, generator=draw, accumulate=True)

    mine, other = run("policy"), run("reference")
    ratios = (other.kl.median(1).values / mine.kl.median(1).values).tolist()
    covariances = bandit.covariance(start), bandit.covariance(bandit.theta)
    return Measurement(
        verdict(max(ratios) < 2 and min(ratios) > 0.5, max(ratios[1:]) < 4),
        f"C = {float(bandit.coverage(start)):.2f}, C_tr = {float(trace_coverage(*covariances)):.1f} of"
        f" {len(start)}; KL after 6,000 labels {shown(mine.kl[-1])} on-policy, {shown(other.kl[-1])} offline; ratio by"
        f" round {', '.join(f'{ratio:.2f}' for ratio in ratios)}",
        {"on-policy": record(mine), "offline": record(other)},
    )


def distillation(scratch: Path) -> Measurement:
    """Six actions, noiseless rewards, 400 uniform pairs a round; ten problems."""
    fixed, moving = [], []
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        uniform = torch.full((1, 6), 1 / 6, dtype=torch.float64).log()
        rewards = torch.randn(6, generator=draw, dtype=torch.float64)
        bandit = Bandit(torch.eye(6, dtype=torch.float64).unsqueeze(0), uniform, rewards / 0.5, beta=0.5)
        for kls, base_moves in ((fixed, False), (moving, True)):
            start = theta = torch.zeros(6, dtype=torch.float64)
            found = []
            for _ in range(4):
                counts = counts_of(400, bandit.pair_probabilities(start), draw)
                base = theta if base_moves else start
                theta = distil(bandit, counts, base=base, eta=1 / bandit.beta)
                found.append(float(bandit.kl(theta)))
            kls.append(found)
    exact = max(map(max, fixed)) < 1e-10
    past = all(later > earlier for kls in moving for earlier, later in pairwise(kls))
    middle = torch.tensor(moving).median(0).values.tolist()
    return Measurement(
        verdict(exact and past, exact),
        f"largest KL of any round and problem with the reference fixed {max(map(max, fixed)):.1e}; median by round with"
        f" the reference of the round before {', '.join(f'{kl:.3f}' for kl in middle)}",
        {"fixed": fixed, "moving": moving},
    )


@cache
def language_model(sampler: str) -> Tensor:
    """KL to the target by round and model, [rounds, models], trained by gradients on all labels so far."""
    models, beta, count = 20, 0.5, 4000
    draw = torch.Generator().manual_seed(0)
    logits = random_tree(draw, models)
    logits[..., 0] += 2.0  # the reference prefers the first token everywhere, the target does not
    reference, target = tree_logps(logits, 4, 3), tree_logps(random_tree(draw, models), 4, 3)
    logits.requires_grad_()
    current, pairs, kls = reference, None, []
    for _ in range(ROUNDS):
        drawn = PairCounts.draw(current if sampler == "policy" else reference, target - reference, beta, count, draw)
        pairs = drawn if pairs is None else pairs + drawn
        loss = pair_loss(objective("dpo", beta=beta), pairs, reference)
        current = fit([logits], lambda: tree_logps(logits, 4, 3), loss, steps=600)
        kls.append(forward_kl(target, current))
    return torch.stack(kls)


def trained(scratch: Path) -> Measurement:
    """On-policy and offline DPO of whole language models."""
    mine, other = language_model("policy"), language_model("reference")
    better = (mine[-1] < other[-1]).double().mean().item()
    ratio = float(other[-1].median() / mine[-1].median())
    kls = medians(mine)
    monotone = all(later < earlier for earlier, later in pairwise(kls))
    return Measurement(
        verdict(ratio >= 10 and monotone and better == 1, ratio >= 3),
        f"KL after 24,000 labels {shown(mine[-1])} on-policy, {shown(other[-1])} offline, {ratio:.0f} times; on-policy"
        f" by round {', '.join(f'{kl:.3g}' for kl in kls)}; better for {better:.0%} of the models",
        {"on-policy": mine.tolist(), "offline": other.tolist()},
    )


BANDIT = (
    "a context, a common and 8 rare actions, one feature each; the target gives the rare ones half of its mass, the"
    f" reference 0.05, 0.01 or 0.002 (C = 15, 77, 385); beta 0.5, ridge 0.01, norm at most 1.5 times the target's;"
    f" Bradley-Terry labels, {RUNS} runs, medians of the exact KL(target || policy)"
)


def claim(
    name: str,
    statement: str,
    setting: str,
    reproduced_if: str,
    measure: Callable[[Path], Measurement],
    source: str = "",
) -> Claim:
    return Claim(
        name=name,
        source=source or "abstract; instance and rule are ours",
        statement=statement,
        paper_number="not known",
        setting=setting,
        reproduced_if=reproduced_if,
        budget="cpu-minutes",
        measure=measure,
    )


CLAIMS: Sequence[Claim] = [
    claim(
        "exponential-convergence",
        "On-policy DPO with a fixed reference converges exponentially in rounds once the batch exceeds a threshold of"
        " coverage, down to a floor set by the batch; a smaller batch makes no progress.",
        f"{BANDIT}; rarity 0.01, {ROUNDS} rounds, each fitted to its own batch",
        "4,000 pairs a round: each of rounds 2 to 4 at most a third of the one before or below 3 d / (n beta^2), from"
        " the fourth on below that, the first 10 times above it; and 250 pairs: the sixth above half of the first."
        " Partly if one of the two",
        exponential,
    ),
    claim(
        "coverage-improves",
        "Each update moves to a region where the sampler covers the target better.",
        f"{BANDIT}; 4,000 and 250 pairs a round; spectral coverage of the target by the policy that samples",
        "median C of the sixth sampler below 2 at every rarity with 4,000 pairs, above 30 with 250 at rarity 0.01;"
        " partly if the first",
        coverage_improves,
    ),
    claim(
        "on-policy-against-offline",
        "At equal labels on-policy learning beats any that samples the reference alone, with monotone gains.",
        f"{BANDIT}; 4,000 pairs a round, fitted to all so far; offline draws every pair from the reference",
        "KL after six rounds at least 10 times lower at rarities 0.01 and 0.002, 4 times at 0.05, and falling in every"
        " round; partly if one of the two",
        against_offline,
    ),
    claim(
        "accumulated-against-fresh",
        "Fitting all batches so far ends lower than fitting the last one alone, by about the number of rounds.",
        f"{BANDIT}; 4,000 pairs a round",
        "between 3 and 9 times lower after six rounds at rarities 0.05 and 0.01; partly if more than 1.5 times",
        accumulated,
        "ours: the round error d / (n beta^2) against d / (N beta^2)",
    ),
    claim(
        "two-rounds",
        "A sampler with a preferential G-optimal design converges in two rounds, whatever the coverage.",
        f"{BANDIT}; 4,000 pairs a round, fitted to both; design and then policy, half and half twice, policy twice."
        " The paper's design and mixing rule are not known",
        "both with a design: median below 3 d / (N beta^2) at every rarity, and those within a factor of 3 of each"
        " other; the policy alone: more than a factor of 10. Partly if one with a design does",
        two_rounds,
    ),
    claim(
        "no-gap-when-covered",
        "Where the reference covers the target there is nothing to gain (negative test).",
        "20 contexts, 50 actions, 8 random features of norm 1, uniform reference, |theta*| = 3, beta 0.5; six rounds"
        " of 1,000 pairs, fitted to all so far, 40 runs",
        "median KL offline between 0.5 and 2 times that on-policy in every round; partly if below 4 times",
        no_gap,
        "implied by the abstract; ours",
    ),
    claim(
        "fixed-reference-distillation",
        "Reward distillation against a fixed reference stays at its target; regression against the policy of the round"
        " before (REBEL) goes on sharpening.",
        "one context, 6 actions, normal rewards without noise, uniform reference, beta 0.5, eta 1 / beta; four rounds"
        " of 400 pairs of uniform actions, ten problems. The paper's own updates are not known",
        "KL below 1e-10 in every round and problem with the reference fixed, growing in every round with the moving"
        " one; partly if the first",
        distillation,
    ),
    claim(
        "on-policy-language-model",
        "On-policy DPO beats offline DPO at equal labels when language models are trained by gradients.",
        "20 autoregressive tables over 64 sequences (4 tokens, length 3); the reference prefers one token by 2 nats"
        " everywhere, the target does not; beta 0.5, six rounds of 4,000 pairs, all so far, Adam from the last weights",
        "median KL at least 10 times lower after six rounds, falling in every round, and lower for every model; partly"
        " if 3 times",
        trained,
    ),
]
