"""The verbs that train, under DeepSpeed: two processes do what one does, with weights in pieces or whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.align.test_align import pairs_of, write
from tests.tune.conftest import save_llama

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

ALIGN = ["align", "model", "--dataset", "pairs.jsonl", "--eval-dataset", "held-out.jsonl", "--steps", "4"]
TUNE = ["tune", "model", "--dataset", "rows.jsonl", "--eval-dataset", "rows.jsonl", "--steps", "4"]
DISTILL = ["distill", "model", "--teacher", "teacher", "--tokens", "512", "--eval-samples", "9"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--use_deepspeed", "--zero_stage"]  # fmt: skip


@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize(
    "verb",
    [ALIGN, [*ALIGN, "--lora"], [*ALIGN, "--objective", "sparse-po"], TUNE, DISTILL],
    ids=["align", "lora", "sparse-po", "tune", "distill"],
)
def test_two_processes_of_deepspeed_do_what_one_does(verb: list[str], stage: str, tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    save_llama(tmp_path / "teacher", hidden_size=48)
    write(tmp_path / "pairs.jsonl", pairs_of(40, 0))
    write(tmp_path / "held-out.jsonl", pairs_of(9, 1))
    write(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "completion": f"{i} {i}"} for i in range(21)])
    common = ["--max-length", "32", "--lr", "1e-3", "--device", "cpu"]
    run(tmp_path, [*LAUNCH, stage, "-m", "burnish", *verb, "--out", "both", "--batch-size", "2", *common])
    run(tmp_path, [sys.executable, "-m", "burnish", *verb, "--out", "alone", "--batch-size", "4", *common])
    both, alone = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("both", "alone")
    )
    assert len(both) == len(alone) > 4
    for mine, theirs in zip(both, alone, strict=True):
        assert mine["step"] == theirs["step"]
        for key in {"loss", "grad_norm", "eval_loss", "eval_nll", "eval_kl"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (key, mine, theirs)
    name = "adapter_model.safetensors" if "--lora" in verb else "model.safetensors"
    together, single = (load_file(tmp_path / out / name) for out in ("both", "alone"))
    assert together.keys() == single.keys()
    for key, weight in single.items():
        assert (together[key] - weight).abs().max() < 1e-4, key


def run(directory: Path, command: list[str]) -> None:
    path = f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
