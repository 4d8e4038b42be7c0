"""Kill a pruning before its steps on disk, run it again: the same bytes, and nothing finished is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import (
    Reference,
    Runner,
    assert_nothing_is_done_twice,
    environment_with,
    hashes,
    kill_and_run_again,
    step_of,
)
from tests.prune.models import save_dense


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def runner(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    directory = tmp_path_factory.mktemp("driver")
    call = {"verb": "prune", "model": str(model), "out": str(directory / "out"), "dataset": str(text_file),
            "parameters": 20000, "dtype": "bfloat16", "num_samples": 2, "max_length": 16}  # fmt: skip
    runner = Runner(directory, environment_with("1"), call)
    assert (directory / "out" / "config.json").exists()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def arguments(model: Path, text_file: Path) -> list[str]:
    """A pruning of every dimension, with copied, cut and dropped tensors and several shards."""
    return ["prune", str(model), "--layers", "2", "--hidden-size", "24", "--intermediate-size", "30", "--heads", "2",
            "--kv-heads", "1", "--dataset", str(text_file), "--num-samples", "3", "--max-length", "16",
            "--batch-size", "2", "--max-shard-size", "10kB", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def reference(runner: Runner, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    out = tmp_path_factory.mktemp("reference") / "out"
    done = runner.command([*arguments, "--out", str(out)])
    assert done.code == 0, done.printed
    assert [step for step in done.steps if step.startswith("layer")] == ["layer 0", "layer 1", "layer 2"]
    assert sum(step.startswith("shard") for step in done.steps) >= 4
    return Reference(out, done.steps, hashes(out))


POINTS = {
    "before anything": (None, 0, 0),
    "embedding half written": ("fsync", 1, 0),
    "statistics saved, input not removed": ("unlink hidden-0000.bin", 0, 0),
    "last layer": ("layer 2", 0, 2),
    "inside the first shard": ("shard", 0, 3),
    "shard complete without its mark": ("replace done.json.new", 1, 0),
    "inside the last shard": ("shard", -1, 2),
    "before the record": ("replace burnish.json.partial", 0, 0),
    "before the output is visible": ("rename files", 0, 0),
    "after it is visible": ("rename files", 0, 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_u2_1_killed_and_run_again_gives_the_same_bytes_and_repeats_no_finished_work(
    point: str, runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    last = step_of(reference.steps, *POINTS[point])
    killed, again = kill_and_run_again(runner, arguments, reference, last, tmp_path / "out")
    if "rename files out" not in killed.steps:
        assert_nothing_is_done_twice(killed, again)


@pytest.mark.slow
def test_u2_1_killed_before_every_single_step(
    runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    for last in range(len(reference.steps)):
        (tmp_path / str(last)).mkdir()
        killed, again = kill_and_run_again(runner, arguments, reference, last, tmp_path / str(last) / "out")
        if "rename files out" not in killed.steps:
            assert_nothing_is_done_twice(killed, again)


OTHER = {
    "seed": (["--seed", "7"], "options.seed was 0, is 7"),
    "heads": (["--heads", "1"], "options.heads was 2, is 1"),
    "dtype": (["--dtype", "bfloat16"], "options.dtype was 'auto', is 'bfloat16'"),
    "max_length": (["--max-length", "12"], "options.max_length was 16, is 12"),
}


@pytest.mark.parametrize("option", OTHER)
def test_u2_2_another_option_is_refused_by_name_and_overwrite_starts_anew(
    option: str, runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    flags, difference = OTHER[option]
    command = [*arguments, "--out", str(tmp_path / "out")]
    runner.command(command, step_of(reference.steps, "shard", 1, 1))
    done = runner.command([*command, *flags])
    assert done.code == 1 and len(done.printed.splitlines()) == 1
    assert difference in done.printed and "--overwrite" in done.printed
    assert runner.command(command).code == 0  # and the refusal did no harm to the work
    assert hashes(tmp_path / "out") == reference.hashes


def test_u2_2_changed_files_and_plans_are_refused_by_name(
    runner: Runner, arguments: list[str], reference: Reference, model: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text((reference.out / "plan.json").read_text())
    command = ["prune", str(model), "--plan", str(plan), "--out", str(tmp_path / "out"), "--max-shard-size", "10kB"]
    runner.command(command, step_of(reference.steps, "shard", 0, 0) // 2)
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps({**content, "hidden": "0-23"}))
    done = runner.command(command)
    assert done.code == 1 and "plan was " in done.printed
    plan.write_text(json.dumps(content))
    assert runner.command(command).code == 0
    weights = {name: value for name, value in reference.hashes.items() if name.endswith(".safetensors")}
    assert {n: v for n, v in hashes(tmp_path / "out").items() if n in weights} == {
        n: v for n, v in weights.items() if "statistics" not in n
    }


def test_u12_1_a_fresh_process_with_another_hash_seed_gives_the_same_bytes(
    arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from burnish.cli.main import run; run()", *arguments, "--out", str(tmp_path / "out")],
        env=environment_with("0"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == reference.hashes


def test_u12_2_the_global_state_is_the_same_before_and_after_a_call(runner: Runner) -> None:
    assert runner.changed == {}
