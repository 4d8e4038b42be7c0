"""Peak memory of tuning without gradients is that of inference (each in a process of its own)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tune.conftest import save_llama

SCRIPT = """
import json, sys, torch
import peft, transformers
from transformers import Trainer
from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_model
from burnish.runs import peak_rss_bytes
from burnish.tune import tune
model, out, rows, options = sys.argv[1:]
before = peak_rss_bytes()
if options == "inference":
    with torch.inference_mode():
        load_model(Checkpoint.open(model), dtype=torch.float32)(torch.full((4, 32), 7))
    print(peak_rss_bytes() - before)
else:
    result = tune(model, out, dataset=rows, steps=2, batch_size=4, max_length=32, device="cpu", **json.loads(options))
    print(result.record["peak_rss_bytes"] - before)
"""


@pytest.mark.slow
def test_without_gradients_the_peak_is_that_of_inference(rows: Path, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size > 180e6

    def peak(options: dict[str, Any] | str) -> int:
        words = options if isinstance(options, str) else json.dumps(options)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "out"), str(rows), words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout.splitlines()[-1])

    inference = peak("inference")
    for optimizer in ("mezo", "mezo-bcd"):
        found = peak({"optimizer": optimizer, "dtype": "float32", **({} if optimizer == "mezo" else {"interval": 1})})
        assert found < 1.3 * inference, (optimizer, found, inference)
        (tmp_path / "out").rename(tmp_path / optimizer)
    assert peak({"optimizer": "adamw", "lr": 1e-5}) > 3 * inference
