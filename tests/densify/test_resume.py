"""Kill a conversion before any of its steps on disk, run it again: the same bytes, and nothing finished is done twice.

One process imports the libraries, converts once to warm up, and then forks a child for each run, so that every run is
a real process that can be killed by signal 9, and dozens of them take seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from burnish.densify import RoutingStatistics, densify
from burnish.errors import ResumeMismatchError
from tests.conftest import TinyModel

DRIVER = '''
import json, os, pathlib, random, shutil, signal, sys
import numpy, torch
import torch._inductor.config as inductor

def state():
    numpy_state = numpy.random.get_state()
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "random": repr(random.getstate()),
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "environment": dict(os.environ),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "directory": os.getcwd(),
        "inductor": {key: repr(value) for key, value in inductor.get_config_copy().items()},
    }

at_start = state()
import transformers
from burnish.checkpoint import write
from burnish.cli import main
from burnish.densify import densify, observe, teacher
at_start["random"] = repr(random.getstate())  # rich draws a number when it is imported

class Steps:
    """Counts steps, writes each to the log, and kills the process before step number `last`."""
    def __init__(self, log, last):
        self.log, self.last, self.count, self.write = log, last, 0, os.write
    def __call__(self, step):
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        self.write(self.log, (step + "\\n").encode())

def watch(steps):
    def before(owner, name, tell):
        real = getattr(owner, name)
        def wrapped(*args, **kwargs):
            steps(tell(*args))
            return real(*args, **kwargs)
        setattr(owner, name, wrapped)
    before(pathlib.Path, "rename", lambda path, target: f"rename {path.name} {pathlib.Path(target).name}")
    before(pathlib.Path, "replace", lambda path, target: f"replace {path.name} {pathlib.Path(target).name}")
    before(pathlib.Path, "unlink", lambda path, *rest: f"unlink {path.name}")
    before(shutil, "rmtree", lambda path, *rest: f"rmtree {pathlib.Path(path).name}")
    before(os, "write", lambda descriptor, piece: "write")
    before(os, "fsync", lambda descriptor: "fsync")
    before(teacher.StreamedTeacher, "layer", lambda self, index: f"layer {index}")
    before(observe.HiddenStates, "read", lambda self, start, stop: f"read {self.file.name}")
    before(write, "_write_shard", lambda source, shard, *rest: f"shard {shard.file}")

def child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    error = os.open(job["log"] + ".stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(error, 1), os.dup2(error, 2)
    watch(Steps(log, job["last"]))
    main.run(job["arguments"])

densify(**json.loads(sys.stdin.readline()))
now = state()
print(json.dumps({key: [at_start[key], now[key]] for key in now if now[key] != at_start[key]}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            child(job)
        except SystemExit as done:
            os._exit(done.code)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''
# What a run takes, and what of the work it found done, are the only things that may differ.
MAY_DIFFER = ("started", "finished", "seconds", "peak_rss_bytes", "bytes_read", "bytes_written")


class Done(NamedTuple):
    """How a run ended, the steps that it began, and what it printed."""

    code: int
    steps: list[str]
    printed: str


class Runner:
    """Calls the library once in a process, and runs the command in forked children of it.

    Attributes:
        changed: what of the process's global state was different after the call.
    """

    def __init__(self, directory: Path, environment: dict[str, str], call: dict[str, Any]) -> None:
        (directory / "driver.py").write_text(DRIVER)
        self.log = directory / "steps.log"
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(directory / "driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=directory,
            text=True,
        )
        self.changed: dict[str, Any] = json.loads(self._ask(call))

    def _ask(self, question: dict[str, Any]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def command(self, arguments: list[str], last: int = -1) -> Done:
        """Run `burnish ARGUMENTS`, killed before step number `last`."""
        code = int(self._ask({"log": str(self.log), "arguments": arguments, "last": last}))
        printed = self.log.with_name(self.log.name + ".stderr").read_text()
        return Done(code, self.log.read_text().splitlines(), printed)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def environment_with(hash_seed: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**kept, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


@pytest.fixture(scope="module")
def runner(tiny_model: TinyModel, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    directory = tmp_path_factory.mktemp("driver")
    call = {"model": str(tiny_model("qwen2_moe")), "out": str(directory / "out"), "dataset": str(text_file),
            "keep": 4, "grouping": "balanced", "dtype": "bfloat16", "num_samples": 2, "max_length": 16}  # fmt: skip
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


def hashes(out: Path) -> dict[str, Any]:
    """SHA-256 of every file; of the run record, its content but for times and amounts of work."""
    found: dict[str, Any] = {}
    for file in sorted(out.rglob("*")):
        if file.is_file():
            found[str(file.relative_to(out))] = hashlib.sha256(file.read_bytes()).hexdigest()
    record = json.loads((out / "burnish.json").read_text())
    record["forecast"] = {key: value for key, value in record["forecast"].items() if not key.endswith("_seconds")}
    found["burnish.json"] = {key: value for key, value in record.items() if key not in MAY_DIFFER}
    return found


class Reference(NamedTuple):
    """An uninterrupted run: where, its steps, and its output."""

    out: Path
    steps: list[str]
    hashes: dict[str, Any]


@pytest.fixture(scope="module")
def reference(runner: Runner, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    out = tmp_path_factory.mktemp("reference") / "out"
    done = runner.command([*arguments, "--out", str(out)])
    assert done.code == 0, done.printed
    assert [step for step in done.steps if step.startswith("layer")] == ["layer 0", "layer 1", "layer 2"]
    assert sum(step.startswith("shard") for step in done.steps) >= 4
    return Reference(out, done.steps, hashes(out))


def finished_layers(steps: list[str]) -> set[str]:
    """Layers whose input was removed: nothing of them is needed any more."""
    gone = {int(step.removeprefix("unlink hidden-").removesuffix(".bin")) for step in steps if "unlink hidden" in step}
    return {f"layer {index}" for index in gone}


def kill_and_run_again(
    runner: Runner, arguments: list[str], reference: Reference, last: int, out: Path
) -> tuple[Done, Done]:
    """Kill before step `last`, run the same command again, and hold the output against the uninterrupted run's."""
    command = [*arguments, "--out", str(out)]
    killed = runner.command(command, last)
    assert killed.code == -signal.SIGKILL, killed.printed
    assert len(killed.steps) == last
    published = "rename files out" in killed.steps
    assert out.exists() == published
    again = runner.command(command)
    if published:
        assert (again.code, again.steps) == (1, []) and "exists already" in again.printed
        assert hashes(out) == reference.hashes
        again = runner.command([*command, "--overwrite"])
    assert again.code == 0, again.printed
    assert hashes(out) == reference.hashes
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return killed, again


def assert_nothing_is_done_twice(killed: Done, again: Done) -> None:
    assert not finished_layers(killed.steps) & set(again.steps)
    began = [step for step in killed.steps if step.startswith("shard")]
    marks = sum(step == "replace done.json.new done.json" for step in killed.steps)
    assert not set(began[:marks]) & set(again.steps)


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


def step_of(steps: list[str], start: str | None, occurrence: int, later: int) -> int:
    if start is None:
        return 0
    return [number for number, step in enumerate(steps) if step.startswith(start)][occurrence] + later


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
        patched.setattr("burnish.densify.convert.write_shards", interrupt)
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
