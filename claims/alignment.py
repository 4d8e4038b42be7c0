"""Claims of "Alignment as Distribution Learning" (v2: "Beyond RLHF"), arXiv 2506.01523.

Laboratory: the paper's toy of 10 contexts and 10 actions, and language models over 64 sequences, where every divergence
is exact and the spread is over problems and over the pairs that are drawn. Of the paper's theorems the rates are
checked, not the constants; of its figure 1 the shape, for its plotted values are not known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from burnish.align.bandit import Tables, forward_kl, optimum
from burnish.align.enumerable import (
    Loss,
    PairCounts,
    fit,
    model_logps,
    pair_loss,
    random_tree,
    reverse_kl_loss,
    tiny_llama,
    tree_logps,
)
from burnish.align.objectives import objective
from burnish.runs.claims import Claim, Measurement, Verdict

PROBLEMS = 20
SIZES = tuple(2**power for power in range(6, 21, 2))
BETAS = torch.logspace(-4, 2, 61, dtype=torch.float64).tolist()
GAMMA = 0.5


def verdict(whole: bool, part: bool) -> Verdict:
    return "reproduced" if whole else "partly" if part else "not reproduced"


def spread(values: list[float]) -> str:
    """The mean and its 95 % interval (normal)."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.3g} ± {half:.1g}"


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Of log value against log size, by least squares."""
    line = statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values])
    return line.slope


@cache
def toy() -> tuple[Tables, dict[int, dict[str, Tensor]]]:
    """KL(pi* || pi) of every way and size of data, Tensors [problems]; RLHF and RKL with the best beta of a grid."""
    draw = torch.Generator().manual_seed(0)
    tables, found = Tables.draw(draw, PROBLEMS, gamma=GAMMA), {}
    for size in SIZES:
        wins, losses = tables.sample(size, draw)
        rewards = tables.rewards(wins, losses)
        fresh = sum(tables.sample(size, draw))  # the pairs that PD distils over are others
        found[size] = {
            "PMLE": tables.kl(tables.pmle(wins, losses)),
            "PD": tables.kl(tables.distilled(rewards, fresh)),
            "RKL, beta 0": tables.kl(optimum(rewards, tables.log_reference, gamma=GAMMA, beta=0.0)),
            "RKL": best_beta(tables, rewards, GAMMA),
            "RLHF": best_beta(tables, rewards, 0.0),
        }
    return tables, found


def best_beta(tables: Tables, rewards: Tensor, gamma: float) -> Tensor:
    kls = [tables.kl(optimum(rewards, tables.log_reference, gamma=gamma, beta=beta)) for beta in BETAS]
    return min(kls, key=lambda kl: float(kl.mean()))


def rates(scratch: Path) -> Measurement:
    """Slopes over the sizes from 2^12 on, where the information bound holds."""
    _, found = toy()
    sizes = tuple(size for size in SIZES if size >= 2**12)
    slopes, against = {}, {}
    for name in ("PMLE", "PD", "RKL, beta 0"):
        means = [float(found[size][name].mean()) for size in sizes]
        slopes[name] = slope(sizes, means)
        against[name] = [mean * size * GAMMA**2 / 90 for size, mean in zip(sizes, means, strict=True)]
    straight = all(-1.1 < value < -0.9 for value in slopes.values())
    close = all(abs(ratios[-1] - 1) < 0.15 for ratios in against.values())
    return Measurement(
        verdict(straight and close, straight),
        "slope of log KL against log n, and n KL over (K - 1) |X| / gamma^2 at n=2^20: "
        + "; ".join(f"{name} {slopes[name]:.3f}, {against[name][-1]:.2f}" for name in slopes),
        {
            "kl": {str(size): {name: found[size][name].tolist() for name in slopes} for size in SIZES},
            "slopes": slopes,
        },
    )


def rlhf_floor(scratch: Path) -> Measurement:
    """RLHF and RKL with beta tuned for each size, and the limit of RLHF at the true reward."""
    tables, found = toy()
    limit = float(best_beta(tables, GAMMA * tables.log_target, 0.0).mean())
    last = found[SIZES[-1]]
    ratio = float(last["RLHF"].mean() / last["RKL"].mean())
    saturates = limit > 0.001 and 0.95 * limit < float(last["RLHF"].mean()) < 1.25 * limit
    falls = slope(SIZES[-3:], [float(found[size]["RKL"].mean()) for size in SIZES[-3:]]) < -0.7
    text = "; ".join(
        f"n={size} {spread(by['RLHF'].tolist())} against {spread(by['RKL'].tolist())}"
        for size, by in found.items()
        if size >= 2**12
    )
    return Measurement(
        verdict(saturates and falls and ratio >= 10, saturates and falls),
        f"KL of RLHF against RKL, beta tuned: {text}; limit of RLHF {limit:.2g}; {ratio:.0f} times at the end",
        {
            "limit": limit,
            "kl": {str(size): {name: by[name].tolist() for name in ("RLHF", "RKL")} for size, by in found.items()},
        },
    )


VOCABULARY, LENGTH = 4, 3
LABELS = (500, 2_000, 8_000, 32_000, 128_000)


def pair_ways(pairs: PairCounts, target: Tensor, reference: Tensor) -> dict[str, Loss]:
    """The objectives on pairs of the reference; PD with the reward that the target stands for."""
    return {
        "PMLE": pair_loss(objective("pmle", gamma=GAMMA), pairs, reference),
        "PD": pair_loss(objective("pd", gamma=GAMMA), pairs, reference, GAMMA * target),
        "DPO": pair_loss(objective("dpo", beta=GAMMA), pairs, reference),
    }


def without_pairs(target: Tensor, reference: Tensor) -> Loss:
    """RKL with the reward that the target stands for."""
    return reverse_kl_loss(GAMMA * target, reference, gamma=GAMMA)


@cache
def language_models() -> tuple[Tensor, Tensor, torch.Generator]:
    """log pi* and log pi0 over all sequences, both [problems, sequences]."""
    draw = torch.Generator().manual_seed(0)
    target, reference = (tree_logps(random_tree(draw, PROBLEMS), VOCABULARY, LENGTH) for _ in range(2))
    return target, reference, draw


def by_objective(scratch: Path) -> Measurement:
    """Autoregressive tables trained by gradients from zero."""
    target, reference, draw = language_models()

    def kl_of(loss: Loss) -> list[float]:
        logits = torch.zeros(PROBLEMS, 21, VOCABULARY, dtype=torch.float64, requires_grad=True)
        return forward_kl(target, fit([logits], lambda: tree_logps(logits, VOCABULARY, LENGTH), loss)).tolist()

    found: dict[str, dict[int, list[float]]] = {}
    for size in LABELS:
        pairs = PairCounts.draw(reference, target, GAMMA, size, draw)
        for name, loss in pair_ways(pairs, target, reference).items():
            found.setdefault(name, {})[size] = kl_of(loss)
    reverse = kl_of(without_pairs(target, reference))
    wrong = forward_kl(target, (reference + target).log_softmax(-1))
    last = {name: by[LABELS[-1]] for name, by in found.items()}
    dpo_wrong = float((torch.tensor(last["DPO"], dtype=torch.float64) / wrong - 1).abs().max()) < 0.15
    others_right = all(
        statistics.fmean(kls) < 0.05 * float(wrong.mean()) for kls in (last["PMLE"], last["PD"], reverse)
    )
    distilled = all(
        statistics.fmean(found["PD"][size]) < 0.2 * statistics.fmean(found["PMLE"][size]) for size in found["PD"]
    )
    return Measurement(
        verdict(dpo_wrong and others_right and distilled, dpo_wrong and others_right),
        f"KL(pi* || pi0) {spread(forward_kl(target, reference).tolist())}, predicted limit of DPO"
        f" {spread(wrong.tolist())}; KL of RKL {spread(reverse)}; KL after n pairs: "
        + "; ".join(
            f"{name} " + ", ".join(f"{size:,}: {spread(kls)}" for size, kls in by.items()) for name, by in found.items()
        ),
        {"kl": {name: {str(size): kls for size, kls in by.items()} for name, by in found.items()}, "RKL": reverse},
    )


def transformer(scratch: Path) -> Measurement:
    """A Llama of 2 layers and 32 hidden units on 32,000 pairs, for each of three problems."""
    target, reference, _ = language_models()
    found: dict[str, list[float]] = {}
    wrong = forward_kl(target, (reference + target).log_softmax(-1))[:3].tolist()
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        pairs = PairCounts.draw(reference[seed], target[seed], GAMMA, 32000, draw)
        losses = pair_ways(pairs, target[seed], reference[seed])
        for name, loss in (losses | {"RKL": without_pairs(target[seed], reference[seed])}).items():
            model = tiny_llama(VOCABULARY, LENGTH, seed=seed)
            policy = fit(model.parameters(), partial(model_logps, model, VOCABULARY, LENGTH), loss, steps=800, lr=5e-3)
            found.setdefault(name, []).append(float(forward_kl(target[seed], policy)))
    exact = all(max(found[name]) < 0.01 for name in ("PD", "RKL"))
    learned = all(kl < 0.25 * limit for kl, limit in zip(found["PMLE"], wrong, strict=True))
    stuck = all(0.75 < kl / limit < 1.25 for kl, limit in zip(found["DPO"], wrong, strict=True))
    return Measurement(
        verdict(exact and learned and stuck, exact and stuck),
        f"KL by problem, {', '.join(f'{limit:.3f}' for limit in wrong)} predicted for DPO: "
        + "; ".join(f"{name} {', '.join(f'{kl:.2g}' for kl in kls)}" for name, kls in found.items()),
        {"kl": found, "predicted": wrong},
    )


def laboratory(
    name: str,
    source: str,
    statement: str,
    setting: str,
    reproduced_if: str,
    measure: Callable[[Path], Measurement],
    paper_number: str = "-",
) -> Claim:
    return Claim(
        name=name,
        source=source,
        statement=statement,
        paper_number=paper_number,
        setting=setting,
        reproduced_if=reproduced_if,
        budget="cpu-minutes",
        measure=measure,
    )


TOY = (
    "10 contexts, 10 actions, logits of pi* and pi0 normal with deviation 0.1, gamma 0.5, pairs of uniform actions,"
    f" {PROBLEMS} problems, exact KL(pi* || pi), ridge 1e-3 on rewards"
)
TREES = (
    f"{PROBLEMS} autoregressive tables over 64 sequences (4 tokens, length 3), logits of pi* and pi0 normal with"
    " deviation 0.5, gamma = beta = 0.5, pairs of pi0 with labels of equation 3, Adam; PD and RKL are given the reward"
    " gamma log pi*"
)

LABORATORY = [
    laboratory(
        "rates-of-distribution-learning",
        "theorems 4, 6 and 7; abstract: O(1/n) in forward KL",
        "PMLE, preference distillation and reverse KL converge to the target at 1/n.",
        f"{TOY}; n = 2^6 to 2^20; rewards by Bradley-Terry, PD over as many other pairs, RKL without KL to pi0. With"
        " every distribution in the class all three optima are the softmax of rewards over gamma",
        "slopes from n = 2^12 on between -1.1 and -0.9, and within 15 % of (K - 1) |X| / (gamma^2 n) at 2^20, all"
        " three; partly if the slopes",
        rates,
        "O(1/n)",
    ),
    laboratory(
        "rlhf-floor",
        "section 5 and figure 1",
        "RLHF does not converge to the target however beta is tuned; with the entropy term it does.",
        f"{TOY}; n = 2^6 to 2^20; beta the best of {len(BETAS)} between 1e-4 and 100 for each n, by the mean KL",
        "RLHF within -5 % and +25 % of a limit above 0.001 at n = 2^20, RKL falling faster than n^-0.7 and 10 times"
        " lower there; partly if all but the factor",
        rlhf_floor,
        "curve",
    ),
    laboratory(
        "limit-of-each-objective",
        "equations 3, 6, 8, 11; inconsistency of DPO under equation 3 (derived)",
        "If annotators choose by the target's own probabilities, PMLE, PD and RKL find it, and DPO ends at"
        " pi0 pi* / Z. PD, given the reward, needs fewer pairs than PMLE.",
        f"{TREES}; 500 to 128,000 pairs",
        "at 128,000: DPO within 15 % of its predicted KL for every problem, the means of the others below a twentieth"
        " of it; PD below a fifth of PMLE at every size. Partly if all but the last",
        by_objective,
    ),
    laboratory(
        "limits-of-a-transformer",
        "the same, with a model that shares weights",
        "A transformer trained by these objectives ends where the tables do.",
        f"{TREES.replace(str(PROBLEMS), 'three of 20', 1)}; 32,000 pairs, each objective trains a Llama of 2 layers and"
        " 32 hidden units, 800 steps, seeds 0-2",
        "PD and RKL below 0.01, PMLE below a quarter of DPO's predicted KL, DPO within 25 % of that, every seed; partly"
        " if all but PMLE",
        transformer,
    ),
]

CLAIMS = [*LABORATORY]
