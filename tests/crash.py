"""Real processes that are killed by signal 9 before any of their steps on disk.

One process imports the libraries, converts once to warm up, and then forks a child for each run, so that dozens of
runs take seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
import burnish
from burnish.families import conversion, streaming
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
    before(streaming.StreamedModel, "layer", lambda self, index: f"layer {index}")
    before(streaming.HiddenStates, "read", lambda self, start, stop: f"read {self.file.name}")
    before(write, "_write_shard", lambda source, shard, *rest: f"shard {shard.file}")

def child(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    error = os.open(job["log"] + ".stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(error, 1), os.dup2(error, 2)
    watch(Steps(log, job["last"]))
    main.run(job["arguments"])

call = json.loads(sys.stdin.readline())
getattr(burnish, call.pop("verb"))(**call)
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


def step_of(steps: list[str], start: str | None, occurrence: int, later: int) -> int:
    if start is None:
        return 0
    return [number for number, step in enumerate(steps) if step.startswith(start)][occurrence] + later
