"""Say before the work what it will need: memory, disk, bytes read and written, time."""

from __future__ import annotations

import math

import torch

from burnish.families.forecast import BASE_BYTES, Forecast, probe_read_rate, probe_seconds
from burnish.prune.cut import PIECE_BYTES, Student
from burnish.prune.layout import DenseModel, layer_of
from burnish.prune.statistics import DOUBLE_BYTES, magnitude_squares


def forecast(
    model: DenseModel, student: Student, *, num_tokens: int, max_length: int, batch_size: int, dtype: torch.dtype
) -> Forecast:
    """Forecast a pruning; reads headers and times short probes.

    Args:
        model, student: what is pruned into what.
        num_tokens: calibration tokens; 0 when nothing is observed.
        max_length, batch_size: of the calibration batches.
        dtype: in which the model computes.
    """
    stored = {name: model.checkpoint.info(name).nbytes for name in (*student.cut, *student.copied)}
    largest = max(
        tensor.nbytes + 2 * min(PIECE_BYTES, stored[student.sources[tensor.name]]) for tensor in student.tensors
    )
    hidden_bytes = num_tokens * model.sizes.hidden_size * dtype.itemsize
    bytes_read = sum(stored.values())
    return Forecast(
        act_peak_bytes=BASE_BYTES + largest,
        observe_peak_bytes=_observe_peak(model, batch_size * max_length, dtype) if num_tokens else 0,
        bytes_read=bytes_read,
        bytes_written=student.nbytes,
        disk_bytes=student.nbytes + 2 * hidden_bytes,
        observe_seconds=num_tokens * model.sizes.layers * probe_token_seconds(model, dtype) if num_tokens else 0.0,
        act_seconds=(bytes_read + student.nbytes) / probe_read_rate(model.checkpoint),
    )


def _observe_peak(model: DenseModel, batch_tokens: int, dtype: torch.dtype) -> int:
    """Peak memory of observing: one layer (before it, the embedding), one batch, and a piece of it in float64."""
    sizes, size = model.sizes, dtype.itemsize
    embedding = int(model.config["vocab_size"]) * sizes.hidden_size * size
    projected = (2 * sizes.heads + 2 * sizes.kv_heads) * model.head_dim
    batch = batch_tokens * (6 * sizes.hidden_size + max(projected, 3 * sizes.intermediate_size)) * size
    return BASE_BYTES + max(_layer_parameters(model) * size + batch + 2 * DOUBLE_BYTES["cpu"], embedding)


def _layer_parameters(model: DenseModel) -> int:
    return sum(math.prod(model.checkpoint.info(name).shape) for name in model.names() if layer_of(name) == 0)


def probe_token_seconds(model: DenseModel, dtype: torch.dtype) -> float:
    """Seconds per token and layer on the CPU, from one real product and one real sum of a few tokens.

    Args:
        model: what is observed.
        dtype: in which it computes.
    """
    sizes, tokens = model.sizes, 128
    inputs = torch.ones(tokens, sizes.hidden_size, dtype=dtype)
    matrix = torch.ones(sizes.hidden_size, sizes.intermediate_size, dtype=dtype)
    product = probe_seconds(lambda: inputs @ matrix) / (tokens * matrix.numel())  # one multiplication and addition
    live = torch.ones(1, tokens, dtype=torch.bool)
    sums = probe_seconds(lambda: magnitude_squares(inputs.unsqueeze(0), live)) / inputs.numel()
    channels = 4 * sizes.hidden_size + sizes.intermediate_size + sizes.heads * model.head_dim
    return product * _layer_parameters(model) + sums * channels
