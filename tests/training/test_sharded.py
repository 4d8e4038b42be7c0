"""The verbs that train, with weights in pieces: two processes of FSDP2, ZeRO-2 or ZeRO-3 do what one does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.training.base import require_trainable
from tests.align.test_align import pairs_of, write
from tests.tune.conftest import save_llama

ROOT = Path(__file__).parents[2]
ALIGN = ["align", "model", "--dataset", "pairs.jsonl", "--eval-dataset", "held-out.jsonl", "--steps", "4"]
TUNE = ["tune", "model", "--dataset", "rows.jsonl", "--eval-dataset", "rows.jsonl", "--steps", "4"]
DRAW = ["align", "model", "--objective", "rlhf", "--dataset", "rows.jsonl", "--eval-dataset", "rows.jsonl", "--steps",
        "4", "--reward-model", "reward.py:vowels", "--max-new-tokens", "6", "--samples-per-prompt", "2"]  # fmt: skip
VERBS = {
    "align": ALIGN,
    "lora": [*ALIGN, "--lora", "--lora-rank", "4"],
    "sparse-po": [*ALIGN, "--objective", "sparse-po"],
    "tune": TUNE,
    "tune-lora": [*TUNE, "--lora"],
    "muon": [*TUNE, "--optimizer", "muon"],
    "amuse": [*TUNE, "--optimizer", "amuse"],
    "distill": ["distill", "model", "--teacher", "teacher", "--tokens", "512", "--eval-samples", "9"],
    "draws": DRAW,
}
FSDP = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
        str(Path(__file__).with_name("fsdp_on_cpus.py"))]  # fmt: skip
DEEPSPEED = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2",
             "--mixed_precision", "no", "--dynamo_backend", "no", "--use_deepspeed", "--zero_stage"]  # fmt: skip
MEASURED = {"loss", "grad_norm", "eval_loss", "eval_nll", "eval_kl"}


@pytest.mark.parametrize("name", ["lora", "sparse-po"])
def test_two_processes_of_fsdp_do_what_one_does(name: str, tmp_path: Path) -> None:
    compare(FSDP, VERBS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["align", "tune", "tune-lora", "muon", "amuse", "distill"])
def test_all_that_trains_under_fsdp(name: str, tmp_path: Path) -> None:
    compare(FSDP, VERBS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("name", ["align", "lora", "sparse-po", "tune", "tune-lora", "distill"])
def test_two_processes_of_deepspeed_do_what_one_does(name: str, stage: str, tmp_path: Path) -> None:
    compare([*DEEPSPEED, stage, "-m", "burnish"], VERBS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_completions_are_drawn_alike_from_whole_weights_and_from_pieces(tmp_path: Path) -> None:
    prepare(tmp_path)
    found = []
    for name, launch in (("fsdp", FSDP), ("zero-3", [*DEEPSPEED, "3", "-m", "burnish"])):
        found.append(lines_of(launch, VERBS["draws"], tmp_path, name, 2))
    plain = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "burnish"]
    whole = lines_of(plain, VERBS["draws"], tmp_path, "whole", 2)
    for lines in found:
        equal(lines, whole)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_adapters_are_not_merged_into_pieces(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.checkpoint import Checkpoint

    source = Checkpoint.open(save_llama(tmp_path / "model"))
    require_trainable(source, None, merge=True)
    monkeypatch.setenv(variable, "true")
    require_trainable(source, None, merge=False)
    with pytest.raises(ValueError, match="merge: not under"):
        require_trainable(source, None, merge=True)


def compare(launch: list[str], verb: list[str], directory: Path) -> None:
    prepare(directory)
    both = lines_of(launch, verb, directory, "both", 2)
    alone = lines_of([sys.executable, "-m", "burnish"], verb, directory, "alone", 4)
    equal(both, alone)
    assert len(both) > 4
    file = "adapter_model.safetensors" if "--lora" in verb else "model.safetensors"
    together, single = (load_file(directory / out / file) for out in ("both", "alone"))
    assert together.keys() == single.keys()
    assert not all(torch.equal(weight, torch.zeros_like(weight)) for weight in single.values())
    for key, weight in single.items():
        assert (together[key] - weight).abs().max() < 1e-4, key


def prepare(directory: Path) -> None:
    save_llama(directory / "model")
    save_llama(directory / "teacher", hidden_size=48)
    write(directory / "pairs.jsonl", pairs_of(40, 0))
    write(directory / "held-out.jsonl", pairs_of(9, 1))
    write(directory / "rows.jsonl", [{"prompt": f"say {i}", "completion": f"{i} {i}"} for i in range(21)])
    (directory / "reward.py").write_text(
        "def vowels(prompts, completions):\n    return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    )


def lines_of(launch: list[str], verb: list[str], directory: Path, out: str, batch_size: int) -> list[dict[str, float]]:
    """What a run wrote in its metrics.jsonl."""
    common = ["--max-length", "32", "--lr", "1e-3", "--device", "cpu", "--batch-size", str(batch_size)]
    done = subprocess.run(
        [*launch, *verb, "--out", out, *common], cwd=directory, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1",
                          "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (directory / out / "metrics.jsonl").read_text().splitlines()]


def equal(first: list[dict[str, float]], second: list[dict[str, float]]) -> None:
    assert len(first) == len(second)
    for mine, theirs in zip(first, second, strict=True):
        assert mine["step"] == theirs["step"]
        for key in MEASURED & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (key, mine, theirs)
