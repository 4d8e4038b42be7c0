"""Kill a conversion before its steps on disk, run it again: the same bytes, and nothing finished is done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.densify import RoutingStatistics, densify
from burnish.errors import ResumeMismatchError
from tests.conftest import TinyModel
from tests.crash import (
    Reference,
    Runner,
    assert_nothing_is_done_twice,
    environment_with,
    hashes,
    kill_and_run_again,
    step_of,
)


@pytest.fixture(scope="module")
def runner(tiny_model: TinyModel, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    directory = tmp_path_factory.mktemp("driver")
    call = {"verb": "densify", "model": str(tiny_model("qwen2_moe")), "out": str(directory / "out"),
            "dataset": str(text_file), "keep": 4,
            "grouping": "balanced", "dtype": "bfloat16", "num_samples": 2, "max_length": 16}  # fmt: skip
    runner = Runner(directory, environment_with("1"), call)
    assert (directory / "out" / "config.json").exists()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def arguments(tiny_model: TinyModel, text_file: Path) -> list[str]:
    """A conversion with a shared expert, a layer that is dense already, merged groups and several shards."""
    model = str(tiny_model("qwen2_moe"))
    return ["densify", model, "--score", "do-acp", "--keep", "4", "--dataset", str(text_file), "--num-samples", "3",
            "--max-length", "16", "--batch-size", "2", "--max-shard-size", "30kB", "--quiet"]  # fmt: skip


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
    "before its first mark": ("replace state.json.new", 0, 0),
    "embedding half written": ("fsync", 1, 0),
    "first layer": ("layer 0", 0, 2),
    "statistics saved, input not removed": ("unlink hidden-0000.bin", 0, 0),
    "dense layer between": ("layer 1", 0, 2),
    "last layer": ("layer 2", 0, 2),
    "before the first shard": ("shard", 0, 0),
    "inside the first shard": ("shard", 0, 3),
    "shard complete without its mark": ("replace done.json.new", 1, 0),
    "inside the last shard": ("shard", -1, 2),
    "after the last shard": ("replace config.json.partial", 0, 0),
    "before the record": ("replace burnish.json.partial", 0, 0),
    "before the output is visible": ("rename files", 0, 0),
}


@pytest.mark.parametrize("point", POINTS)
def test_u2_1_killed_and_run_again_gives_the_same_bytes_and_repeats_no_finished_work(
    point: str, runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    last = step_of(reference.steps, *POINTS[point])
    killed, again = kill_and_run_again(runner, arguments, reference, last, tmp_path / "out")
    assert_nothing_is_done_twice(killed, again)


def test_u2_1_killed_after_the_output_is_visible_leaves_it_complete(
    runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    kill_and_run_again(runner, arguments, reference, step_of(reference.steps, "rename files", 0, 1), tmp_path / "out")


def test_u2_1_killed_again_and_again_comes_to_the_same_end(
    runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    command = [*arguments, "--out", str(tmp_path / "out")]
    runs = 1
    while (done := runner.command(command, last=len(reference.steps) // 4)).code == -signal.SIGKILL:
        runs += 1
        assert runs < 40, "the work does not advance"
    assert done.code == 0, done.printed
    assert runs >= 4
    assert hashes(tmp_path / "out") == reference.hashes


@pytest.mark.slow
def test_u2_1_killed_before_every_single_step(
    runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    for last in range(len(reference.steps)):
        (tmp_path / str(last)).mkdir()
        killed, again = kill_and_run_again(runner, arguments, reference, last, tmp_path / str(last) / "out")
        if "rename files out" not in killed.steps:
            assert_nothing_is_done_twice(killed, again)


@pytest.mark.parametrize("what", ["hidden states", "shard"])
def test_u2_1_a_half_written_file_of_a_killed_run_is_not_trusted(
    what: str, runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    """As after a power cut: the file has its name, but its end is zeros."""
    command = [*arguments, "--out", str(tmp_path / "out")]
    runner.command(command, step_of(reference.steps, "shard", -1, 2))
    partial = tmp_path / ".out.partial"
    if what == "shard":
        file = next((partial / "files").glob("model-00001-*"))
        file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    else:
        (partial / "work" / "rank-0" / "hidden-0000.bin.partial").write_bytes(b"old")
    again = runner.command(command)
    assert again.code == 0, again.printed
    assert hashes(tmp_path / "out") == reference.hashes
    assert any(step.startswith("shard model-00001") for step in again.steps) == (what == "shard")


OTHER = {
    "seed": (["--seed", "7"], "options.seed was 0, is 7"),
    "score": (["--score", "sf"], "options.score was 'do-acp', is 'sf'"),
    "num_samples": (["--num-samples", "2"], "options.num_samples was 3, is 2"),
    "max_shard_size": (["--max-shard-size", "1GB"], "options.max_shard_size was '30kB', is '1GB'"),
}


@pytest.mark.parametrize("option", OTHER)
def test_u2_2_another_option_is_refused_by_name_and_overwrite_starts_anew(
    option: str, runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    flags, difference = OTHER[option]
    command = [*arguments, "--out", str(tmp_path / "out")]
    runner.command(command, step_of(reference.steps, "shard", 1, 1))
    done = runner.command([*command, *flags])
    assert done.code == 1
    assert len(done.printed.splitlines()) == 1
    assert difference in done.printed and "--overwrite" in done.printed
    if option == "max_shard_size":
        assert runner.command([*command, *flags, "--overwrite"]).code == 0
        assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    else:
        assert runner.command(command).code == 0  # and the refusal did no harm to the work
        assert hashes(tmp_path / "out") == reference.hashes


def test_u2_2_changed_text_and_changed_model_files_are_refused_by_name(
    runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(arguments[1], model)
    shutil.copy(arguments[arguments.index("--dataset") + 1], text)
    command = [str(text) if a == arguments[arguments.index("--dataset") + 1] else a for a in arguments]
    command = ["densify", str(model), *command[2:], "--out", str(tmp_path / "out")]
    runner.command(command, step_of(reference.steps, "shard", 1, 1))
    before = text.read_text()
    text.write_text(before[::-1])
    done = runner.command(command)
    assert done.code == 1 and "data was '" in done.printed
    text.write_text(before)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    done = runner.command(command)
    assert done.code == 1 and "teacher.generation_config.json was '" in done.printed
    os.utime(model / "model.safetensors")
    done = runner.command(command)
    assert done.code == 1 and "teacher.model.safetensors was '" in done.printed


def test_u2_3_statistics_are_kept_so_that_deciding_again_observes_nothing(
    runner: Runner, arguments: list[str], reference: Reference, tmp_path: Path
) -> None:
    statistics = reference.out / "statistics" / "routing.safetensors"
    again = runner.command([*arguments, "--out", str(tmp_path / "out"), "--statistics", str(statistics)])
    assert again.code == 0, again.printed
    assert not [step for step in again.steps if step.startswith("layer")]
    found = hashes(tmp_path / "out")
    decided = {name: value for name, value in reference.hashes.items() if name.endswith((".safetensors", "plan.json"))}
    assert {name: found[name] for name in decided} == decided


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


def test_u2_2_changed_statistics_are_refused_by_name(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, statistics = tiny_model("qwen3_moe"), tmp_path / "routing.safetensors"
    for seed in (0, 1):
        densify(
            model, tmp_path / f"{seed}", score="sf", dataset=str(text_file), num_samples=2, max_length=16, seed=seed
        )

    def take(seed: int) -> None:
        shutil.copyfile(tmp_path / f"{seed}" / "statistics" / "routing.safetensors", statistics)

    def interrupt(*args: Any, **options: Any) -> int:
        raise KeyboardInterrupt

    take(0)
    with monkeypatch.context() as patched:
        patched.setattr("burnish.families.conversion.write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            densify(model, tmp_path / "out", score="sf", statistics=statistics)
    other = RoutingStatistics.load(tmp_path / "1" / "statistics" / "routing.safetensors")
    (other + other).save(statistics)
    with pytest.raises(ResumeMismatchError, match="statistics was '"):
        densify(model, tmp_path / "out", score="sf", statistics=statistics)
    take(0)
    assert densify(model, tmp_path / "out", score="sf", statistics=statistics).out == tmp_path / "out"


def test_u4_2_dropped_tensors_are_recorded_by_name(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    data = {"dataset": str(text_file), "num_samples": 2, "max_length": 16}
    record = densify(tiny_model("qwen3_moe"), tmp_path / "o", score="sf", **data).record
    assert record["dropped_tensors"] == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)]
    assert len(record["dropped_tensors"]) == record["counts"]["dropped"]
