"""Peak memory: the same for few layers and many, and forecast within 25 % (measured in child processes)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.data import bundled_model
from burnish.densify import densify
from tests.prune.models import save_dense

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "num_attention_heads": 8}
DATA = ["--num-samples", "4", "--max-length", "64"]


def peak(model: Path, out: Path, *arguments: str) -> dict[str, Any]:
    code = "import sys; from burnish.cli.main import run; run(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "prune", str(model), "--out", str(out), "--json", *arguments],
        check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_u1_1_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, text_file: Path) -> None:
    few, many = (save_dense(tmp_path / str(layers), "qwen3", num_hidden_layers=layers, **SIZES) for layers in (3, 21))
    extra = (many / "model.safetensors").stat().st_size - (few / "model.safetensors").stat().st_size
    assert extra > 200e6  # a leak of the layers could not hide
    target = ["--hidden-size", "384", "--intermediate-size", "1000", "--dataset", str(text_file), *DATA]
    results = [peak(model, tmp_path / f"out-{model.name}", *target) for model in (few, many)]
    assert results[1]["peak_rss_bytes"] == pytest.approx(results[0]["peak_rss_bytes"], rel=0.10)
    for result in results:
        assert result["forecast"]["bytes_read"] == result["bytes_read"]
        assert result["forecast"]["bytes_written"] == result["bytes_written"]
        assert result["forecast"]["observe_peak_bytes"] == pytest.approx(result["peak_rss_bytes"], rel=0.25)
    plan = str(tmp_path / "out-21" / "plan.json")
    again = peak(many, tmp_path / "again", "--plan", plan)
    assert again["forecast"]["act_peak_bytes"] == pytest.approx(again["peak_rss_bytes"], rel=0.25)
    assert again["forecast"]["observe_seconds"] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out-21", "again")]
    assert weights[0] == weights[1]


def test_u1_3_the_needs_of_a_bundled_student_are_forecast(tmp_path: Path) -> None:
    densify(bundled_model(), tmp_path / "dense", score="sf", num_samples=8, max_length=128)
    result = peak(
        tmp_path / "dense", tmp_path / "o", "--parameters", "800K", "--num-samples", "64", "--max-length", "256"
    )
    assert result["forecast"]["observe_peak_bytes"] == pytest.approx(result["peak_rss_bytes"], rel=0.25)
    assert result["seconds"]["observe"] / 20 < result["forecast"]["observe_seconds"] < result["seconds"]["observe"] * 20
    assert result["output"]["parameters"] <= 800_000
