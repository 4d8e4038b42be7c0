"""Running a recipe: what it leaves, what it does not do twice, what it refuses, and that a kill changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from burnish.densify import densify
from burnish.errors import BurnishError, OutputError, ResumeMismatchError
from burnish.evaluate import evaluate
from burnish.recipes import Recipe, run_recipe
from tests.cli.test_main import NO_SOCKETS, burnish
from tests.conftest import TinyModel

RECIPE = """\
name: tiny
let: {{teacher: {teacher}, text: {text}}}
seed: 3
steps:
  - densify: {{model: $teacher, dataset: $text, num_samples: 3, max_length: 16, batch_size: 2}}
  - densify: {{model: $teacher, score: sf, statistics: $densify/statistics/routing.safetensors, seed: 5}}
    as: second
  - evaluate: {{before: $teacher, after: [$densify, $second], dataset: $text, num_samples: 3, max_length: 16,
                speed: false}}
  - report
"""
DISTILLED = """\
let: {{teacher: {teacher}, text: {text}}}
steps:
  - densify: {{model: $teacher, dataset: $text, num_samples: 3, max_length: 16}}
  - distill: {{student: $densify, teacher: $teacher, dataset: $text, tokens: 256, max_length: 16, batch_size: 2,
              eval_dataset: $text, eval_samples: 2, eval_every: 64, checkpoint_every: 64, lr: 1e-3}}
  - evaluate: {{before: $teacher, after: [$densify, $distill], dataset: $text, num_samples: 3, max_length: 16,
                speed: false}}
  - report
"""
OUTPUTS = ["01-densify", "02-second", "evaluation.json", "report.html"]
MAY_DIFFER = (
    "started", "finished", "seconds", "peak_rss_bytes", "bytes_read", "bytes_written", "forecast",
    "tokens_per_second", "resumed_at_step",
)  # fmt: skip

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tiny_model: TinyModel, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes the recipe, with some text replaced, and returns the file."""

    def write(*replaced: str) -> Path:
        text = RECIPE.format(teacher=tiny_model("qwen2_moe"), text=text_file)
        for old, new in zip(replaced[::2], replaced[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


class Ran(NamedTuple):
    """A finished run and the recipe file that it is of."""

    file: Path
    out: Path


@pytest.fixture
def ran(write: Write, tmp_path: Path) -> Ran:
    file = write()
    run_recipe(file, tmp_path / "run")
    return Ran(file, tmp_path / "run")


def plain(value: Any) -> Any:
    """A record without what may differ between two equal runs."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in MAY_DIFFER}
    return [plain(item) for item in value] if isinstance(value, list) else value


def contents(out: Path) -> dict[str, Any]:
    """SHA-256 of every file; of records their content but for times, of the page and the log only that they exist."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(file.relative_to(out))
        if file.name == "burnish.json":
            found[name] = plain(json.loads(file.read_text()))
        elif file.name == "metrics.jsonl":
            found[name] = [plain(json.loads(line)) for line in file.read_text().splitlines()]
        else:
            found[name] = file.name in ("log.txt", "report.html") or hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def times(out: Path) -> dict[str, int]:
    """When each file but the log was written."""
    return {str(file): file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != "log.txt"}


def test_a_run_is_the_verbs_one_after_the_other(
    ran: Ran, tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    out, teacher = ran.out, tiny_model("qwen2_moe")
    first, second = tmp_path / "1", tmp_path / "2"
    densify(teacher, first, dataset=str(text_file), num_samples=3, max_length=16, batch_size=2, seed=3)
    densify(teacher, second, score="sf", statistics=first / "statistics" / "routing.safetensors", seed=5)
    measured = evaluate(
        before=teacher, after=[first, second], dataset=text_file, num_samples=3, max_length=16, speed=False, seed=3
    ).to_dict()
    for made, by_hand in ((out / "01-densify", first), (out / "02-second", second)):
        for name in ("model.safetensors", "config.json", "plan.json", "statistics/routing.safetensors"):
            assert (made / name).read_bytes() == (by_hand / name).read_bytes()
    written = json.loads((out / "evaluation.json").read_text())
    for row in (*written["rows"], *measured["rows"]):
        row.pop("model")
    assert written == json.loads(json.dumps(measured))
    assert "<svg" in (out / "report.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted([*OUTPUTS, "burnish.json", "recipe.yaml", "log.txt"])


def test_the_directory_says_what_was_done(ran: Ran) -> None:
    record = json.loads((ran.out / "burnish.json").read_text())
    assert record["verb"] == "run" and record["options"] == {"name": "tiny", "seed": 3}
    assert [step["output"] for step in record["steps"].values()] == OUTPUTS
    assert [step["options"].get("seed") for step in record["steps"].values()] == [3, 5, 3, None]
    assert list(record["seconds"]) == list(record["steps"]) and min(record["seconds"].values()) >= 0
    assert record["environment"]["versions"]["torch"]
    assert Recipe.load(ran.out / "recipe.yaml") == Recipe.load(ran.file)


def test_u13_2_the_log_has_every_line_with_its_time_even_when_quiet(ran: Ran) -> None:
    lines = (ran.out / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 \S", line) for line in lines)
    told = [line.split(" ", 1)[1] for line in lines]
    assert told[0] == "step 1 of 4, densify: started"
    assert any(line.startswith("observe: ") for line in told) and any(line.startswith("write: ") for line in told)
    assert re.fullmatch(r"step 4 of 4, report: done in \d+\.\d s", told[-1])


def test_the_same_again_does_nothing(ran: Ran) -> None:
    before = times(ran.out)
    result = run_recipe(ran.file, ran.out)
    assert result.done == ("densify", "second", "evaluate", "report") and result.results == {}
    assert times(ran.out) == before


def test_only_what_is_missing_is_made(ran: Ran) -> None:
    before = contents(ran.out)
    kept = (ran.out / "01-densify" / "model.safetensors").stat().st_mtime_ns
    (ran.out / "evaluation.json").unlink()
    result = run_recipe(ran.file, ran.out)
    assert result.done == ("densify", "second", "report") and list(result.results) == ["evaluate"]
    assert contents(ran.out) == before
    assert (ran.out / "01-densify" / "model.safetensors").stat().st_mtime_ns == kept


CHANGES = {
    "option": (("num_samples: 3, max_length: 16, batch", "num_samples: 2, max_length: 16, batch"),
               "steps.densify.num_samples was 3, is 2"),
    "new option": (("score: sf", "score: sf, keep: 4"), "steps.second.keep was None, is 4"),
    "seed": (("seed: 3", "seed: 4"), "seed was 3, is 4"),
    "name of a step": (("second", "other"), "order was ['densify', 'second', 'evaluate', 'report'], is ['densify',"),
    "fewer steps": (("  - report\n", ""), "steps.report.verb was 'report', is None"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_u2_2_another_recipe_is_refused_with_the_key_and_both_values(change: str, ran: Ran, write: Write) -> None:
    replaced, message = CHANGES[change]
    before = times(ran.out)
    with pytest.raises(ResumeMismatchError, match=re.escape(message)):
        run_recipe(write(*replaced), ran.out)
    assert times(ran.out) == before


def test_u2_2_changed_input_files_and_versions_are_refused(
    write: Write, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    file = write(str(text_file), str(text))
    run_recipe(file, tmp_path / "run")
    recipe = Recipe.load(file)
    text.unlink()
    assert len(run_recipe(recipe, tmp_path / "run").done) == 4  # what is gone cannot say that it changed
    text.write_bytes(text_file.read_bytes() + b" more")
    with pytest.raises(
        ResumeMismatchError, match=rf"densify reads {re.escape(str(text))} was '1 files, .*', is '1 files"
    ):
        run_recipe(file, tmp_path / "run")
    state = tmp_path / "run" / "burnish.json"
    state.write_text(re.sub(r'"torch": "[^"]+"', '"torch": "1.0"', state.read_text()))
    with pytest.raises(ResumeMismatchError, match=r"versions\.torch was '1\.0', is '"):
        run_recipe(file, tmp_path / "run")


def test_overwrite_starts_anew(ran: Ran, write: Write) -> None:
    before = contents(ran.out)
    (ran.out / ".01-densify.partial").mkdir()
    other = write("score: sf", "score: pp")
    result = run_recipe(other, ran.out, overwrite=True)
    assert result.done == () and list(result.results) == ["densify", "second", "evaluate", "report"]
    assert not (ran.out / ".01-densify.partial").exists()
    after = contents(ran.out)
    assert after["01-densify/model.safetensors"] == before["01-densify/model.safetensors"]
    assert after["02-second/plan.json"] != before["02-second/plan.json"]


def test_only_a_run_of_a_recipe_is_continued_or_discarded(
    ran: Ran, write: Write, tmp_path: Path, text_file: Path
) -> None:
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    for place in (foreign, ran.out / "01-densify"):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="exists already and is not the run of a recipe"):
                run_recipe(ran.file, place, overwrite=overwrite)
    assert (foreign / "thesis.tex").exists() and (ran.out / "01-densify" / "config.json").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file, expected a directory name"):
        run_recipe(ran.file, tmp_path / "file")
    (ran.out / "text.txt").write_bytes(text_file.read_bytes())
    inside = write(str(text_file), str(ran.out / "text.txt"))
    with pytest.raises(OutputError, match=r"holds .*text\.txt, which step densify reads"):
        run_recipe(inside, ran.out, overwrite=True)
    assert (ran.out / "text.txt").exists()


def test_u9_2_a_mistake_in_the_last_step_stops_the_first(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml line 9: evaluate has no option 'dtypes': nearest is 'dtype'"):
        run_recipe(write("speed: false", "dtypes: auto"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_step_is_logged_and_the_next_call_goes_on_there(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write(), tmp_path / "run"
    for done in (("densify", "second"), ("densify", "second", "report")):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["burnish.evaluate.compare"], "load_model", fail)
            with pytest.raises(BurnishError, match="no room"):
                run_recipe(file, out)
        assert (out / "log.txt").read_text().splitlines()[-1].endswith(" stopped: BurnishError no room for the model")
        assert not (out / "burnish.json").exists()
        assert run_recipe(file, out).done == done
        assert (out / "burnish.json").exists()
        (out / "evaluation.json").unlink()


def fail(*arguments: Any, **options: Any) -> Any:
    raise BurnishError("no room for the model")


def test_warnings_are_shown_and_logged(write: Write, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fill"):
        run_recipe(
            write("num_samples: 3, max_length: 16, batch", "num_samples: 900, max_length: 16, batch"), tmp_path / "r"
        )
    assert re.search(r" warning: .* tokens fill \d+ of the 900 blocks", (tmp_path / "r" / "log.txt").read_text())


def test_u13_1_dry_run_shows_the_plan_and_the_forecast_of_the_first_unfinished_verb(
    write: Write, tmp_path: Path
) -> None:
    file, out = write(), tmp_path / "run"
    result = run_recipe(file, out, dry_run=True)
    assert not out.exists() and list(result.results) == ["densify"] and result.results["densify"].out is None
    told = result.summary()
    assert told.index("1. densify -> 01-densify: would run") < told.index("dry run, nothing written: peak memory")
    assert told.index("dry run, nothing written: peak memory") < told.index("2. second -> 02-second: would run")
    assert "   statistics: $densify/statistics/routing.safetensors" in told
    run_recipe(file, out)
    (out / "02-second").rename(tmp_path / "elsewhere")
    before = times(out)
    later = run_recipe(file, out, dry_run=True)
    assert later.done == ("densify", "evaluate", "report") and list(later.results) == ["second"]
    anew = run_recipe(file, out, dry_run=True, overwrite=True)
    assert anew.done == () and list(anew.results) == ["densify"]
    assert times(out) == before


def test_settings_belong_to_a_file_and_ranks_to_a_verb(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="settings change a recipe as it is read"):
        run_recipe(Recipe.load(write()), tmp_path / "run", settings=["seed=1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but a recipe runs in one process"):
        run_recipe(write(), tmp_path / "run")


def test_u11_a_run_opens_no_socket(write: Write, tmp_path: Path) -> None:
    done = burnish("run", str(write()), "--out", str(tmp_path / "run"), code=NO_SOCKETS, env={"HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4. report -> report.html" in done.stdout and "perplexity" in done.stdout


def test_the_command_lists_refuses_and_prints_json(write: Write, tmp_path: Path) -> None:
    listed = burnish("run", "--list")
    assert listed.returncode == 0 and "qwen3-30b-a3b" in listed.stdout and "miniature" in listed.stdout
    assert burnish("run", "miniature").returncode == 2
    wrong = burnish("run", str(write()), "--out", str(tmp_path / "run"), "--set", "densify.kepe=4")
    assert wrong.returncode == 2 and "nearest is 'keep'" in wrong.stderr and wrong.stderr.count("\n") == 1
    done = burnish("run", str(write()), "--out", str(tmp_path / "run"), "--set", "second.score=pp", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shown = json.loads(done.stdout)
    assert shown["steps"]["second"]["options"]["score"] == "pp" and len(shown["results"]["evaluate"]["rows"]) == 3


DRIVER = '''
import json, os, pathlib, shutil, signal, sys
from burnish.cli import main
from burnish.recipes import run_recipe

class Steps:
    """Counts steps, writes each to the log, and kills the process before step number `last`."""
    def __init__(self, log, last):
        self.log, self.last, self.count = log, last, 0
    def __call__(self, step):
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1
        os.write(self.log, (step + "\\n").encode())

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
    before(pathlib.Path, "mkdir", lambda path, *rest: f"mkdir {path.name}")
    before(shutil, "rmtree", lambda path, *rest: f"rmtree {pathlib.Path(path).name}")
    before(os, "fsync", lambda descriptor: "fsync")

run_recipe(sys.argv[1], "warm")
print("warm", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["directory"])
        log = os.open("../steps.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        error = os.open("../stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(error, 1), os.dup2(error, 2)
        try:
            watch(Steps(log, job["last"]))
            main.run(job["arguments"])
        except SystemExit as done:
            os._exit(done.code)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


class Done(NamedTuple):
    """How a run ended, the steps on disk that it began, and what it printed."""

    code: int
    steps: list[str]
    printed: str


class Runner:
    """Runs `burnish run` in forked children of one process that has everything loaded."""

    def __init__(self, directory: Path, recipe: Path, hash_seed: str) -> None:
        self.directory, self.recipe = directory, recipe
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environment |= {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", DRIVER, str(recipe)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=directory,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "warm\n"

    def command(self, place: str, last: int = -1) -> Done:
        """Run the recipe into `PLACE/run`, killed before step number `last`."""
        (self.directory / place).mkdir(exist_ok=True)
        arguments = ["run", str(self.recipe), "--out", "run", "--quiet"]
        job = {"directory": str(self.directory / place), "arguments": arguments, "last": last}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        steps = (self.directory / "steps.log").read_text().splitlines()
        return Done(code, steps, (self.directory / "stderr").read_text())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def runner(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("runner"), write(), "0")
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def reference(runner: Runner) -> Done:
    done = runner.command("reference")
    assert done.code == 0, done.printed
    return done


def published(out: Path) -> list[Path]:
    """Complete outputs of steps: not touched again once they are there."""
    return [*out.glob("0*"), *out.glob("evaluation.json"), *out.glob("report.html")]


def assert_killed_and_run_again_is_the_same(runner: Runner, reference: Done, last: int, place: str) -> None:
    killed = runner.command(place, last)
    assert killed.code == -signal.SIGKILL, killed.printed
    out = runner.directory / place / "run"
    before = {path: path.stat().st_mtime_ns for path in published(out)}
    again = runner.command(place)
    assert again.code == 0, again.printed
    assert contents(out) == contents(runner.directory / "reference" / "run")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in published(out)}.items()
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_u2_1_killed_at_any_point_and_run_again_gives_the_same_bytes(runner: Runner, reference: Done) -> None:
    """Every point of the run's own bookkeeping, and some inside the verbs."""
    own = [number for number, step in enumerate(reference.steps) if ".state.json" in step or "recipe.yaml" in step]
    published = [number for number, step in enumerate(reference.steps) if step.startswith("rename files")]
    assert len(own) >= 10 and len(published) == 2
    after = [number + 1 for number in published]
    for last in sorted({0, *own[::2], own[-1], *published, *after, *range(5, len(reference.steps), 61)}):
        assert_killed_and_run_again_is_the_same(runner, reference, last, f"at-{last}")


@pytest.mark.slow
def test_u2_1_killed_before_every_single_step(runner: Runner, reference: Done) -> None:
    for last in range(len(reference.steps)):
        assert_killed_and_run_again_is_the_same(runner, reference, last, f"before-{last}")


def test_u2_1_killed_again_and_again_comes_to_the_same_end(runner: Runner, reference: Done) -> None:
    runs = 1
    while (done := runner.command("often", last=len(reference.steps) // 3)).code == -signal.SIGKILL:
        runs += 1
        assert runs < 40, "the work does not advance"
    assert done.code == 0 and runs >= 3, done.printed
    assert contents(runner.directory / "often" / "run") == contents(runner.directory / "reference" / "run")


def test_u12_1_another_process_with_other_hashes_gives_the_same_bytes(
    runner: Runner, reference: Done, tmp_path: Path
) -> None:
    other = Runner(tmp_path, runner.recipe, "1")
    done = other.command("reference")
    other.close()
    assert done.code == 0, done.printed
    assert contents(tmp_path / "reference" / "run") == contents(runner.directory / "reference" / "run")


def test_u2_1_a_run_that_trains_gives_the_same_bytes_after_kills(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "distilled.yaml"
    file.write_text(DISTILLED.format(teacher=tiny_model("qwen3_moe"), text=text_file))
    runner = Runner(tmp_path, file, "0")
    reference = runner.command("reference")
    assert reference.code == 0, reference.printed
    record = json.loads((tmp_path / "reference" / "run" / "02-distill" / "burnish.json").read_text())
    assert record["training"]["steps"] == 8 and record["options"]["lr"] == 1e-3
    started = reference.steps.index("rename files 01-densify")
    for last in range(started + 4, len(reference.steps), (len(reference.steps) - started) // 4):
        assert_killed_and_run_again_is_the_same(runner, reference, last, f"at-{last}")
    runner.close()
