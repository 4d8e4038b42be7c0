"""Rounds that are killed by signal 9 before any of their steps on disk leave the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.align.tiny_policy import contents, tiny_tokenizer
from tests.crash import environment_with

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, os, pathlib, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
import peft, torch
from transformers import AutoTokenizer
from tests.align.tiny_policy import TinyFit, tiny_rounds

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])

def watch(log, last):
    count, write = 0, os.write
    def before(owner, name, tell):
        real = getattr(owner, name)
        def wrapped(*args, **kwargs):
            nonlocal count
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            write(log, (tell(*args) + "\\n").encode())
            return real(*args, **kwargs)
        setattr(owner, name, wrapped)
    before(pathlib.Path, "replace", lambda path, target: f"replace {path.parent.name}/{pathlib.Path(target).name}")
    before(pathlib.Path, "rename", lambda path, target: f"rename {pathlib.Path(target).name}")
    before(pathlib.Path, "mkdir", lambda path, *rest: f"mkdir {path.name}")
    before(shutil, "rmtree", lambda path, *rest: f"rmtree {pathlib.Path(path).name}")
    before(os, "fsync", lambda descriptor: "fsync")
    before(TinyFit, "__call__", lambda fit, rows, number, start: f"fit {number}")

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            watch(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), job["last"])
            tiny_rounds(pathlib.Path(job["out"]), tokenizer, **job["options"])[0].run(2)
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
OPTIONS = {
    "whole": {"accumulate": True, "labels": "sampled"},
    "adapters": {"lora": True, "sampler": "hybrid", "samples_per_prompt": 3},
}


class Driver:
    """Runs rounds in forked children, and gives the exit code and the steps on disk that each began."""

    def __init__(self, directory: Path, hash_seed: str) -> None:
        self.log = directory / "steps.log"
        (directory / "driver.py").write_text(DRIVER)
        tiny_tokenizer(directory / "tokenizer")
        command = [sys.executable, "-u", str(directory / "driver.py"), str(ROOT), str(directory / "tokenizer")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment_with(hash_seed), text=True
        )

    def run(self, out: Path, options: dict[str, Any], last: int = -1) -> tuple[int, list[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        job = {"out": str(out), "options": options, "last": last, "log": str(self.log)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Driver]]:
    made = [Driver(tmp_path_factory.mktemp(f"driver{seed}"), seed) for seed in ("0", "1")]
    yield made
    for driver in made:
        assert driver.process.stdin is not None
        driver.process.stdin.close()
        driver.process.wait(timeout=30)


def kill_and_go_on(driver: Driver, out: Path, options: dict[str, Any], last: int, expected: dict[str, str]) -> None:
    code, killed = driver.run(out, options, last)
    assert code == -signal.SIGKILL and len(killed) == last
    code, again = driver.run(out, options)
    assert code == 0
    assert contents(out) == expected, killed[-1:]
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    for number in (0, 1):  # a fit whose weights had their name was not done again
        if f"fit {number}" in killed and killed[killed.index(f"fit {number}") :].count("rename weights"):
            assert f"fit {number}" not in again
    shutil.rmtree(out)


@pytest.mark.parametrize("kind", OPTIONS)
def test_u2_1_killed_rounds_go_on_to_the_same_bytes(drivers: list[Driver], tmp_path: Path, kind: str) -> None:
    options = OPTIONS[kind]
    code, steps = drivers[0].run(tmp_path / "whole", options)
    assert code == 0
    expected = contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")

    chosen = {1, len(steps) - 1}
    for start, later in (("replace round-000/samples", 1), ("replace round-000/rows", 1), ("fit 0", 1),
                         ("rename weights", 0), ("rmtree .weights", 0), ("fit 1", 0)):  # fmt: skip
        at = next(number for number, step in enumerate(steps) if step.startswith(start))
        chosen.add(at + later)
    for last in sorted(chosen):
        kill_and_go_on(drivers[0], tmp_path / "out", options, last, expected)
    # the same bytes in a process that hashes strings otherwise
    assert drivers[1].run(tmp_path / "other", options)[0] == 0
    assert contents(tmp_path / "other") == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
def test_u2_1_wherever_they_are_killed(drivers: list[Driver], tmp_path: Path, kind: str) -> None:
    steps = drivers[0].run(tmp_path / "whole", OPTIONS[kind])[1]
    expected = contents(tmp_path / "whole")
    for last in range(len(steps)):
        kill_and_go_on(drivers[0], tmp_path / "out", OPTIONS[kind], last, expected)
