"""What streaming a model and writing another takes: the record of it, and probes of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from burnish.checkpoint import Checkpoint

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
        observe_seconds, act_seconds: from a short probe of this machine.
    """

    act_peak_bytes: int
    observe_peak_bytes: int
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    observe_seconds: float
    act_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def probe_seconds(work: Callable[[], object]) -> float:
    """Seconds of one call, after a warm-up, from calls for at least 0.1 s."""
    work()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.1:
        work()
        count += 1
    return elapsed / count


def probe_read_rate(source: Checkpoint) -> float:
    """Bytes per second of reading up to 64 MiB of the checkpoint's largest tensor."""
    largest = max(source.tensors.values(), key=lambda tensor: tensor.nbytes)
    done, before, start = 0, source.bytes_read, time.perf_counter()
    for piece in source.chunks(largest.name):
        done += len(piece)
        if done >= 64 * 2**20:
            break
    source.bytes_read = before
    return done / max(time.perf_counter() - start, 1e-6)
