"""Compose grid, statistics, students, store and finals into one sweep; the only file that knows all the others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_tokenizer
from burnish.checkpoint.staging import differences, hash_file, refuse_existing, require_apart
from burnish.checkpoint.tensors import floating_name, torch_dtype
from burnish.data import TokenBlocks, bundled_text, token_blocks
from burnish.densify import DensifyPlan, RoutingStatistics, densify
from burnish.densify.convert import STATISTICS_FILE
from burnish.densify.decide import Choice, decide
from burnish.densify.prepare import Subject, compute_dtype, load_statistics
from burnish.densify.teacher import StreamedTeacher
from burnish.errors import ResumeMismatchError
from burnish.evaluate import Estimate
from burnish.families import Family, Student, describe_student
from burnish.recipes.sweep import store
from burnish.recipes.sweep.finals import Budget, distill_finalist, finals
from burnish.recipes.sweep.grid import Configuration, distinct, make_grid
from burnish.recipes.sweep.measure import last_hidden_states, load_states, measure, save_states
from burnish.recipes.sweep.result import FACTORS, Row, SweepResult, plain
from burnish.recipes.sweep.student import FilledStudent
from burnish.report import write_report
from burnish.runs import Progress, choose_device, environment, peak_rss_bytes, write_json
from burnish.runs.units import parse_count
from burnish.training.head import require_head

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel

LOCK, DATABASE, STATISTICS, TEACHER_STATES = ".lock", "sweep.db", "statistics", "teacher.safetensors"
SWEEP, FINALS, BEST = "sweep.json", "finals", "best"
MEASURE_STUDY, FINALS_STUDY = "burnish sweep", "burnish sweep finals"
RECORD_FORMAT = "burnish.run/1"
PROBE_TOKENS = 16
TEACHER_NLL = "teacher_nll"
SAME_TEACHER = 1e-3
"""Relative difference of the teacher's loss that other hardware may make, and other weights do not."""


def sweep(
    model: str | Path,
    out: str | Path,
    *,
    scores: Sequence[str] | None = None,
    groupings: Sequence[str] | None = None,
    scalings: Sequence[str] | None = None,
    keeps: Sequence[int] | None = None,
    dataset: str | None = None,
    num_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 4,
    statistics: str | Path | None = None,
    eval_dataset: str | None = None,
    eval_samples: int = 64,
    finalists: int = 0,
    tokens: int | str | None = None,
    lr: float = 1e-4,
    storage: str | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    family: Family | str | Path | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Compare every way to densify a model over one set of statistics, and distil the best.

    The teacher is observed once and run once over held-out text; a configuration is then a decision of milliseconds,
    a dense student filled in memory, and one forward pass. Configurations that make the same student share it. Work
    that was interrupted goes on when the same command is run again, and any number of workers, on one machine or on
    many that share a `storage`, may run it at the same time.

    Args:
        model: directory or hub name of the teacher.
        out: directory of the sweep; made, or gone on with.
        scores: as of `densify`; None for all seven.
        groupings: as of `densify`; None for the five that merge. "none" adds wider students.
        scalings: as of `densify`; None for "uniform" and "score".
        keeps: experts kept; None for five counts from the router's top-k to all, in equal ratios.
        dataset: calibration text, and training text of the finalists; None is the bundled corpus.
        num_samples: calibration sequences.
        max_length: tokens in each sequence, of calibration and of held-out text; at most the teacher's positions.
        batch_size: sequences per forward pass.
        statistics: of an earlier run, instead of observing.
        eval_dataset: held-out text; None is the bundled one.
        eval_samples: blocks of it.
        finalists: different students of least KL to distil; 0 for none.
        tokens: that a finalist is distilled on in full, such as "1M"; needed where there are finalists.
        lr: peak learning rate of their distillation.
        storage: database URL; None is a SQLite file in `out`.
        seed: of the choice of text, of random groups and of padding.
        dtype: "auto" is the teacher's own; "float32", "bfloat16" or "float16": of weights and computation in memory.
        device: "auto", "cpu", "cuda" or "cuda:N".
        family: a family, or a Python file that defines one, for models that are not built in.
        revision: branch, tag or commit on the hub.
        dry_run: check everything and say what would be done; write nothing.
        overwrite: discard what `out` and the storage hold of another sweep.
        progress: where progress is shown; silent by default.

    Raises:
        BurnishError: the input cannot be used, the storage cannot be reached or holds another sweep.
        ValueError: an option is out of range.

    Source: arXiv 2605.28207, section 4.2: 350 configurations compared before distillation; its five kept counts are
    not known, and the finals are ours.

    Examples:
        >>> from burnish.recipes.sweep import sweep
        >>> sweep("Qwen/Qwen3-30B-A3B", "qwen3-sweep", finalists=4, tokens="10M")  # doctest: +SKIP
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "out", "progress")}
    progress, started = progress or Progress(quiet=True), _now()
    store.require_optuna()
    job = _prepare(str(model), Path(out), options)
    if dry_run:
        return _forecast(job)
    with store.quiet_optuna():
        return _work(job, started, progress)


@dataclass(frozen=True)
class _Job:
    """A request that has passed every check that needs only headers, configs, flags and the text's first rows.

    Attributes:
        model, out, storage: as given; the storage's URL.
        subject: the teacher.
        grid: the configurations.
        students: the structure of the dense student by its number of blocks.
        stored: statistics to decide from instead of observing.
        blocks: held-out text.
        device, dtype: where and in which type models compute.
        budget: tokens of each finalist.
        options: as given.
    """

    model: str
    out: Path
    storage: str
    subject: Subject
    grid: list[Configuration]
    students: dict[int, Student]
    stored: RoutingStatistics | None
    blocks: TokenBlocks
    device: torch.device
    dtype: torch.dtype
    budget: int
    options: dict[str, Any]

    def choice(self, configuration: Configuration) -> Choice:
        """How a configuration decides."""
        return configuration.choice(self.subject.shape, self.subject.rule, self.options["seed"])

    def plan(self, seen: RoutingStatistics, configuration: Configuration) -> DensifyPlan:
        """What a configuration decides."""
        family, top_k = self.subject.family.model_type, self.subject.shape.top_k
        return decide(seen, self.choice(configuration), family=family, top_k=top_k)

    def student(self, configuration: Configuration) -> Student:
        """The structure of a configuration's student."""
        return self.students[self.choice(configuration).num_groups(self.subject.shape.top_k)]


def _prepare(model: str, out: Path, options: dict[str, Any]) -> _Job:
    for name in ("num_samples", "max_length", "batch_size", "eval_samples"):
        least = 2 if name == "max_length" else 1
        if options[name] < least:
            raise ValueError(f"{name}={options[name]}: expected {least} or more")
    if options["finalists"] < 0:
        raise ValueError(f"finalists={options['finalists']}: expected 0 or more")
    if options["finalists"] and options["tokens"] is None:
        raise ValueError(
            f"finalists={options['finalists']} without tokens: say how many to distil each on, such as tokens=1M"
        )
    for name in ("dataset", "eval_dataset"):
        if options[name] == "-":
            raise ValueError(f"{name}='-': a sweep reads its text more than once: give a file")
    if not (out / LOCK).exists():
        refuse_existing(out, overwrite=options["overwrite"])
    subject = Subject.open(model, revision=options["revision"], family=options["family"])
    require_apart(out, subject.teacher.path)
    factors = {name: options[name] for name in ("scores", "groupings", "scalings", "keeps")}
    grid = make_grid(subject.shape, subject.rule, **factors)
    choices = [configuration.choice(subject.shape, subject.rule, options["seed"]) for configuration in grid]
    students = {
        number: describe_student(subject.teacher, subject.family, subject.config, number)
        for number in sorted({choice.num_groups(subject.shape.top_k) for choice in choices})
    }
    stored = None
    if options["statistics"] is not None:
        file = Path(options["statistics"])
        load_statistics(file, subject.shape, max(choices, key=lambda choice: choice.needs_weights))
        stored = load_statistics(file, subject.shape, max(choices, key=lambda choice: choice.needs_outputs))
    dtype = options["dtype"]
    return _Job(
        model=model,
        out=out,
        storage=options["storage"] or f"sqlite:///{(out / DATABASE).absolute()}",
        subject=subject,
        grid=grid,
        students=students,
        stored=stored,
        blocks=_held_out(subject.teacher, options),
        device=choose_device(options["device"]),
        dtype=compute_dtype(subject.config, next(iter(students.values())))
        if dtype == "auto"
        else torch_dtype(floating_name(dtype)),
        budget=0 if options["tokens"] is None else parse_count(options["tokens"], "tokens"),
        options=options,
    )


def _held_out(teacher: Checkpoint, options: dict[str, Any]) -> TokenBlocks:
    """The blocks that `burnish evaluate` makes of the same options, at most as long as the teacher's positions."""
    dataset = options["eval_dataset"]
    return token_blocks(
        load_tokenizer(teacher),
        bundled_text("heldout") if dataset is None else dataset,
        num_samples=options["eval_samples"],
        max_length=_length(teacher, options),
        seed=options["seed"],
        split="test",
        shuffle=dataset is None,
    )


def _length(teacher: Checkpoint, options: dict[str, Any]) -> int:
    return min(int(options["max_length"]), int(teacher.config.get("max_position_embeddings") or options["max_length"]))


def _work(job: _Job, started: str, progress: Progress) -> SweepResult:
    """Observe, decide, measure, distil; what another worker has done, or is doing, is not done again."""
    job.out.mkdir(parents=True, exist_ok=True)
    with _alone_in(job.out, progress):
        if job.options["overwrite"]:
            _empty(job.out)
        database = store.open_storage(job.storage)
        if job.options["overwrite"]:
            store.forget(database, (MEASURE_STUDY, FINALS_STUDY))
        statistics = _observe(job, progress)
        seen = job.stored or RoutingStatistics.load(statistics)
        marks = _fingerprint(job, statistics)
        study = store.open_study(database, MEASURE_STUDY, marks, lambda: _trials(job, seen))
        unfinished = len(store.results(study)) < store.size(study)
        hidden = _teacher_states(job, marks, progress) if unfinished else None
    if hidden is not None:
        _measure_all(job, database, study, seen, hidden, progress)
    measured = store.results(study)
    seconds = {"measure": store.seconds(measured)}
    teacher = {"name": job.subject.teacher.name, "num_parameters": job.subject.num_parameters()}
    teacher["nll"] = plain(Estimate(**study.user_attrs[TEACHER_NLL]))
    result = SweepResult(job.out, _rows(job, measured), teacher, _evaluation(job), {})
    if job.options["finalists"]:
        finalists = result.ranked[: job.options["finalists"]]
        distilled = _finals(job, database, marks, seen, finalists, progress)
        seconds["distil"] = store.seconds(distilled)
        result = replace(result, finals=finals(distilled, finalists))
    record = {
        "format": RECORD_FORMAT,
        "verb": "sweep",
        "started": started,
        "finished": _now(),
        "options": _options(job),
        "teacher": teacher,
        "statistics": {"num_tokens": seen.num_tokens, "hash": marks["statistics"]},
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "environment": environment(),
    }
    result = replace(result, record=json.loads(json.dumps(record, default=str)))
    with _alone_in(job.out, progress):
        return _write(job, result)


def _observe(job: _Job, progress: Progress) -> Path:
    """The statistics file: the one given, or everything there is to observe, kept in the sweep's directory."""
    if job.stored is not None:
        return Path(job.options["statistics"])
    directory = job.out / STATISTICS
    request = _observation(job)
    if not directory.exists():
        densify(job.model, directory, **request, progress=progress)
        return directory / STATISTICS_FILE
    wanted = densify(job.model, directory, **request, dry_run=True, overwrite=True).record
    stored = json.loads((directory / "burnish.json").read_bytes())
    mine, theirs = ({key: record[key] for key in ("source", "options")} for record in (stored, wanted))
    if mine != theirs:
        raise ResumeMismatchError(
            f"{directory}: statistics of another sweep: {differences(mine, theirs)}: choose another --out, or pass"
            " --overwrite to start anew"
        )
    return directory / STATISTICS_FILE


def _observation(job: _Job) -> dict[str, Any]:
    """Options of `densify` that observe all that any configuration could ask for, and write no model."""
    names = ("dataset", "num_samples", "max_length", "batch_size", "seed", "device", "family", "revision")
    options = {name: job.options[name] for name in names}
    shape = job.subject.shape
    return options | {"score": "do-acp", "grouping": "weights", "keep": shape.num_experts, "plan_only": True}


def _fingerprint(job: _Job, statistics: Path) -> dict[str, Any]:
    """Everything that the numbers depend on; nothing that differs between machines that hold the same files."""
    versions = environment()["versions"]
    assert isinstance(versions, dict)
    files = job.subject.teacher.fingerprint()
    return {
        "teacher": {name: re.sub(r", modified \d+", "", mark) for name, mark in files.items()},
        "statistics": hash_file(statistics),
        "evaluation": job.blocks.fingerprint,
        "grid": {name: _levels(job.grid, name) for name in FACTORS},
        "seed": job.options["seed"],
        "dtype": str(job.dtype).removeprefix("torch."),
        "versions": {name: versions[name].partition("+")[0] for name in ("burnish", "torch", "transformers")},
    }


def _levels(grid: Sequence[Configuration], factor: str) -> str:
    return ",".join(dict.fromkeys(str(getattr(configuration, factor)) for configuration in grid))


def _trials(job: _Job, seen: RoutingStatistics) -> list[FrozenTrial]:
    """A waiting trial for each different student, which knows all configurations that make it."""
    members: dict[int, list[int]] = {}
    for index, first in enumerate(distinct(job.plan(seen, configuration) for configuration in job.grid)):
        members.setdefault(first, []).append(index)
    return _waiting([job.grid[first] for first in members], [{"index": f, "members": m} for f, m in members.items()])


def _waiting(configurations: Sequence[Configuration], attributes: Sequence[dict[str, Any]]) -> list[FrozenTrial]:
    choices = {name: sorted({getattr(one, name) for one in configurations}) for name in FACTORS}
    return [
        store.waiting_trial({name: getattr(one, name) for name in FACTORS}, choices, **attribute)
        for one, attribute in zip(configurations, attributes, strict=True)
    ]


def _teacher_states(job: _Job, marks: dict[str, Any], progress: Progress) -> Tensor:
    """The teacher's last hidden states on the held-out text: from the sweep's directory, or computed and put there."""
    file = job.out / TEACHER_STATES
    states = load_states(file, marks)
    if states is None:
        subject, student = job.subject, next(iter(job.students.values()))
        teacher = StreamedTeacher(
            subject.teacher, subject.family, subject.config, student.storage, device=job.device, dtype=job.dtype
        )
        work = job.out / f".teacher-{xxhash.xxh3_64_hexdigest(json.dumps(marks, sort_keys=True).encode())}"
        batch_size = job.options["batch_size"]
        batches = -(-len(job.blocks.input_ids) // batch_size)
        with progress.task("teacher", len(teacher.layers) * batches, unit="batches") as advance:
            states = last_hidden_states(teacher, job.blocks, batch_size=batch_size, work=work, advance=advance)
        save_states(states, file, marks)
        shutil.rmtree(work)
    return states


def _measure_all(
    job: _Job, database: RDBStorage, study: Study, seen: RoutingStatistics, hidden: Tensor, progress: Progress
) -> None:
    """Measure students until every trial has a result; one student is in memory."""
    batch_size = job.options["batch_size"]
    students: dict[str, FilledStudent] = {}

    def filled(configuration: Configuration) -> PreTrainedModel:
        structure = job.student(configuration)
        key = str(structure.width)
        if key not in students:
            students.clear()
            student = FilledStudent(
                job.subject.teacher, structure, device=job.device, dtype=job.dtype, seed=job.options["seed"]
            )
            students[key] = student
            model = student.fill(job.plan(seen, configuration))
            require_head(model, job.blocks.input_ids[:1, :PROBE_TOKENS].to(job.device))
            return model
        return students[key].fill(job.plan(seen, configuration))

    def do(trial: FrozenTrial) -> None:
        model = filled(job.grid[trial.user_attrs["index"]])
        found = measure(model, hidden, job.blocks, batch_size=batch_size)
        numbers = {"nll": astuple(found.nll), "forward_kl": astuple(found.forward_kl)}
        store.finish(database, trial, found.forward_kl.value, numbers)

    _require_same_teacher(job, study, filled(job.grid[0]), hidden)
    total = store.size(study)
    with progress.task("measure", total, done=len(store.results(study)), unit="students") as advance:
        store.work_off(database, study, total, do, advance=advance)


def _require_same_teacher(job: _Job, study: Study, model: PreTrainedModel, hidden: Tensor) -> None:
    """Record the teacher's own loss, or hold it against that of the other workers: equal headers may hide weights."""
    found = measure(model, hidden, job.blocks, batch_size=job.options["batch_size"], teacher=True).nll
    known = study.user_attrs.get(TEACHER_NLL)
    if known is None:
        study.set_user_attr(TEACHER_NLL, asdict(found))
    elif not math.isclose(known["value"], found.value, rel_tol=SAME_TEACHER):
        raise ResumeMismatchError(
            f"{store.shown_url(job.storage)}: the teacher's loss on the held-out text was {known['value']:.6f}, is"
            f" {found.value:.6f}: its weights have changed: pass --overwrite to start anew"
        )


def _rows(job: _Job, results: dict[int, FrozenTrial]) -> tuple[Row, ...]:
    """A row for each configuration of the grid, in its order."""
    rows: dict[int, Row] = {}
    for first, trial in results.items():
        nll, kl = (Estimate(*trial.user_attrs[name]) for name in ("nll", "forward_kl"))
        for index in trial.user_attrs["members"]:
            shared = None if index == first else job.grid[first].label
            rows[index] = Row(job.grid[index], job.student(job.grid[index]).num_parameters, nll, kl, shared)
    return tuple(rows[index] for index in range(len(job.grid)))


def _options(job: _Job) -> dict[str, Any]:
    """Options for the record: the factors filled in, and none that only steers this run."""
    levels = {f"{name}s": _levels(job.grid, name) for name in FACTORS}
    steering = ("dry_run", "overwrite")
    kept = {name: value for name, value in (job.options | levels).items() if name not in steering and value is not None}
    if isinstance(kept.get("family"), Family):
        kept["family"] = kept["family"].name
    return kept | {"storage": store.shown_url(job.storage) if job.options["storage"] else DATABASE}


def _evaluation(job: _Job) -> dict[str, Any]:
    return {
        "dataset": job.options["eval_dataset"],
        "fingerprint": job.blocks.fingerprint,
        "num_samples": len(job.blocks.input_ids),
        "max_length": job.blocks.input_ids.shape[1],
        "num_tokens": job.blocks.num_tokens,
        "dtype": str(job.dtype).removeprefix("torch."),
    }


def _finals(
    job: _Job,
    database: RDBStorage,
    marks: dict[str, Any],
    seen: RoutingStatistics,
    finalists: Sequence[Row],
    progress: Progress,
) -> dict[int, FrozenTrial]:
    """Distil the finalists by successive halving; their results by rank."""
    chosen = [row.configuration for row in finalists]
    length = _length(job.subject.teacher, job.options)
    budget = Budget.of(job.budget, finalists=len(chosen), per_step=length * job.options["batch_size"])
    names = ("batch_size", "lr", "seed", "eval_samples")
    wanted = marks | {
        "finalists": [configuration.label for configuration in chosen],
        "budget": asdict(budget),
        "training": {name: job.options[name] for name in names} | {"max_length": length},
    }
    study = store.open_study(
        database,
        FINALS_STUDY,
        wanted,
        lambda: _waiting(chosen, [{"index": rank} for rank in range(len(chosen))]),
        pruner=budget.pruner(),
    )
    options = job.options | {
        "max_length": length,
        "eval_dataset": job.options["eval_dataset"] or str(bundled_text("heldout")),
    }

    def do(trial: FrozenTrial) -> None:
        configuration = chosen[trial.user_attrs["index"]]
        progress.say(f"distilling {configuration.label}")
        distill_finalist(
            database,
            study,
            trial,
            job.out / FINALS / configuration.label,
            model=job.model,
            plan=job.plan(seen, configuration),
            budget=budget,
            options=options,
            progress=progress,
        )

    return store.work_off(database, study, len(chosen), do, advance=lambda trials: None)


def _write(job: _Job, result: SweepResult) -> SweepResult:
    """Write what was found; whichever worker comes last writes it again."""
    complete = [final for final in result.finals if final.complete]
    if complete:
        best = min(complete, key=lambda final: final.forward_kl)
        found, kept = job.out / FINALS / best.configuration.label / "student", job.out / BEST
        if found.exists():
            shutil.rmtree(kept, ignore_errors=True)
            found.rename(kept)
        shutil.rmtree(job.out / FINALS, ignore_errors=True)
        result = replace(result, best=kept if kept.exists() else None)
    write_json(job.out / SWEEP, result.to_dict())
    write_json(job.out / "burnish.json", result.record)
    write_report(job.out, overwrite=True)
    return result


def _forecast(job: _Job) -> SweepResult:
    """What a sweep would do and need."""
    parameters = sorted({student.num_parameters for student in job.students.values()})
    levels = {name: len({getattr(one, name) for one in job.grid}) for name in FACTORS}
    keeps = ", ".join(map(str, sorted({configuration.keep for configuration in job.grid})))
    weights = max(parameters) * job.dtype.itemsize
    states = job.blocks.input_ids.numel() * job.subject.shape.hidden_size * job.dtype.itemsize
    lines = [
        f"{len(job.grid)} configurations: {levels['score']} scores, {levels['grouping']} groupings, {levels['scaling']}"
        f" scalings, keep {keeps}",
        f"students of {', '.join(f'{count:,}' for count in parameters)} parameters; measuring takes about"
        f" {(weights + states) / 1e9:.2f} GB beside the libraries",
    ]
    if job.stored is None:
        directory = job.out / STATISTICS
        needs = densify(job.model, directory, **_observation(job), dry_run=True, overwrite=True).forecast
        lines.append(
            f"observing takes about {needs.observe_seconds:.0f} s and {needs.observe_peak_bytes / 1e9:.2f} GB on this"
            " CPU"
        )
    return SweepResult(None, (), {"name": job.subject.teacher.name}, _evaluation(job), {}, forecast=lines)


@contextlib.contextmanager
def _alone_in(directory: Path, progress: Progress) -> Iterator[None]:
    """Workers that share a directory take turns in the block; the lock of one that is killed is released."""
    with (directory / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"waiting for another worker in {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
