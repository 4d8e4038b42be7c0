"""Say before the work what it will need: memory, disk, bytes read and written, floating-point work, time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.tensors import torch_dtype
from burnish.densify.observe import CHUNK_BYTES
from burnish.densify.statistics import DOUBLE_BYTES
from burnish.families import Fused, PackedMxfp4, Student

BASE_BYTES = 400 * 2**20
KERNEL_BYTES = 500 * 2**20
"""What torch keeps for matrix products in 16 bits on a CPU: compiled code for up to 1,024 shapes, one a token count."""


@dataclass(frozen=True)
class Forecast:
    """What a conversion will need; bytes and seconds.

    Attributes:
        act_peak_bytes: peak resident memory while writing.
        observe_peak_bytes: peak memory while observing (on the GPU, the part above the base lies there).
        bytes_read: tensor bytes that writing reads.
        bytes_written: tensor bytes that writing writes.
        disk_bytes: free disk needed beside the source, hidden states of the observation included.
        observe_flops: floating-point operations of the observation.
        observe_seconds, act_seconds: from a short probe of this machine.
    """

    act_peak_bytes: int
    observe_peak_bytes: int
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    observe_flops: float
    observe_seconds: float
    act_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


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
    expert_bytes = 3 * shape.expert_width * shape.hidden_size * _stored_bytes(student)
    copies = sum(tensor.nbytes for tensor in student.tensors if tensor.copy_of is not None)
    double_read = isinstance(student.storage, PackedMxfp4) or (
        isinstance(student.storage, Fused) and student.storage.interleaved
    )
    routed = len(shape.moe_layers) * experts_read * expert_bytes
    computed = [tensor for tensor in student.tensors if tensor.name in student.feed_forward]
    shared_bytes = len(shape.moe_layers) * 3 * shape.shared_width * shape.hidden_size * _stored_bytes(student)
    bytes_read = int(copies + routed * (5 / 3 if double_read else 1) + shared_bytes)
    largest = max(tensor.nbytes for tensor in computed)
    widest_block = max(shape.expert_width, shape.shared_width)
    block = widest_block * shape.hidden_size * (4 + _stored_bytes(student))
    act_peak = BASE_BYTES + int(largest * (2.5 if double_read else 1.0) + 2 * block)
    hidden_bytes = num_tokens * shape.hidden_size * dtype.itemsize
    layer_bytes = 3 * shape.num_experts * shape.expert_width * shape.hidden_size * dtype.itemsize
    embedding_bytes = student.config["vocab_size"] * shape.hidden_size * dtype.itemsize
    batch_tokens = batch_size * max_length
    routed_columns = shape.top_k * (3 * shape.hidden_size + 4 * shape.expert_width)
    batch_bytes = batch_tokens * ((6 * shape.hidden_size + routed_columns) * dtype.itemsize + 8 * shape.num_experts * 4)
    observe_peak = 0
    if num_tokens:
        columns = max(4 * shape.expert_width, shape.expert_width + shape.hidden_size)
        chunk = min(CHUNK_BYTES["cpu"], batch_tokens * shape.num_experts * columns * dtype.itemsize)
        outputs_bytes = chunk + 2 * DOUBLE_BYTES["cpu"] if outputs else 0
        kernels = KERNEL_BYTES if dtype.itemsize == 2 else 0
        active = max(layer_bytes + max(batch_bytes, outputs_bytes) + kernels, embedding_bytes + batch_bytes)
        observe_peak = BASE_BYTES + int(active)
    experts_per_token = shape.num_experts if outputs else 0
    per_token_layer = 6.0 * shape.expert_width * shape.hidden_size * (shape.top_k + experts_per_token)
    per_token_layer += 8.0 * shape.hidden_size**2
    flops = num_tokens * len(shape.moe_layers) * per_token_layer
    return Forecast(
        act_peak_bytes=act_peak,
        observe_peak_bytes=observe_peak,
        bytes_read=bytes_read,
        bytes_written=student.nbytes,
        disk_bytes=student.nbytes + 2 * hidden_bytes,
        observe_flops=flops,
        observe_seconds=flops / probe_flops(dtype) if num_tokens else 0.0,
        act_seconds=(bytes_read + student.nbytes) / probe_read_rate(teacher),
    )


def probe_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product on the CPU in `dtype`, from a probe of 0.1 s."""
    a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.1:
        a @ b
        count += 1
    return 2.0 * 256 * 1024 * 1024 * count / (time.perf_counter() - start)


def probe_read_rate(teacher: Checkpoint) -> float:
    """Bytes per second of reading up to 64 MiB of the teacher's largest tensor."""
    largest = max(teacher.tensors.values(), key=lambda tensor: tensor.nbytes)
    done, before, start = 0, teacher.bytes_read, time.perf_counter()
    for piece in teacher.chunks(largest.name):
        done += len(piece)
        if done >= 64 * 2**20:
            break
    teacher.bytes_read = before
    return done / max(time.perf_counter() - start, 1e-6)


def _stored_bytes(student: Student) -> float:
    """Bytes per expert weight as stored by the teacher."""
    if isinstance(student.storage, PackedMxfp4):
        return 17 / 32
    first = next(tensor for tensor in student.tensors if tensor.name in student.feed_forward)
    return float(torch_dtype(first.dtype).itemsize)
