"""Say before the work what it will need: memory, disk, bytes read and written, time."""

from __future__ import annotations

import torch

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.tensors import torch_dtype
from burnish.densify.observe import CHUNK_BYTES
from burnish.densify.statistics import DOUBLE_BYTES, output_sums
from burnish.families import Fused, MoEShape, PackedMxfp4, Student
from burnish.families.forecast import BASE_BYTES, KERNEL_BYTES, Forecast, probe_read_rate, probe_seconds


def forecast(
    teacher: Checkpoint,
    student: Student,
    *,
    experts_read: int,
    num_tokens: int,
    max_length: int,
    batch_size: int,
    outputs: bool,
    dtype: torch.dtype,
) -> Forecast:
    """Forecast a conversion; reads headers and times two short probes.

    Args:
        teacher, student: what is converted into what.
        experts_read: experts of each layer that the plan uses.
        num_tokens: calibration tokens; 0 when nothing is observed.
        max_length, batch_size: of the calibration batches.
        outputs: whether every expert runs on every token.
        dtype: in which the teacher computes.
    """
    shape = student.shape
    act_peak, bytes_read = _act_needs(student, experts_read)
    seconds = 0.0
    if num_tokens:
        seconds = num_tokens * len(shape.moe_layers) * probe_token_seconds(shape, dtype, outputs=outputs)
    hidden_bytes = num_tokens * shape.hidden_size * dtype.itemsize
    return Forecast(
        act_peak_bytes=act_peak,
        observe_peak_bytes=_observe_peak(student, batch_size * max_length, outputs, dtype) if num_tokens else 0,
        bytes_read=bytes_read,
        bytes_written=student.nbytes,
        disk_bytes=student.nbytes + 2 * hidden_bytes,
        observe_seconds=seconds,
        act_seconds=(bytes_read + student.nbytes) / probe_read_rate(teacher),
    )


def _act_needs(student: Student, experts_read: int) -> tuple[int, int]:
    """Peak memory of writing, and the tensor bytes that it reads."""
    shape, stored = student.shape, _stored_bytes(student)
    matrices = 3 * len(shape.moe_layers) * shape.hidden_size * stored  # bytes of one column of all layers
    copies = sum(tensor.nbytes for tensor in student.tensors if tensor.copy_of is not None)
    packed = isinstance(student.storage, PackedMxfp4)
    reads_pairs = packed or (isinstance(student.storage, Fused) and student.storage.interleaved)
    routed = matrices * experts_read * shape.expert_width * (5 / 3 if reads_pairs else 1)
    largest = max(tensor.nbytes for tensor in student.tensors if tensor.name in student.feed_forward)
    block = max(shape.expert_width, shape.shared_width) * shape.hidden_size * (4 + stored)
    peak = BASE_BYTES + largest * (2.5 if reads_pairs else 1.0) + 2 * block
    return int(peak), int(copies + routed + matrices * shape.shared_width)


def _observe_peak(student: Student, batch_tokens: int, outputs: bool, dtype: torch.dtype) -> int:
    """Peak memory of observing: one layer, one batch and, with all experts, one chunk of their outputs."""
    shape, size = student.shape, dtype.itemsize
    layer = 3 * shape.num_experts * shape.expert_width * shape.hidden_size * size
    embedding = int(student.config["vocab_size"]) * shape.hidden_size * size
    routed_columns = shape.top_k * (3 * shape.hidden_size + 4 * shape.expert_width)
    batch = batch_tokens * ((6 * shape.hidden_size + routed_columns) * size + 8 * shape.num_experts * 4)
    columns = max(4 * shape.expert_width, shape.expert_width + shape.hidden_size)
    chunk = min(CHUNK_BYTES["cpu"], batch_tokens * shape.num_experts * columns * size)
    at_work = max(batch, chunk + 2 * DOUBLE_BYTES["cpu"] if outputs else 0)
    kernels = KERNEL_BYTES if size == 2 else 0
    return BASE_BYTES + max(layer + at_work + kernels, embedding + batch)


def probe_token_seconds(shape: MoEShape, dtype: torch.dtype, *, outputs: bool) -> float:
    """Seconds per token and layer on the CPU, from the real products and sums on a few experts and tokens.

    Args:
        shape: of the teacher.
        dtype: in which it computes.
        outputs: whether every expert runs on every token.
    """
    hidden, width, tokens = shape.hidden_size, shape.expert_width, 128
    few = min(shape.num_experts, 8)
    inputs = torch.ones(tokens, hidden, dtype=dtype)
    gate_up, down = torch.ones(few, hidden, 2 * width, dtype=dtype), torch.ones(few, width, hidden, dtype=dtype)

    def experts() -> object:
        gate, up = (inputs @ gate_up).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down

    one_expert = probe_seconds(experts) / (tokens * few)
    attention = one_expert * 4 * hidden / (3 * width)  # four square projections
    total = one_expert * shape.top_k + attention
    if outputs:
        some = min(shape.num_experts, 32)
        made = torch.ones(some, tokens, hidden, dtype=dtype)
        gates = torch.ones(tokens, some, dtype=torch.float64)
        sums = probe_seconds(lambda: output_sums(made, gates, gates > 0)) / tokens
        total += one_expert * shape.num_experts + sums * (shape.num_experts / some) ** 2
    return total


def _stored_bytes(student: Student) -> float:
    """Bytes per expert weight as stored by the teacher."""
    if isinstance(student.storage, PackedMxfp4):
        return 17 / 32
    first = next(tensor for tensor in student.tensors if tensor.name in student.feed_forward)
    return float(torch_dtype(first.dtype).itemsize)
