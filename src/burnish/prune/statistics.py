"""What was seen of a dense model: sums over calibration sequences, so that two records merge exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from burnish.sums import LayerSums, ModelSums

DOUBLE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Activations held in float64 at a time: on a CPU they should stay in its cache."""


@dataclass(frozen=True)
class LayerStatistics(LayerSums):
    """Sums of one layer over calibration sequences b; float64, counts int64.

    The four sums of squares hold, for each channel j, the sum over b of (mean over the sequence of |a_bj|)^2, where a
    is the activation named. Source: arXiv 2407.14679, section 2.2 (mean over the sequence, L2 over the batch).

    Attributes:
        num_sequences: [] int64, sequences with a token.
        num_tokens: [] int64.
        cosine_sum: [], sum over tokens of the cosine between the layer's input and its output.
        neurons: [intermediate], input of `down_proj`.
        head_channels: [heads * head_dim], input of `o_proj`.
        attention_channels: [hidden], output of the norm before the attention.
        feed_forward_channels: [hidden], output of the norm before the feed-forward.
    """

    num_sequences: Tensor
    num_tokens: Tensor
    cosine_sum: Tensor
    neurons: Tensor
    head_channels: Tensor
    attention_channels: Tensor
    feed_forward_channels: Tensor


@dataclass(frozen=True)
class ActivationStatistics(ModelSums[LayerStatistics]):
    """The record of a whole model: layer index -> LayerStatistics."""

    FORMAT = "burnish.activation-statistics/1"
    KIND = "activation statistics"
    LAYER = LayerStatistics


def magnitude_squares(activations: Tensor, live: Tensor) -> Tensor:
    """Sum over sequences of the squared mean magnitude of each channel, [channels] float64.

    Args:
        activations: [batch, seq, channels].
        live: [batch, seq] bool, False for padding, which counts for nothing.
    """
    channels = activations.shape[-1]
    step = max(1, DOUBLE_BYTES["cuda" if activations.is_cuda else "cpu"] // (8 * channels))
    total = torch.zeros(channels, dtype=torch.float64, device=activations.device)
    for sequence, real in zip(activations, live, strict=True):
        tokens = sequence[real]  # [tokens, channels]
        if len(tokens):
            total += (sum(part.double().abs().sum(dim=0) for part in torch.split(tokens, step)) / len(tokens)) ** 2
    return total


def cosine_sum(before: Tensor, after: Tensor, live: Tensor) -> Tensor:
    """Sum over tokens of the cosine between two states, [] float64.

    Args:
        before, after: [batch, seq, hidden].
        live: [batch, seq] bool, False for padding.
    """
    step = max(1, DOUBLE_BYTES["cuda" if before.is_cuda else "cpu"] // (16 * before.shape[-1]))
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    for old, new in zip(torch.split(before[live], step), torch.split(after[live], step), strict=True):
        total += cosine_similarity(old.double(), new.double(), dim=-1).sum()
    return total
