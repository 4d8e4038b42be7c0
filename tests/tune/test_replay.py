"""What a replay refuses, and what it makes of adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.errors import BurnishError, OutputError
from burnish.tune import TuneResult, replay, tune
from tests.distill.test_train import hashes
from tests.tune.conftest import SMALL, ZEROTH, Run, save_llama


@pytest.fixture(scope="module")
def tuned(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return tune(llama, tmp_path_factory.mktemp("tuned") / "out", dataset=rows, **{**SMALL, **ZEROTH})


def refused(log: Path, model: Path, out: Path, message: str, error: type[Exception] = BurnishError) -> None:
    with pytest.raises(error, match=message):
        replay(log, model, out)
    assert not out.exists() and not out.with_name(f".{out.name}.partial").exists()


def test_another_base_model_is_refused_by_hash(tuned: TuneResult, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", rms_norm_eps=1e-6)
    replay(tuned.out, other, tmp_path / "same")  # the same weights under another config
    changed = save_llama(tmp_path / "changed", intermediate_size=52)
    refused(tuned.out, changed, tmp_path / "out", r"have the hash \w{32}, the log began with \w{32}: give that model")
    half = save_llama(tmp_path / "half", torch.bfloat16)
    refused(tuned.out, half, tmp_path / "out", "give that model")
    refused(tuned.out, tuned.out, tmp_path / "out", "give that model")  # the tuned model is not the base


def test_a_log_that_is_cut_or_changed_is_refused_by_line(tuned: TuneResult, llama: Path, tmp_path: Path) -> None:
    lines = (tuned.out / "trajectory.jsonl").read_text().splitlines(keepends=True)
    log = tmp_path / "log.jsonl"

    def write(*changed: str) -> Path:
        log.write_text("".join(changed))
        return log

    refused(write(*lines[:5], lines[5][:30]), llama, tmp_path / "out", r"log\.jsonl line 6: not a step")
    refused(write(*lines[:4], *lines[5:]), llama, tmp_path / "out", r"line 5: step 4, expected 3")
    refused(write(lines[0].replace("trajectory/1", "trajectory/2"), *lines[1:]), llama, tmp_path / "out", "not a log")
    header = json.loads(lines[0])
    refused(write(json.dumps(header | {"noise": "cpu/7"}) + "\n", *lines[1:]), llama, tmp_path / "out",
            "its noise is 'cpu/7', this version of burnish draws 'cpu/")  # fmt: skip
    refused(write(json.dumps(header | {"base": ""}) + "\n", *lines[1:]), llama, tmp_path / "out", "no log of burnish")
    record = json.loads(lines[3])
    record["gradients"] = [value * 1.001 for value in record["gradients"]]
    with pytest.raises(BurnishError, match="the replayed weights differ from those that the run ended with"):
        replay(write(*lines[:3], json.dumps(record) + "\n", *lines[4:]), llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    refused(tmp_path / "none.jsonl", llama, tmp_path / "out", "cannot be read")


def test_a_log_without_an_end_gives_the_weights_of_its_last_step(
    tuned: TuneResult, run: Run, llama: Path, tmp_path: Path
) -> None:
    """A run that was stopped after six steps is the first six steps of the longer one: its lr is constant."""
    lines = (tuned.out / "trajectory.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:7]))
    result = replay(tmp_path / "log.jsonl", llama, tmp_path / "six")
    assert "a run that did not end" in result.summary()
    run(tmp_path / "short", **ZEROTH | {"steps": 6}, eval_dataset=None)
    assert hashes(tmp_path / "six")["model.safetensors"] == hashes(tmp_path / "short")["model.safetensors"]


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_are_made_again_bit_for_bit(merge: bool, run: Run, llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora": True, "lora_rank": 4, "lora_targets": ["q_proj", "down_proj"], "merge": merge}
    run(tmp_path / "tuned", **ZEROTH, **options)
    torch.manual_seed(123)  # where adapters begin depends on the seed of the run alone
    replay(tmp_path / "tuned", llama, tmp_path / "again", merge=merge)
    wanted, found = hashes(tmp_path / "tuned"), hashes(tmp_path / "again")
    assert found == {name: value for name, value in wanted.items() if not name.endswith(".jsonl")}
    assert ("model.safetensors" if merge else "adapter_model.safetensors") in found


def test_a_dry_run_checks_and_writes_nothing(tuned: TuneResult, llama: Path, tmp_path: Path) -> None:
    result = replay(tuned.out / "trajectory.jsonl", llama, tmp_path / "out", dry_run=True)
    assert "12 steps of MeZOBCD" in result.summary() and "nothing written" in result.summary()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="this run has no adapters"):
        replay(tuned.out, llama, tmp_path / "out", merge=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    refused_before = shutil.disk_usage(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        replay(tuned.out, llama, tmp_path / "out")
    assert refused_before and (tmp_path / "out" / "mine").exists()


def test_u12_2_the_global_random_state_is_kept(tuned: TuneResult, llama: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state().clone()
    replay(tuned.out, llama, tmp_path / "out")
    assert torch.equal(before, torch.get_rng_state())
