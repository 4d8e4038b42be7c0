"""Whole sweeps: shared students, the same bytes twice, killed and joining workers, finals, refusals."""

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
from typing import Any

import pytest

from burnish.data import bundled_model
from burnish.errors import OutputError, ResumeMismatchError
from burnish.recipes.sweep import SweepResult, store, sweep
from tests.cli.test_main import NO_SOCKETS, burnish
from tests.conftest import TinyModel

SMALL: dict[str, Any] = {"scores": ["sf", "do-acp"], "groupings": ["weights", "router", "none"], "keeps": [2, 4, 8]}
TEXT: dict[str, Any] = {"num_samples": 8, "max_length": 32, "eval_samples": 4}

DRIVER = """
import json, os, pathlib, shutil, signal, sys
import burnish.recipes.sweep
from burnish.cli import main
from burnish.families import streaming
from burnish.recipes.sweep import run, store
store.HEARTBEAT_SECONDS, store.GRACE_SECONDS = 1, 2

def child(job):
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    count = [0]
    def before(owner, name, tell):
        real = getattr(owner, name)
        def wrapped(*args, **kwargs):
            if count[0] == job["last"]:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            with open(job["steps"], "a") as file:
                file.write(tell(*args) + "\\n")
            return real(*args, **kwargs)
        setattr(owner, name, wrapped)
    before(pathlib.Path, "rename", lambda path, target: f"rename {path.name}")
    before(pathlib.Path, "replace", lambda path, target: f"replace {path.name}")
    before(shutil, "rmtree", lambda path, *rest: f"rmtree {pathlib.Path(path).name}")
    before(streaming.StreamedModel, "layer", lambda self, index: f"layer {index}")
    before(store, "take", lambda *rest: "take")
    before(run, "measure", lambda *rest, **more: "measure")
    before(store, "finish", lambda *rest, **more: "finish")
    main.run(job["arguments"])

print("ready", flush=True)
children = {}
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
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
    print(pid, flush=True)
"""


class Workers:
    """Runs the command in forked children of one process that has imported the libraries."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.count = directory, 0
        (directory / "driver.py").write_text(DRIVER)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(directory / "driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def _ask(self, job: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments: str, last: int | None = None) -> tuple[int, Path]:
        """Process id and log of a worker; it dies before step number `last`."""
        self.count += 1
        log = self.directory / f"{self.count}.log"
        steps = self.directory / f"{self.count}.steps"
        steps.touch()
        job = {"arguments": ["sweep", *arguments], "log": str(log), "steps": str(steps), "last": last}
        return self._ask(job), log

    def end(self, worker: tuple[int, Path]) -> tuple[int, list[str], str]:
        """Exit code, steps, and what was printed."""
        code = self._ask({"wait": worker[0]})
        return code, worker[1].with_suffix(".steps").read_text().splitlines(), worker[1].read_text()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    found = Workers(tmp_path_factory.mktemp("workers"))
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def arguments(tiny_model: TinyModel, text_file: Path) -> list[str]:
    text = ["--dataset", str(text_file), "--eval-dataset", str(text_file)]
    sizes = ["--num-samples", "8", "--max-length", "32", "--eval-samples", "4"]
    grid = ["--scores", "sf,do-acp", "--groupings", "weights,none", "--keeps", "2,4", "--scalings", "uniform"]
    return [str(tiny_model("qwen3_moe")), *text, *sizes, *grid]


def digest(directory: Path) -> dict[str, str]:
    """Hashes of what a sweep leaves, run records (which hold times) and the database aside."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in ("burnish.json", "sweep.db", "report.html", ".lock")
    }


def small(model: Path, out: Path, text: Path, **changes: Any) -> SweepResult:
    texts = {"dataset": str(text), "eval_dataset": str(text)}
    return sweep(model, out, **{**texts, **SMALL, **TEXT, **changes})


@pytest.fixture(scope="module")
def found(tiny_model: TinyModel, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return small(tiny_model("qwen3_moe"), tmp_path_factory.mktemp("sweep") / "out", text_file)


def test_equal_students_are_measured_once_and_say_so(found: SweepResult) -> None:
    assert len(found.rows) == 2 * 3 * 2 * 3
    rows = {row.configuration.label: row for row in found.rows}
    for score in SMALL["scores"]:
        for scaling in ("uniform", "score"):
            first = rows[f"{score}-weights-k2-{scaling}"]
            assert first.shared_with is None
            for grouping in ("router", "none"):  # keep = top_k: there is nothing to group
                other = rows[f"{score}-{grouping}-k2-{scaling}"]
                assert (other.shared_with, other.forward_kl) == (first.configuration.label, first.forward_kl)
    # all experts in blocks of their own and equal scales: the score decides nothing
    assert rows["do-acp-none-k8-uniform"].shared_with == "sf-none-k8-uniform"


def test_outcome_is_written_whole(found: SweepResult) -> None:
    assert found.out is not None
    written = json.loads((found.out / "sweep.json").read_text())
    assert written == found.to_dict() and len(written["rows"]) == 36
    assert {effect["factor"] for effect in written["effects"]} == {"score", "grouping", "scaling", "keep"}
    record = json.loads((found.out / "burnish.json").read_text())
    assert record["verb"] == "sweep" and record["options"]["keeps"] == "2,4,8" and record["seconds"]["measure"] > 0
    assert (found.out / "report.html").exists()
    front = [row.num_parameters for row in found.front()]
    assert front == sorted(set(front)) and found.ranked[0].configuration.label in written["front"]


def test_u12_1_the_same_sweep_twice_gives_the_same_bytes(arguments: list[str], tmp_path: Path) -> None:
    for seed in "01":
        done = burnish("sweep", *arguments, "--out", str(tmp_path / seed), "--quiet", env={"PYTHONHASHSEED": seed})
        assert done.returncode == 0 and done.stderr == ""
    assert digest(tmp_path / "0") == digest(tmp_path / "1")


def test_u11_1_no_network_and_json_alone_on_stdout(arguments: list[str], tmp_path: Path) -> None:
    done = burnish("sweep", *arguments, "--out", str(tmp_path / "out"), "--json", code=NO_SOCKETS)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rows"]) == 8


def test_u2_1_killed_anywhere_the_same_command_goes_on(workers: Workers, arguments: list[str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    code, steps, printed = workers.end(workers.start(*arguments, "--out", str(whole)))
    assert code == 0, printed
    assert steps.count("measure") == 7 and steps.count("finish") == 6  # one of them is the teacher's
    expected = digest(whole)
    first = steps.index("take")
    for last in (0, *range(2, first, 7), first, first + 1, first + 2, first + 8, len(steps) - 6, len(steps) - 2):
        out = tmp_path / str(last)
        code, before, _ = workers.end(workers.start(*arguments, "--out", str(out), last=last))
        assert code == -signal.SIGKILL and len(before) == last
        code, after, printed = workers.end(workers.start(*arguments, "--out", str(out)))
        assert code == 0, f"killed before {steps[last]}: {printed}"
        assert digest(out) == expected
        assert after.count("finish") == 6 - before.count("finish") or before[-1] == "finish"
        shutil.rmtree(out)


def test_two_workers_share_the_trials_and_agree(workers: Workers, arguments: list[str], tmp_path: Path) -> None:
    more = [
        *arguments,
        "--scores",
        "sf,pp,cp,acp,do-acp",
        "--scalings",
        "uniform,score",
        "--out",
        str(tmp_path / "out"),
    ]
    both = [workers.start(*more) for _ in range(2)]
    ended = [workers.end(worker) for worker in both]
    assert [code for code, _, _ in ended] == [0, 0], ended
    measured = json.loads((tmp_path / "out" / "sweep.json").read_text())
    different = sum(row["shared_with"] is None for row in measured["rows"])
    assert sum(steps.count("finish") for _, steps, _ in ended) == different
    layers = [sum(step.startswith("layer") for step in steps) for _, steps, _ in ended]
    assert sorted(layers) == [0, 2 * 3]  # one of them observed and ran the teacher, for both
    assert ended[0][2].split("\n")[-3:] == ended[1][2].split("\n")[-3:]


def test_a_worker_with_its_own_directory_joins_through_the_storage(
    workers: Workers, arguments: list[str], tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    code, _, printed = workers.end(workers.start(*arguments, "--out", str(tmp_path / "a"), "--storage", storage))
    assert code == 0, printed
    code, steps, _ = workers.end(workers.start(*arguments, "--out", str(tmp_path / "b"), "--storage", storage))
    assert code == 0 and "finish" not in steps
    assert (tmp_path / "a" / "sweep.json").read_bytes() == (tmp_path / "b" / "sweep.json").read_bytes()


def test_u2_2_another_model_text_or_grid_in_the_same_storage_is_refused(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    few = {"scores": ["sf"], "groupings": ["weights"], "keeps": [2], "storage": storage}
    small(tiny_model("qwen3_moe"), tmp_path / "a", text_file, **few)
    other = tiny_model("qwen3_moe", num_hidden_layers=2)
    for model, changes, field in (
        (other, {}, "teacher.config.json was"),
        (tiny_model("qwen3_moe"), {"eval_samples": 3}, "evaluation was"),
        (tiny_model("qwen3_moe"), {"scores": ["cp"]}, "grid.score was 'sf', is 'cp'"),
        (tiny_model("qwen3_moe"), {"num_samples": 7}, "statistics was"),
        (tiny_model("qwen3_moe"), {"dtype": "bfloat16"}, "dtype was 'float32', is 'bfloat16'"),
    ):
        with pytest.raises(ResumeMismatchError, match=field):
            small(model, tmp_path / "b", text_file, **{**few, **changes})
        shutil.rmtree(tmp_path / "b")
    small(other, tmp_path / "b", text_file, **few, overwrite=True)


def test_u2_2_statistics_of_other_options_are_not_used_silently(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    few = {"scores": ["sf"], "groupings": ["weights"], "keeps": [2]}
    small(tiny_model("qwen3_moe"), tmp_path / "out", text_file, **few)
    (tmp_path / "out" / "sweep.db").unlink()
    with pytest.raises(ResumeMismatchError, match=r"options.num_samples was 8, is 7.*--overwrite"):
        small(tiny_model("qwen3_moe"), tmp_path / "out", text_file, **few, num_samples=7)


def test_teacher_states_of_another_text_are_computed_again(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    few = {"scores": ["sf"], "groupings": ["weights"], "keeps": [2]}
    small(tiny_model("qwen3_moe"), tmp_path / "out", text_file, **few)
    fresh = small(tiny_model("qwen3_moe"), tmp_path / "fresh", text_file, **few, eval_samples=3)
    (tmp_path / "out" / "sweep.db").unlink()
    again = small(tiny_model("qwen3_moe"), tmp_path / "out", text_file, **few, eval_samples=3)
    assert again.to_dict() == fresh.to_dict()


def test_changed_weights_behind_equal_headers_are_noticed(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model, statistics = tmp_path / "model", tmp_path / "a" / "statistics" / "statistics" / "routing.safetensors"
    shutil.copytree(tiny_model("qwen3_moe"), model)
    few = {"scores": ["sf"], "groupings": ["weights"], "storage": f"sqlite:///{tmp_path / 'shared.db'}"}
    small(model, tmp_path / "a", text_file, **few, keeps=[2])
    import sqlite3

    with sqlite3.connect(tmp_path / "shared.db") as database:  # as if a trial were still to be done
        database.execute("update trials set state = 'WAITING'")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeMismatchError, match=r"the teacher's loss on the held-out text was \d"):
        small(model, tmp_path / "b", text_file, **few, keeps=[2], statistics=statistics)


def test_finals_distil_the_best_and_stop_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, left = tmp_path / "out", []
    finish = store.finish

    def watched(*arguments: Any, pruned: bool = False, **more: Any) -> None:
        if pruned:
            left.extend(path for path in (out / "finals").iterdir() if not (path / "student").exists())
        finish(*arguments, pruned=pruned, **more)

    monkeypatch.setattr(store, "finish", watched)
    options: dict[str, Any] = {
        "scores": ["ean", "sf"],
        "groupings": ["weights"],
        "scalings": ["uniform"],
        "keeps": [4, 16],
        "num_samples": 16,
        "max_length": 64,
        "eval_samples": 8,
        "finalists": 3,
        "tokens": "8k",
        "lr": 1e-3,
    }
    result = sweep(bundled_model(), out, **options)
    finals = {final.configuration.label: final for final in result.finals}
    assert list(finals) == [row.configuration.label for row in result.ranked[:3]]
    complete = [final for final in result.finals if final.complete]
    assert complete and result.best == out / "best"
    rung = min(tokens for final in result.finals for tokens, _ in final.evaluations)
    first = sorted((dict(final.evaluations)[rung], final.configuration.label) for final in result.finals)
    stopped = [final for final in result.finals if not final.complete]
    assert stopped and all(final.evaluations[-1][0] < complete[0].evaluations[-1][0] for final in stopped)
    assert finals[first[-1][1]] in stopped  # the worst at the first rung
    winner = min(complete, key=lambda final: final.forward_kl)
    before = next(row for row in result.rows if row.configuration == winner.configuration)
    assert winner.forward_kl < before.forward_kl.value
    record = json.loads((out / "best" / "burnish.json").read_text())
    assert record["verb"] == "distill" and (out / "best" / "model.safetensors").exists()
    assert not (out / "finals").exists() and left == []  # who is stopped leaves nothing, at once
    again = sweep(bundled_model(), out, **options)
    assert again.to_dict() == result.to_dict() and again.best == out / "best"


def test_u2_1_killed_in_the_finals_the_same_command_goes_on(workers: Workers, tmp_path: Path) -> None:
    grid = ["--scores", "ean,sf", "--groupings", "weights", "--scalings", "uniform", "--keeps", "4"]
    sizes = ["--num-samples", "16", "--max-length", "64", "--eval-samples", "8"]
    finals = ["--finalists", "2", "--tokens", "4k", "--lr", "1e-3"]
    arguments = [str(bundled_model()), *grid, *sizes, *finals]
    code, steps, printed = workers.end(workers.start(*arguments, "--out", str(tmp_path / "whole")))
    assert code == 0, printed
    taken = [number for number, step in enumerate(steps) if step == "take"][-2]
    weights = "best/model.safetensors"
    for last in ((taken + len(steps)) // 2, len(steps) - 3):
        out = tmp_path / str(last)
        code, before, _ = workers.end(workers.start(*arguments, "--out", str(out), last=last))
        assert code == -signal.SIGKILL and len(before) == last
        code, _, printed = workers.end(workers.start(*arguments, "--out", str(out)))
        assert code == 0, f"killed before {steps[last]}: {printed}"
        assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finalists": 2}, "finalists=2 without tokens"),
        ({"finalists": -1}, "finalists=-1: expected 0 or more"),
        ({"tokens": "many", "finalists": 1}, "tokens"),
        ({"scores": ["sff"]}, "nearest is 'sf'"),
        ({"keeps": [9]}, "a layer has 8 experts"),
        ({"eval_samples": 0}, "eval_samples=0: expected 1 or more"),
        ({"dtype": "int8"}, "choose auto, float32"),
        ({"storage": "sweep.db"}, "expected a URL"),
        ({"dataset": "-"}, "reads its text more than once"),
    ],
)
def test_u9_2_options_out_of_range_are_refused_first(
    options: dict[str, Any], message: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        small(tiny_model("qwen3_moe"), tmp_path / "out", text_file, **options)
    assert not (tmp_path / "out" / "statistics").exists()


def test_what_is_there_is_not_touched(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        small(tiny_model("qwen3_moe"), tmp_path, text_file)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_dry_run_writes_nothing(arguments: list[str], tmp_path: Path) -> None:
    done = burnish("sweep", *arguments, "--out", str(tmp_path / "out"), "--dry-run")
    assert done.returncode == 0 and "8 configurations: 2 scores, 2 groupings, 1 scalings, keep 2, 4" in done.stdout
    assert not (tmp_path / "out").exists()
    done = burnish("sweep", *arguments, "--out", str(tmp_path / "out"), "--dry-run", "--json")
    assert json.loads(done.stdout)["rows"] == []


def test_bad_words_of_the_command_are_one_line(arguments: list[str], tmp_path: Path) -> None:
    done = burnish("sweep", arguments[0], "--out", str(tmp_path / "out"), "--keeps", "four")
    assert done.returncode == 2 and done.stderr.strip() == (
        "burnish: keeps='four': expected whole numbers with commas between, such as 4,8"
    )
