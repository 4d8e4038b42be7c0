"""Files of measurements that grow with a training, a JSON line each; a resumed training goes on in its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from burnish.errors import OutputError
from burnish.runs.resources import write_text


def continue_at(file: Path, step: int, *, overwrite: bool = False) -> None:
    """Keep the lines before this step, and nothing that an interrupted training measured after it.

    Raises:
        OutputError: a training from step 0, and the file of an earlier one is there and may not be replaced.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    if lines and step == 0 and not overwrite:
        raise OutputError(f"{file} exists: choose another directory, or pass overwrite=True")
    whole = (line for line in lines if line.endswith("\n"))
    write_text(file, "".join(line for line in whole if json.loads(line)["step"] < step))


def append(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines that each hold a `step`."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
