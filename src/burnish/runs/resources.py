"""Peak memory of this process, and JSON files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux: VmHWM, because `getrusage` there carries the peak of the parent over into a process that it starts.
    Elsewhere `getrusage` (macOS reports bytes).
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    Without it, a loop that loads and frees one layer after the other keeps the pieces: the heap fragments, and the
    resident set grows with the number of layers although nothing is held.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline, by rename, so that no reader sees half a file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
