"""Claims of papers as functions that measure them, and the board of what was measured.

A claims file is a Python file that defines `CLAIMS`, a list of `Claim`. What counts as reproduced is written before
the run, in the claim; results are appended to `results/<file>.jsonl` beside it and never edited.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from burnish.errors import BurnishError
from burnish.runs.environment import environment

Verdict = Literal["reproduced", "partly", "not reproduced"]


@dataclass(frozen=True)
class Measurement:
    """What a claim's function found.

    Attributes:
        verdict: by the rule in the claim.
        number: the main number, for the board.
        details: everything else worth keeping: per-seed values, spread, settings.
    """

    verdict: Verdict
    number: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One statement of a paper.

    Attributes:
        name: unique in its file.
        source: paper, section or table.
        statement: what the paper says.
        paper_number: its number, or "-".
        setting: ours.
        reproduced_if: the rule, decided before running.
        budget: "cpu-minutes", "cpu-hours" or "h100-10min".
        measure: runs it; the argument is a scratch directory, in which it may find what earlier runs left.
    """

    name: str
    source: str
    statement: str
    paper_number: str
    setting: str
    reproduced_if: str
    budget: Literal["cpu-minutes", "cpu-hours", "h100-10min"]
    measure: Callable[[Path], Measurement]


def load_claims(directory: Path) -> dict[str, list[Claim]]:
    """Claims of every file in a directory, by file name without its ending.

    Raises:
        BurnishError: no such directory, or a file without CLAIMS.
    """
    if not directory.is_dir():
        raise BurnishError(f"{directory}: no such directory: run in a checkout, or pass --dir")
    found = {}
    for file in sorted(directory.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"claims_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        if not hasattr(module, "CLAIMS"):
            raise BurnishError(f"{file}: defines no CLAIMS")
        found[file.stem] = list(module.CLAIMS)
    return found


def run_claim(claim: Claim, directory: Path, file: str, scratch: Path) -> dict[str, Any]:
    """Measure one claim and append the result to `results/<file>.jsonl`."""
    start = time.perf_counter()
    found = claim.measure(scratch)
    result = {
        "claim": claim.name,
        "verdict": found.verdict,
        "number": found.number,
        "details": found.details,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(directory),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(),
    }
    results = directory / "results" / f"{file}.jsonl"
    results.parent.mkdir(exist_ok=True)
    with results.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result, ensure_ascii=False) + "\n")
    return result


def board(directory: Path) -> Iterator[tuple[str, Claim, dict[str, Any] | None]]:
    """Every claim with its newest result, None where it was not run yet."""
    for file, claims in load_claims(directory).items():
        newest: dict[str, dict[str, Any]] = {}
        results = directory / "results" / f"{file}.jsonl"
        for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else []:
            result = json.loads(line)
            newest[result["claim"]] = result
        for claim in claims:
            yield file, claim, newest.get(claim.name)


def _commit(directory: Path) -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
