"""Two processes of torchrun do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tune.conftest import ZEROTH, Run

SCRIPT = """
import json, sys
from burnish.tune import tune
from tests.tune.conftest import SMALL
model, out, rows, held_out, options = sys.argv[1:]
tune(model, out, dataset=rows, eval_dataset=held_out, **{**SMALL, **json.loads(options)})
"""


@pytest.mark.parametrize("changes", [{}, {"lora": True}, ZEROTH], ids=["adamw", "lora", "mezo-bcd"])
def test_two_processes_train_as_one_does(
    changes: dict[str, Any], run: Run, llama: Path, rows: Path, held_out: Path, tmp_path: Path
) -> None:
    alone = run(tmp_path / "alone", **changes, batch_size=4, steps=6, eval_samples=8)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "script.py"]
    options = json.dumps({**changes, "batch_size": 2, "steps": 6, "eval_samples": 8})
    done = subprocess.run(
        [*command, str(llama), "both", str(rows), str(held_out), options], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(alone.history)
    for mine, theirs in zip(lines, alone.history, strict=True):
        assert (mine["step"], mine["examples"]) == (theirs["step"], theirs["examples"])
        for key in {"loss", "eval_nll", "nll"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4), (mine, theirs)
    assert json.loads((tmp_path / "both" / "burnish.json").read_text())["training"]["processes"] == 2
    assert not (tmp_path / ".both.partial").exists()
