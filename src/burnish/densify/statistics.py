"""What was seen of a Mixture-of-Experts model: sums over calibration tokens, so that two records merge exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.sums import LayerSums, ModelSums

DOUBLE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Expert outputs held in float64 at a time: on a CPU they should stay in its cache."""


@dataclass(frozen=True)
class LayerStatistics(LayerSums):
    """Sums over the calibration tokens of one MoE layer with E experts; float64, counts int64.

    In the names of the docstrings: p is the router probability before the top-k cut, T the chosen experts, g the
    weight that the model uses (0 outside T), f_e the output of expert e, y = sum_e g_e f_e the routed block output.

    Attributes:
        num_tokens: [] int64, N.
        counts: [E] int64, tokens that chose e.
        probability_sum: [E], sum of p_e.
        selected_probability_sum: [E], sum of p_e over the tokens that chose e.
        gate_sum: [E], sum of g_e.
        logit_gram: [E, E], sum of z_i z_j of the router logits z.
        shared_gate_sum: [], sum of the shared expert's gate; None without one.
        gram: [E, E], sum of <f_i, f_j> over all tokens; None in router-only records, as are the next four.
        cross: [E], sum of <f_e, y>.
        output_energy: [], sum of ||y||^2.
        routed_norm_sum: [E], sum of ||f_e|| over the tokens that chose e.
        gated_norm_sum: [E], sum of g_e ||f_e||.
        weight_gram: [E, E], inner products of the experts' unit-norm flattened weights; None unless asked for. A
            property of the model and not a sum: merging keeps it.
    """

    KEPT = frozenset({"weight_gram"})

    num_tokens: Tensor
    counts: Tensor
    probability_sum: Tensor
    selected_probability_sum: Tensor
    gate_sum: Tensor
    logit_gram: Tensor
    shared_gate_sum: Tensor | None = None
    gram: Tensor | None = None
    cross: Tensor | None = None
    output_energy: Tensor | None = None
    routed_norm_sum: Tensor | None = None
    gated_norm_sum: Tensor | None = None
    weight_gram: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)


@dataclass(frozen=True)
class RoutingStatistics(ModelSums[LayerStatistics]):
    """The record of a whole model: layer index -> LayerStatistics."""

    FORMAT = "burnish.routing-statistics/1"
    KIND = "routing statistics"
    LAYER = LayerStatistics

    def unused_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) pairs that no calibration token chose."""
        return [
            (layer, int(expert)) for layer, stats in self.layers.items() for expert in (stats.counts == 0).nonzero()
        ]


def router_sums(logits: Tensor, probabilities: Tensor, gates: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """The router's part of LayerStatistics for some tokens.

    Args:
        logits, probabilities: [tokens, E].
        gates: [tokens, E], the weight used, 0 for experts that were not chosen.
        selected: [tokens, E] bool.
    """
    logits, probabilities = logits.double(), probabilities.double()
    return {
        "num_tokens": torch.tensor(len(logits), device=logits.device),
        "counts": selected.sum(dim=0),
        "probability_sum": probabilities.sum(dim=0),
        "selected_probability_sum": (probabilities * selected).sum(dim=0),
        "gate_sum": gates.double().sum(dim=0),
        "logit_gram": logits.mT @ logits,
    }


def output_sums(outputs: Tensor, gates: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """The all-expert part of LayerStatistics for some tokens.

    Args:
        outputs: [E, tokens, hidden], f_e of every expert on every token.
        gates: [tokens, E], the weight used, 0 for experts that were not chosen.
        selected: [tokens, E] bool.
    """
    num_experts, num_tokens, hidden = outputs.shape
    step = max(1, DOUBLE_BYTES["cuda" if outputs.is_cuda else "cpu"] // (8 * num_experts * hidden))
    return add_sums(
        _output_sums(outputs[:, first : first + step], gates[first : first + step], selected[first : first + step])
        for first in range(0, max(1, num_tokens), step)
    )


def _output_sums(outputs: Tensor, gates: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """Each token's Gram matrix gives all the sums: <f_e, y> = sum_j g_j <f_e, f_j>, and ||f_e||^2 is its diagonal."""
    outputs, gates = outputs.transpose(0, 1).double(), gates.double()
    grams = outputs @ outputs.mT  # [tokens, E, E]
    cross = (grams @ gates.unsqueeze(-1)).squeeze(-1)  # [tokens, E]
    norms = grams.diagonal(dim1=1, dim2=2).sqrt()  # [tokens, E]
    return {
        "gram": grams.sum(dim=0),
        "cross": cross.sum(dim=0),
        "output_energy": (cross * gates).sum(),
        "routed_norm_sum": (norms * selected).sum(dim=0),
        "gated_norm_sum": (norms * gates).sum(dim=0),
    }


def add_sums(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum dictionaries of the same keys."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
