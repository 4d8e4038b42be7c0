"""The commands and Python of README and docs run as written, and the tables in docs are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=lambda page: page.stem)
def test_u16_1_commands_run_as_written(page: Path, tmp_path: Path) -> None:
    commands = "\n".join(
        line for line in blocks(page, "bash").splitlines() if not line.startswith(("git ", "cd ", "make "))
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_u16_1_python_runs_as_written(page: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", blocks(page, "python")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def support_matrix() -> str:
    """Families by what they become and what was tried, from the table that the code uses."""
    from burnish.families import FAMILIES
    from burnish.families.engines import ENGINES, tried

    lines = ["| family | `model_type` | becomes | " + " | ".join(ENGINES) + " |", "|---" * (3 + len(ENGINES)) + "|"]
    for family in FAMILIES.values():
        for architecture in family.becomes:
            cells = " | ".join(tried(engine, architecture) for engine in ENGINES)
            lines.append(f"| {family.name} | `{family.model_type}` | `{architecture}` | {cells} |")
    return "\n".join(lines)


def test_u16_2_the_support_matrix_is_the_one_of_the_code() -> None:
    assert support_matrix() in (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(support_matrix())
