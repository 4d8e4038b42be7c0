"""Run a recipe in one directory, step by step, and go on after an interruption where it stopped.

The directory's own state is a run record without an end, `.state.json`; the last act renames it to `burnish.json`. A
verb's output appears complete or not at all, so that a step is done when its output is there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from burnish.checkpoint.staging import differences, remove_traces
from burnish.errors import OutputError, ResumeMismatchError
from burnish.recipes.log import logged
from burnish.recipes.recipe import Recipe, Step, bundled, filled, texts
from burnish.recipes.verbs import VERBS, parameters_of
from burnish.runs import Progress, environment, write_json
from burnish.runs.ranks import world_size
from burnish.runs.resources import write_text

STATE_FILE, RECORD_FILE, RECIPE_FILE, LOG_FILE = ".state.json", "burnish.json", "recipe.yaml", "log.txt"
RECORD_FORMAT = "burnish.run/1"


@dataclass(frozen=True)
class RunResult:
    """What a run did, or would do.

    Attributes:
        out: the run directory; None for a dry run.
        record: the run record, as in `burnish.json`.
        done: names of the steps whose output was there already.
        results: what the verbs of the other steps returned; of a dry run, the first of them at most.
    """

    out: Path | None
    record: dict[str, Any]
    done: tuple[str, ...]
    results: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """One line a step for people; of a dry run also the options, and the forecast of the first unfinished one."""
        lines = [f"{self.record['options']['name']}, seed {self.record['options']['seed']}"]
        for number, (name, step) in enumerate(self.record["steps"].items(), start=1):
            state = "was there" if name in self.done else "would run"
            if self.out is not None and name not in self.done:
                state = f"{self.record['seconds'][name]:.1f} s"
            lines.append(f"{number}. {name} -> {step['output']}: {state}")
            if self.out is None:
                lines += [f"   {key}: {value}" for key, value in step["options"].items()]
                lines += [f"   {line}" for line in _summary(self.results.get(name))]
        lines.append("dry run, nothing written" if self.out is None else f"wrote {self.out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        results = {name: result.to_dict() for name, result in self.results.items() if hasattr(result, "to_dict")}
        return {"out": str(self.out) if self.out else None, **self.record, "done": list(self.done), "results": results}


def run_recipe(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    settings: Sequence[str] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> RunResult:
    """Run the verbs of a recipe in one directory: `01-densify/`, `02-distill/`, `evaluation.json`, `report.html`.

    Everything is checked before the first verb starts. The same call goes on after an interruption: what is there is
    not made again, and a verb that was stopped half-way resumes by its own means.

    Args:
        recipe: a recipe, a YAML file, or the name of a recipe that ships with burnish.
        out: the run directory.
        settings: values to set in the recipe, such as "distill.tokens=1M"; see `Recipe.load`.
        dry_run: check everything and give the forecast of the first unfinished verb; write nothing.
        overwrite: discard a run in `out`, of this or another recipe, and start anew.
        resume: continue a verb that was stopped half-way; otherwise it starts anew. Finished steps stay.
        progress: where progress is shown; silent by default. `out/log.txt` has it in any case.

    Raises:
        ValueError: the recipe has a mistake; says the file, the line and the nearest known word.
        ResumeMismatchError: `out` is a run of another recipe, of other inputs or versions; says what differs.
        OutputError: `out` holds something else.
        BurnishError: a verb failed.

    Examples:
        >>> from burnish.recipes import run_recipe
        >>> run_recipe("miniature", "miniature-run", settings=["distill.tokens=100k"])  # doctest: +SKIP
    """
    if world_size() > 1:
        raise ValueError(f"WORLD_SIZE={world_size()}, but a recipe runs in one process: start it without torchrun")
    out, progress = Path(out), progress or Progress(quiet=True)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, settings)
    elif settings:
        raise ValueError("settings change a recipe as it is read: give the file, not the loaded recipe")
    record, stored = _new_record(recipe), _stored(out)
    if stored is None:
        _require_free(out)
    elif overwrite:
        _require_apart(out, recipe)
    else:
        _require_same(out, recipe, stored, record)
        record = stored
    done = tuple(step.name for step in recipe.steps if record is stored and (out / step.output).exists())
    if dry_run:
        return RunResult(None, record, done, _forecast(recipe, out, done))
    if overwrite:
        _discard(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be created ({error.strerror})") from error
    with logged(progress, out / LOG_FILE) as told:
        return _run(recipe, out, record, done, resume, told)


def _run(
    recipe: Recipe, out: Path, record: dict[str, Any], done: tuple[str, ...], resume: bool, progress: Progress
) -> RunResult:
    """Do the steps whose output is not there, and keep the state."""
    if (out / RECORD_FILE).exists() and len(done) == len(recipe.steps):
        progress.say("every step is done already")
        return RunResult(out, record, done)
    write_json(out / STATE_FILE, record)
    write_text(out / RECIPE_FILE, recipe.to_yaml())
    (out / RECORD_FILE).unlink(missing_ok=True)
    results = {}
    for number, step in enumerate(recipe.steps, start=1):
        place = f"step {number} of {len(recipe.steps)}, {step.name}"
        if step.name in done:
            progress.say(f"{place}: {step.output} is there")
            remove_traces(out / step.output)
            continue
        progress.say(f"{place}: started")
        entry = record["steps"][step.name]
        entry |= {"inputs": _marks(step), "started": entry.get("started", _now())}
        write_json(out / STATE_FILE, record)
        clock = time.perf_counter()
        results[step.name] = _call(step, recipe, out, resume=resume, progress=progress)
        record["seconds"][step.name] = time.perf_counter() - clock
        entry["finished"] = _now()
        write_json(out / STATE_FILE, record)
        for line in _summary(results[step.name]):
            progress.say(line)
        progress.say(f"{place}: done in {record['seconds'][step.name]:.1f} s")
    record["finished"] = _now()
    write_json(out / STATE_FILE, record)
    (out / STATE_FILE).rename(out / RECORD_FILE)
    return RunResult(out, record, done, results)


def _call(
    step: Step, recipe: Recipe, out: Path, *, resume: bool = True, dry_run: bool = False, progress: Progress
) -> Any:
    """Call the verb of a step; a result that the verb does not write itself is written as JSON."""
    takes = parameters_of(step.verb)
    names = bundled() | {other.name: str(out / other.output) for other in recipe.steps}
    given = {
        "out": out / step.output,
        "run_dir": out,
        "resume": resume,
        "dry_run": dry_run,
        "overwrite": dry_run,  # writes nothing; what is there may be about to be discarded
        "progress": progress,
    }
    options = filled(step.options, names)
    result = VERBS[step.verb].load()(**options, **{key: value for key, value in given.items() if key in takes})
    if "out" not in takes:
        write_json(out / step.output, result.to_dict())
    return result


def _forecast(recipe: Recipe, out: Path, done: tuple[str, ...]) -> dict[str, Any]:
    """What the dry run of the first unfinished step says, where its verb has one."""
    step = next((step for step in recipe.steps if step.name not in done), None)
    if step is None or "dry_run" not in parameters_of(step.verb):
        return {}
    return {step.name: _call(step, recipe, out, dry_run=True, progress=Progress(quiet=True))}


def _new_record(recipe: Recipe) -> dict[str, Any]:
    return {
        "format": RECORD_FORMAT,
        "verb": "run",
        "started": _now(),
        "options": {"name": recipe.name, "seed": recipe.seed},
        "steps": {
            step.name: {"verb": step.verb, "output": step.output, "options": step.options} for step in recipe.steps
        },
        "environment": environment(),
        "seconds": {},
    }


def _stored(out: Path) -> dict[str, Any] | None:
    """The record of the run in a directory, finished or not; None where there is none."""
    for file in (out / STATE_FILE, out / RECORD_FILE):
        if file.exists():
            try:
                record = json.loads(file.read_bytes())
            except ValueError as error:
                raise OutputError(f"{file}: damaged ({error}): choose another directory") from error
            return record if isinstance(record, dict) and record.get("verb") == "run" else None
    return None


def _require_free(out: Path) -> None:
    """Raise OutputError where `out` holds anything but the first traces of a run that was killed."""
    if out.is_file():
        raise OutputError(f"{out}: is a file, expected a directory name")
    if out.is_dir() and {file.name for file in out.iterdir()} - {LOG_FILE, f"{STATE_FILE}.partial"}:
        raise OutputError(f"{out}: exists already and is not the run of a recipe: choose another name")


def _require_apart(out: Path, recipe: Recipe) -> None:
    """Raise OutputError where a run that is to be discarded holds what the recipe reads."""
    for step in recipe.steps:
        for text in _inputs(step):
            if Path(text).resolve().is_relative_to(out.resolve()):
                raise OutputError(f"{out}: holds {text}, which step {step.name} reads: choose another name")


def _require_same(out: Path, recipe: Recipe, stored: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise ResumeMismatchError unless the stored run is of this recipe, these inputs and these versions."""
    old, new = _identity(stored), _identity(record)
    for step in recipe.steps:
        marks = stored["steps"].get(step.name, {}).get("inputs", {})
        now = _marks(step)
        for text in marks.keys() & now.keys():  # what is gone is not needed, or the verb will say so
            old[f"{step.name} reads {text}"], new[f"{step.name} reads {text}"] = marks[text], now[text]
    if old != new:
        raise ResumeMismatchError(
            f"{out}: run of another recipe: {differences(old, new)}: choose another directory, or pass --overwrite to"
            " discard it"
        )


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for two runs to be the same, with names that a user knows."""
    versions = record["environment"]["versions"]
    return {
        **record["options"],
        "order": list(record["steps"]),
        "steps": {name: {"verb": step["verb"], **step["options"]} for name, step in record["steps"].items()},
        "versions": {name: versions[name] for name in ("burnish", "torch", "transformers")},
    }


def _inputs(step: Step) -> list[str]:
    """The texts among a step's options that name something on this disk; not what other steps make."""
    return [text for text in texts(step.options) if text and Path(text).expanduser().exists()]


def _marks(step: Step) -> dict[str, str]:
    """What each input looks like now: number, size and time of its files, no content."""
    marks = {}
    for text in _inputs(step):
        path = Path(text).expanduser()
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        seen = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        size = sum(size for _, size, _ in seen)
        marks[text] = f"{len(files)} files, {size} bytes, {xxhash.xxh3_64_hexdigest(repr(seen).encode())}"
    return marks


def _discard(out: Path) -> None:
    """Remove a run; its record goes last, so that what a kill leaves is still known as a run."""
    for path in sorted(out.iterdir() if out.exists() else (), key=lambda path: path.name in (STATE_FILE, RECORD_FILE)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _summary(result: Any) -> list[str]:
    """The lines that a verb's result has for people."""
    text: str = result.summary() if hasattr(result, "summary") else ""
    return text.splitlines()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
