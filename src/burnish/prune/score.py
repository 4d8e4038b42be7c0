"""Importance of everything that can be pruned: pure functions of activation statistics.

Source: "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), arXiv 2407.14679, section 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.prune.statistics import ActivationStatistics, LayerStatistics


def neuron_importance(stats: LayerStatistics) -> Tensor:
    """[intermediate]: sqrt(sum over sequences b of (mean over the sequence of |a_bj|)^2), a the input of down_proj."""
    return stats.neurons.sqrt()


def head_importance(stats: LayerStatistics, head_dim: int) -> Tensor:
    """[heads]: the L2 norm, over a head's channels, of the same measure of the input of o_proj."""
    return stats.head_channels.view(-1, head_dim).sum(dim=1).sqrt()


def hidden_importance(statistics: ActivationStatistics) -> Tensor:
    """[hidden]: the same measure of both norms' outputs, summed over norms and layers: one ranking for the model."""
    parts = [
        channels.sqrt()
        for stats in statistics.layers.values()
        for channels in (stats.attention_channels, stats.feed_forward_channels)
    ]
    return torch.stack(parts).sum(dim=0)


def block_influence(stats: LayerStatistics) -> float:
    """1 - mean over tokens of cos(input, output): 0 for a layer that changes no direction."""
    return 1.0 - float(stats.cosine_sum / stats.num_tokens)
