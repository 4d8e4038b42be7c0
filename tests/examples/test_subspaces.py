"""The example of the subspaces finds what it says, in a shorter run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from burnish.diagnose import top_eigenpairs

SCRIPT = Path(__file__).parents[2] / "examples" / "subspaces.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("subspaces", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_four_classes_four_walls_and_a_river(script: ModuleType, tmp_path: Path) -> None:
    problem = script.Problem(seed=0)
    script.warm_up(problem, 600, tmp_path)
    assert len([json.loads(line) for line in (tmp_path / "subspace.jsonl").read_text().splitlines()]) == 6
    values = top_eigenpairs(problem.loss, problem.model, 8).values
    assert values[3] > 1.5 * values[4] and values[4] < 1.5 * values[7]  # the top four stand apart

    losses = script.continue_projected(problem, 300)
    start, end = losses["whole"][0], {part: course[-1] for part, course in losses.items()}
    assert end["whole"] < 0.9 * start and end["bulk"] < 0.9 * start
    assert end["dominant"] > 0.95 * start

    split = script.muon_and_momentum(problem, 60)
    share = {name: 1 - seen.signal_alignment**2 for name, seen in split.items()}
    assert share["Muon"] > 0.8 > 0.6 > share["SGD momentum"]
    assert torch.isfinite(split["Muon"].mean).all()


def test_it_prints_its_tables(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["subspaces.py", "--steps", "24", "--samples", "5"])
    script.main()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("sharpness", "dominant", "SGD momentum", "Muon"))
