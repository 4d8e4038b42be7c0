"""The constant that multiplies each block's output in the place of the router's token-dependent weight.

Source: arXiv 2605.28207 appendix H names uniform (its default) and score-proportional scaling; "conditional" follows
the model card of its DeepSeek-V2-Lite student, which leaves open whether the mean is per expert. The rest are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.densify.statistics import LayerStatistics

Groups = list[list[int]]


def uniform(stats: LayerStatistics, groups: Groups, importance: Tensor) -> Tensor:
    """1 / number of groups: the mean routing weight iff the router's weights sum to 1."""
    return torch.full((len(groups),), 1.0 / len(groups), dtype=torch.float64)


def score_proportional(stats: LayerStatistics, groups: Groups, importance: Tensor) -> Tensor:
    """Each group's share of the total importance; sums to 1 (normalisation reconstructed)."""
    totals = torch.stack([importance[group].sum() for group in groups])
    return totals / totals.sum() if totals.sum() > 0 else uniform(stats, groups, importance)


def conditional(stats: LayerStatistics, groups: Groups, importance: Tensor) -> Tensor:
    """Mean over a group's experts of the weight each has when it is chosen, E[g_e | e chosen]."""
    weight = stats.gate_sum / stats.counts.clamp(min=1)
    return torch.stack([weight[group].mean() for group in groups])


def mass_matched(stats: LayerStatistics, groups: Groups, importance: Tensor) -> Tensor:
    """The router's mean total weight, shared equally; equals uniform for renormalising routers (ours)."""
    total = stats.gate_sum.sum() / stats.num_tokens
    return torch.full((len(groups),), float(total) / len(groups), dtype=torch.float64)


def marginal(stats: LayerStatistics, groups: Groups, importance: Tensor) -> Tensor:
    """The mean weight that each group's experts really get, E[sum g_e] (ours)."""
    return torch.stack([stats.gate_sum[group].sum() / stats.num_tokens for group in groups])


def least_squares(stats: LayerStatistics, groups: Groups, importance: Tensor) -> Tensor:
    """The scales that minimise E||y - sum_r s_r f_r||^2: `pinv(G_S) c` (ours).

    Raises:
        ValueError: a group has more than one expert: the output of merged weights is in no statistic.
    """
    assert stats.gram is not None and stats.cross is not None
    if any(len(group) > 1 for group in groups):
        raise ValueError("scaling 'least-squares' needs groups of one expert: keep top_k experts, or grouping 'none'")
    kept = [group[0] for group in groups]
    gram, cross = stats.gram[kept][:, kept], stats.cross[kept].unsqueeze(-1)
    solution: Tensor = torch.linalg.lstsq(gram, cross, driver="gelsd").solution
    return solution[:, 0]


def relative_block_error(stats: LayerStatistics, groups: Groups, scales: Tensor) -> float | None:
    """E||y - sum_r s_r f_r||^2 / E||y||^2, from the statistics alone.

    None when it is not in the statistics: router-only records, merged groups, or an output that is zero throughout.
    """
    if stats.gram is None or stats.cross is None or stats.output_energy is None:
        return None
    if any(len(group) > 1 for group in groups) or stats.output_energy == 0:
        return None
    kept = [group[0] for group in groups]
    gram, cross = stats.gram[kept][:, kept], stats.cross[kept]
    error = stats.output_energy - 2 * scales @ cross + scales @ gram @ scales
    return float(error / stats.output_energy)


@dataclass(frozen=True)
class Scaling:
    """A row of the table of scalings: the function and whether it needs all-expert statistics."""

    function: Callable[[LayerStatistics, Groups, Tensor], Tensor]
    title: str
    needs_outputs: bool = False


SCALINGS: dict[str, Scaling] = {
    "uniform": Scaling(uniform, "1 / number of groups"),
    "score": Scaling(score_proportional, "share of the score"),
    "conditional": Scaling(conditional, "mean weight when chosen"),
    "mass": Scaling(mass_matched, "mean total weight, shared equally (ours)"),
    "marginal": Scaling(marginal, "mean weight over all tokens (ours)"),
    "least-squares": Scaling(least_squares, "least block error (ours)", needs_outputs=True),
}
