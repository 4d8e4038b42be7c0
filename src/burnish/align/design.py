"""Which pairs to label, whatever the policy that is trained: a preferential G-optimal design.

A pair of responses to one prompt is seen through the difference z of their features. A design is a distribution over
pairs; its moment is V = sum w_z z z', and the leverage z' V^-1 z says how badly the labels of pairs drawn from it would
determine the preference of pair z. A G-optimal design makes the largest leverage as small as it can be, which is the
dimension of the span of all pairs (Kiefer and Wolfowitz), and has the largest determinant of V at once. So the largest
leverage is a certificate: at (1 + tolerance) rank, no other design is better by more than that tolerance.

Source: arXiv 2601.08421 names such a design in its abstract; its exact optimisation problem could not be read. This one
is a reconstruction of ours with the properties that the abstract claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.errors import BurnishError

BLOCK = 8192
"""Pairs whose leverages are computed at once."""


@dataclass(frozen=True)
class Design:
    """A distribution over pairs.

    Attributes:
        weights: [pairs] float64, sums to 1; 0 outside of the support.
        leverage: the largest z' V^-1 z of all pairs; the optimum is `rank`.
        rank: dimension of the span of the differences.
        logdet: log det V; of a V without full rank, of its restriction to the span.
        steps: that the solver took.
    """

    weights: Tensor
    leverage: float
    rank: int
    logdet: float
    steps: int

    @property
    def support(self) -> Tensor:
        """Pairs of positive weight, [support] int64."""
        return self.weights.nonzero().squeeze(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws of pairs, [count] int64; a pair of large weight comes up more than once."""
        support = self.support
        drawn = torch.multinomial(self.weights[support], count, replacement=True, generator=generator)
        return support[drawn]


def pair_differences(features: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of candidates of each prompt.

    Args:
        features: for each prompt those of its candidates, Tensor [candidates, d]; prompts may differ in how many.

    Returns:
        The differences of features, first less second, [pairs, d] float64, and the pairs, [pairs, 3] int64: prompt,
        first and second candidate, first < second.

    Raises:
        ValueError: no prompt has two candidates, or features of one differ in size from the others'.
    """
    sizes = {tuple(candidates.shape[1:]) for candidates in features}
    if len(sizes) != 1 or any(len(size) != 1 for size in sizes):
        raise ValueError(f"features of candidates have the shapes {sorted(sizes)}: expected one vector size for all")
    differences, pairs = [], []
    for prompt, candidates in enumerate(features):
        first, second = torch.triu_indices(len(candidates), len(candidates), 1, device=candidates.device)
        differences.append((candidates[first] - candidates[second]).double())
        pairs.append(torch.stack([torch.full_like(first, prompt), first, second], 1))
    if not sum(map(len, differences)):
        raise ValueError("no prompt has two candidates: sample at least 2 responses a prompt")
    return torch.cat(differences), torch.cat(pairs)


def g_optimal_design(
    differences: Tensor,
    *,
    solver: str = "multiplicative",
    tolerance: float = 0.01,
    max_steps: int = 20_000,
    rank_tolerance: float = 1e-6,
) -> Design:
    """The distribution over pairs under which the least certain pair is most certain.

    Pairs that cannot matter are never touched by the solver: it works on a set of a few pairs for each dimension, and
    one pass over all pairs a round adds those whose leverage is too large. Differences that do not span their space are
    handled inside their span.

    Args:
        differences: [pairs, d], of any floating type; pairs of equal features are allowed, and never chosen.
        solver: a key of SOLVERS.
        tolerance: the largest leverage ends at or below (1 + tolerance) rank.
        max_steps: of the solver, over all rounds.
        rank_tolerance: directions of a singular value below this share of the largest one are not in the span; taken
            after each feature was divided by its root mean square, so that units do not matter.

    Raises:
        ValueError: an option out of range, values that are not finite, or differences that are all zero.
        BurnishError: the tolerance was not reached.

    Example:
        >>> triangle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
        >>> g_optimal_design(triangle, tolerance=1e-6).weights
        tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)

    Source: arXiv 2601.08421 (ours, see the module). Working sets and the multiplicative step with an exponent are ours.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown: choose one of {', '.join(SOLVERS)}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: expected a share between 0 and 1")
    if differences.ndim != 2 or not len(differences):
        raise ValueError(
            f"differences have the shape {list(differences.shape)}: expected [pairs, d] with 1 pair or more"
        )
    points, log_volume = _whitened(differences.double(), rank_tolerance)
    rank = points.shape[1]
    chosen = _spanning_pairs(points)
    weights = points.new_full((rank,), 1 / rank)
    steps = 0
    while True:
        inverse, logdet = _inverse_moment(points[chosen], weights)
        levels = leverages(points, inverse)
        top = float(levels.max()) / rank
        if top <= 1 + tolerance:
            whole = points.new_zeros(len(points)).index_add_(0, chosen, weights)
            return Design(whole, top * rank, rank, logdet + log_volume, steps)
        if steps >= max_steps:
            raise BurnishError(
                f"design: largest leverage {top:.4f} times the rank after {steps:,} steps, expected {1 + tolerance:g}:"
                " raise tolerance or max_steps"
            )
        # Early rounds only have to find the pairs that matter: their solutions may be rough.
        goal = max(tolerance / 2, min(0.5, (top - 1) / 8))
        levels[chosen] = 0
        most = levels.topk(min(4 * rank, len(levels)))
        added = most.indices[most.values > rank * (1 + tolerance / 2)]
        share = 0.5 * len(added) / (len(added) + len(chosen))
        chosen = torch.cat([chosen, added])
        weights = torch.cat([weights * (1 - share), weights.new_full((len(added),), share / max(len(added), 1))])
        weights, taken = SOLVERS[solver](points[chosen], weights, goal, max_steps - steps)
        steps += max(taken, 1)
        kept = _without_the_lightest(weights, goal / (8 * rank))
        chosen, weights = chosen[kept], weights[kept] / weights[kept].sum()


def leverages(differences: Tensor, inverse_moment: Tensor) -> Tensor:
    """z' V^-1 z of each pair, [pairs].

    Args:
        differences: [pairs, d].
        inverse_moment: V^-1, [d, d].
    """
    found = differences.new_empty(len(differences))
    for start in range(0, len(differences), BLOCK):
        block = differences[start : start + BLOCK]
        torch.sum((block @ inverse_moment).mul_(block), 1, out=found[start : start + BLOCK])
    return found


def _whitened(differences: Tensor, rank_tolerance: float) -> tuple[Tensor, float]:
    """The differences in coordinates of their span in which their moment is 1 [pairs, rank]; log of the volume lost."""
    moment = differences.mT @ differences / len(differences)
    if not bool(moment.isfinite().all()):
        raise ValueError("differences hold values that are not finite: check the features")
    scale = moment.diagonal().sqrt()
    if not bool(scale.any()):
        raise ValueError("differences are all zero: every pair has equal features")
    scale = scale.where(scale > 0, 1.0)
    values, vectors = torch.linalg.eigh(moment / torch.outer(scale, scale))
    inside = values > rank_tolerance**2 * values[-1]
    values, vectors = values[inside], vectors[:, inside]
    points = differences @ (vectors / scale[:, None] / values.sqrt())
    back = scale[:, None] * vectors * values.sqrt()  # differences = points @ back'
    log_volume = 2 * float(torch.linalg.qr(back).R.diagonal().abs().log().sum())
    return points.contiguous(), log_volume


def _spanning_pairs(points: Tensor) -> Tensor:
    """As many pairs as dimensions, [rank] int64: each is the farthest from the span of those before it."""
    rank = points.shape[1]
    far = points.square().sum(1)
    basis = points.new_zeros(rank, rank)
    chosen = []
    for step in range(rank):
        pair = int(far.argmax())
        chosen.append(pair)
        direction = points[pair] - basis[:step].mT @ (basis[:step] @ points[pair])
        basis[step] = direction / direction.norm()
        far -= (points @ basis[step]).square()
    return torch.tensor(chosen, device=points.device)


def _inverse_moment(points: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """V^-1 and log det V."""
    factor = torch.linalg.cholesky((points * weights[:, None]).mT @ points)
    return torch.cholesky_inverse(factor), 2 * float(factor.diagonal().log().sum())


def _without_the_lightest(weights: Tensor, mass: float) -> Tensor:
    """All but the smallest weights that together have at most this mass, [kept] int64 in ascending order.

    A pair of weight w holds at most w max-leverage of V in any direction, so that leverages grow by at most about mass
    times rank.
    """
    order = weights.argsort()
    return order[weights[order].cumsum(0) > mass].sort().values


def _multiplicative(points: Tensor, weights: Tensor, goal: float, max_steps: int) -> tuple[Tensor, int]:
    """w_z <- w_z (lev_z / rank)^p, normalised.

    With p = 1 the determinant never falls (Titterington 1976). Around the optimum the error shrinks by 1 - p mu with mu
    in [0, 1], so that p close to 2 is stable and nearly twice as fast; where the determinant falls nevertheless, p is 1
    from there on.
    """
    rank, power, last = points.shape[1], 1.9, -math.inf
    for step in range(max_steps):
        inverse, logdet = _inverse_moment(points, weights)
        levels = leverages(points, inverse) / rank
        if float(levels.max()) <= 1 + goal:
            return weights, step
        if logdet < last:
            power = 1.0
        last = logdet
        weights = weights * levels**power
        weights = weights / weights.sum()
    return weights, max_steps


def _frank_wolfe(points: Tensor, weights: Tensor, goal: float, max_steps: int) -> tuple[Tensor, int]:
    """One pair a step: towards the largest leverage, or away from the smallest one in the support (Wolfe, Atwood).

    Both take the step of the largest determinant, (lev / rank - 1) / (lev - 1), and leverages follow by a rank-one
    update; steps away make the convergence linear where plain Frank-Wolfe is sublinear with a dense support.
    """
    rank = points.shape[1]
    for step in range(max_steps):
        if step % 500 == 0:  # rank-one updates collect rounding errors
            inverse, _ = _inverse_moment(points, weights)
            levels = leverages(points, inverse)
        best, worst = int(levels.argmax()), int(levels.where(weights > 0, torch.inf).argmin())
        high, low = float(levels[best]), float(levels[worst])
        if high <= (1 + goal) * rank:
            return weights, step
        if high / rank - 1 >= 1 - low / rank:
            pair, size, dropped = best, (high / rank - 1) / (high - 1), False
        else:
            weight = float(weights[worst])
            out = -weight / (1 - weight)  # all of its weight
            size = (low / rank - 1) / (low - 1) if low > 1 else out
            pair, size, dropped = worst, max(size, out), size <= out
        direction = inverse @ points[pair]
        by = size / (1 - size + size * float(levels[pair]))
        levels = (levels - by * (points @ direction).square()) / (1 - size)
        inverse = (inverse - by * torch.outer(direction, direction)) / (1 - size)
        weights = weights * (1 - size)
        weights[pair] = 0.0 if dropped else weights[pair] + size
    return weights, max_steps


Solver = Callable[[Tensor, Tensor, float, int], tuple[Tensor, int]]
SOLVERS: dict[str, Solver] = {"multiplicative": _multiplicative, "frank-wolfe": _frank_wolfe}
"""(points, start weights, goal, max_steps) -> weights whose largest leverage is at most (1 + goal) rank, and steps."""
