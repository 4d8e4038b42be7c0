"""Hand-made routing statistics with known answers."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.densify.statistics import LayerStatistics, output_sums, router_sums
from burnish.families import RouterRule

PROBABILITIES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
"""Router probabilities [4 tokens, 3 experts] of the worked examples; top-2 routing."""
NORMS = torch.tensor([[2.0, 1, 1], [4, 1, 3], [1, 2, 1], [1, 3, 2]], dtype=torch.float64)
"""Output norms [4 tokens, 3 experts] of the second worked example."""


def gates_of(probabilities: Tensor, top_k: int = 2, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Weights used [tokens, E] and which experts are chosen [tokens, E] bool."""
    routing = RouterRule(top_k=top_k, renormalize=renormalize).route(probabilities.log())
    gates = torch.zeros_like(probabilities).scatter(1, routing.indices, routing.weights)
    return gates, gates > 0


def layer_statistics(
    outputs: Tensor | None = None, *, probabilities: Tensor = PROBABILITIES, top_k: int = 2, renormalize: bool = True
) -> LayerStatistics:
    """Statistics of a layer with these probabilities and expert outputs [E, tokens, hidden]."""
    gates, selected = gates_of(probabilities, top_k, renormalize=renormalize)
    sums = router_sums(probabilities.log(), probabilities, gates, selected)
    if outputs is not None:
        sums |= output_sums(outputs, gates, selected)
    return LayerStatistics(**sums)


def constant_outputs() -> Tensor:
    """f = (2, 0), (2, 0), (0, 1) for every token: experts 0 and 1 are duplicates."""
    vectors = torch.tensor([[2.0, 0], [2, 0], [0, 1]], dtype=torch.float64)
    return vectors.unsqueeze(1).expand(3, 4, 2)


def outputs_of_norms(norms: Tensor = NORMS) -> Tensor:
    """Outputs [E, tokens, 1] whose norms are given as [tokens, E]."""
    return norms.mT.unsqueeze(-1)


def random_layer(
    num_experts: int = 6, tokens: int = 40, hidden: int = 8, top_k: int = 2, seed: int = 0
) -> LayerStatistics:
    """Statistics of random routing and random outputs."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(tokens, num_experts, generator=generator, dtype=torch.float64).softmax(dim=-1)
    outputs = torch.randn(num_experts, tokens, hidden, generator=generator, dtype=torch.float64)
    return layer_statistics(outputs, probabilities=probabilities, top_k=top_k)
