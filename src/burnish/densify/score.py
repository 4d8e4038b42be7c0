"""Seven expert scores: pure functions of the statistics of one layer. Larger means: keep.

Notation as in `statistics.py`. Source of names and formulas: "Pruning and Distilling Mixture-of-Experts into Dense
Language Models", arXiv 2605.28207. Its equations were seen only through abstract, README, model cards and two
independent implementations; each docstring says what is confirmed and what is reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from burnish.densify.statistics import LayerStatistics

Probability = Literal["softmax", "gate"]


def selection_frequency(stats: LayerStatistics) -> Tensor:
    """SF: the share of tokens that choose the expert; sums to top_k. [E] float64. Name confirmed, formula standard."""
    return stats.counts.double() / stats.num_tokens


def preselection_probability(stats: LayerStatistics) -> Tensor:
    """PP: mean router probability before the top-k cut; sums to 1 for a softmax. [E] float64. Formula reconstructed."""
    return stats.probability_sum / stats.num_tokens


def conditional_probability(stats: LayerStatistics, probability: Probability = "softmax") -> Tensor:
    """CP: mean router probability over the tokens that choose the expert; 0 if none does. [E] float64.

    Not diluted by popularity: rarely chosen but confidently routed specialists rank high. Source: Eq. 3 (confirmed).

    Args:
        stats: one layer.
        probability: "softmax" before renormalisation (the paper), or the "gate" weight that the model uses.
    """
    total = stats.selected_probability_sum if probability == "softmax" else stats.gate_sum
    return total / stats.counts.clamp(min=1)


def activation_weighted_probability(stats: LayerStatistics, probability: Probability = "softmax") -> Tensor:
    """ACP: CP times the root mean square of ||f_e|| over all tokens, chosen or not. [E] float64.

    Source: an independent implementation, consistent with another; whether the paper's norm is RMS or mean is unseen.
    """
    assert stats.gram is not None
    return conditional_probability(stats, probability) * (stats.gram.diagonal() / stats.num_tokens).sqrt()


def reap(stats: LayerStatistics) -> Tensor:
    """REAP: mean of g_e ||f_e|| over the tokens that choose the expert. [E] float64.

    Stands in for one of the paper's two scores whose names are not known (ours). Source: arXiv 2510.13999.
    """
    assert stats.gated_norm_sum is not None
    return stats.gated_norm_sum / stats.counts.clamp(min=1)


def expert_activation_norm(stats: LayerStatistics) -> Tensor:
    """EAN: mean of ||f_e|| over the tokens that choose the expert. [E] float64.

    Stands in for one of the paper's two scores whose names are not known (ours). Source: `ean_mean` of the REAP code.
    """
    assert stats.routed_norm_sum is not None
    return stats.routed_norm_sum / stats.counts.clamp(min=1)


@dataclass(frozen=True)
class Score:
    """A row of the table of scores.

    Attributes:
        function: statistics of a layer -> importance [E].
        needs_outputs: whether every expert must be run on every calibration token.
        diverse: whether experts are chosen greedily by D-optimal design on the importance, not by top-K.
        takes_probability: whether `probability=` applies.
        title: for people.
    """

    function: Callable[..., Tensor]
    needs_outputs: bool
    title: str
    diverse: bool = False
    takes_probability: bool = False


SCORES: dict[str, Score] = {
    "sf": Score(selection_frequency, False, "selection frequency"),
    "pp": Score(preselection_probability, False, "pre-selection probability"),
    "cp": Score(conditional_probability, False, "conditional probability", takes_probability=True),
    "acp": Score(
        activation_weighted_probability, True, "activation-weighted conditional probability", takes_probability=True
    ),
    "do-acp": Score(
        activation_weighted_probability, True, "D-optimal selection on ACP", diverse=True, takes_probability=True
    ),
    "reap": Score(reap, True, "router-weighted activation norm (ours in the place of an unnamed score)"),
    "ean": Score(expert_activation_norm, True, "activation norm (ours in the place of an unnamed score)"),
}


def importance(stats: LayerStatistics, score: str, probability: Probability = "softmax") -> Tensor:
    """The importance [E] float64 of each expert of a layer under a score of SCORES."""
    row = SCORES[score]
    result: Tensor = row.function(stats, probability) if row.takes_probability else row.function(stats)
    return result
