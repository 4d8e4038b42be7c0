"""Processes of torchrun on gloo take the steps of one process, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.optim.distributed.optimizer_check import THOROUGHLY, TOLERANCE, resume
from tests.optim.distributed.toy import toy

ROOT = Path(__file__).parents[2]


def launch(ranks: int, *tasks: str, script: str = "optimizer_check.py") -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/optim/distributed" / script), *tasks], capture_output=True, text=True,
        timeout=400, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


def test_u7_2_u7_3_ranks_step_as_one_process_does_and_resume_what_others_saved(tmp_path: Path) -> None:
    two, four = tmp_path / "two", tmp_path / "four"
    launch(2, "steps", f"write={two}")
    launch(4, "steps", f"resume={two}", f"write={four}")
    launch(2, f"resume={four}")
    for name in THOROUGHLY:
        assert resume(name, toy(), two) < TOLERANCE


def test_u7_2_ranks_share_forward_passes_and_one_number() -> None:
    launch(2, script="mezo_check.py")
