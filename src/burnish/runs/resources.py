"""Peak memory of this process, and files that appear complete or not at all."""

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


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 by rename, so that no reader sees half a file, and a failure leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
