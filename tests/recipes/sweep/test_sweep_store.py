"""Trials that wait are taken once, come back when a worker is lost, and belong to one sweep."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import BurnishError, ResumeMismatchError
from burnish.recipes.sweep import store

optuna = pytest.importorskip("optuna")

CONTEXT = multiprocessing.get_context("fork")  # the libraries are imported once


def work(url: str, directory: Path, count: int, pause: float, dies_after: int | None) -> None:
    """What a worker process does; it dies before it adds trial number `dies_after`."""
    name = directory / str(os.getpid())
    with (name.with_suffix(".err")).open("w") as error:
        os.dup2(error.fileno(), 1)
        os.dup2(error.fileno(), 2)
    store.HEARTBEAT_SECONDS, store.GRACE_SECONDS = 1, 2
    add, added = optuna.study.Study.add_trial, []

    def dying_add(study: Any, trial: Any) -> None:
        if len(added) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        added.append(trial)
        add(study, trial)

    optuna.study.Study.add_trial = dying_add

    def trials() -> list[Any]:
        return [store.waiting_trial({"cell": i}, {"cell": range(count)}, index=i) for i in range(count)]

    def do(trial: Any) -> None:
        with (directory / "log").open("a") as log:
            log.write(f"{trial.user_attrs['index']}\n")
        time.sleep(pause)
        store.finish(storage, trial, float(trial.params["cell"]), {"found": trial.params["cell"]})

    with store.quiet_optuna():
        storage = store.open_storage(url)
        study = store.open_study(storage, "test", {"of": 1}, trials)
        done = store.work_off(storage, study, count, do, advance=lambda n: None, patience=0.05)
    found = sorted((i, trial.value, trial.user_attrs["found"]) for i, trial in done.items())
    name.with_suffix(".out").write_text(json.dumps(found))


def start(url: str, directory: Path, count: int, *, pause: float = 0.0, dies_after: int | None = None) -> Any:
    process = CONTEXT.Process(target=work, args=(url, directory, count, pause, dies_after), daemon=True)
    process.start()
    return process


def require_done(process: Any, directory: Path, count: int) -> None:
    """The worker ended well, knows every result, and nothing was printed."""
    process.join(timeout=60)
    name = directory / str(process.pid)
    error = name.with_suffix(".err").read_text()
    assert process.exitcode == 0 and error == ""
    assert json.loads(name.with_suffix(".out").read_text()) == [[i, float(i), i] for i in range(count)]


def done(directory: Path) -> list[int]:
    log = directory / "log"
    return sorted(map(int, log.read_text().split())) if log.exists() else []


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def quiet() -> Iterator[None]:
    with store.quiet_optuna():
        yield


def test_four_workers_do_every_trial_once_and_print_nothing_of_optunas(url: str, tmp_path: Path) -> None:
    workers = [start(url, tmp_path, 40) for _ in range(4)]
    for process in workers:
        require_done(process, tmp_path, 40)
    assert done(tmp_path) == list(range(40))


def test_u2_1_a_killed_workers_trial_is_done_again_and_no_other(url: str, tmp_path: Path) -> None:
    first = start(url, tmp_path, 6, pause=0.3)
    while len(done(tmp_path)) < 3:
        time.sleep(0.01)
    first.kill()
    first.join()
    require_done(start(url, tmp_path, 6), tmp_path, 6)
    assert done(tmp_path) == [0, 1, 2, 2, 3, 4, 5]


def test_u2_1_a_worker_killed_while_it_adds_trials_is_replaced(url: str, tmp_path: Path) -> None:
    first = start(url, tmp_path, 6, dies_after=4)
    first.join(timeout=60)
    assert first.exitcode == -signal.SIGKILL
    require_done(start(url, tmp_path, 6), tmp_path, 6)
    assert done(tmp_path) == list(range(6))


def opened(url: str, count: int = 2) -> tuple[Any, Any]:
    storage = store.open_storage(url)
    trials = [store.waiting_trial({"cell": i}, {"cell": range(count)}, index=i) for i in range(count)]
    return storage, store.open_study(storage, "test", {"model": {"a": 1}, "seed": 0}, lambda: trials)


def test_a_trial_taken_by_one_is_not_taken_by_another(url: str, quiet: None) -> None:
    (mine, study), (theirs, other) = opened(url), opened(url)
    taken = [store.take(mine, study), store.take(theirs, other), store.take(mine, study)]
    assert [trial and trial.user_attrs["index"] for trial in taken] == [0, 1, None]


def test_a_result_that_comes_too_late_has_no_effect(url: str, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, study = opened(url, 1)
    late = store.take(storage, study)
    assert late is not None
    monkeypatch.setattr(storage, "grace_period", -1)  # at once lost
    again = store.take(storage, study)
    assert again is not None and again.number != late.number
    store.finish(storage, late, 1.0)
    assert store.results(study) == {}
    store.finish(storage, again, 2.0)
    assert {index: trial.value for index, trial in store.results(study).items()} == {0: 2.0}


def test_a_trial_lost_between_failing_and_waiting_again_comes_back(url: str, quiet: None) -> None:
    storage, study = opened(url, 1)
    trial = store.take(storage, study)
    assert trial is not None
    storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)

    def do(again: Any) -> None:
        store.finish(storage, again, 3.0)

    found = store.work_off(storage, study, 1, do, advance=lambda trials: None, patience=0.01)
    assert {index: trial.value for index, trial in found.items()} == {0: 3.0}


def test_a_trial_shows_life_from_the_moment_it_is_taken(url: str, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, study = opened(url, 1)
    assert store.take(storage, study) is not None
    monkeypatch.setattr(storage, "grace_period", -1)
    assert len(storage._get_stale_trial_ids(study._study_id)) == 1


def test_u2_2_another_sweeps_storage_is_refused_by_field(url: str, quiet: None) -> None:
    storage, _ = opened(url)
    with pytest.raises(ResumeMismatchError, match=r"model\.a was 1, is 2: choose another --storage"):
        store.open_study(storage, "test", {"model": {"a": 2}, "seed": 0}, list)
    store.forget(storage, ["test", "never there"])
    store.open_study(storage, "test", {"model": {"a": 2}, "seed": 0}, list)


def test_storages_that_cannot_be_opened_are_one_line(tmp_path: Path, quiet: None) -> None:
    with pytest.raises(ValueError, match="expected a URL such as sqlite"):
        store.open_storage("sweep.db")
    with pytest.raises(BurnishError, match="cannot be opened") as caught:
        store.open_storage(f"sqlite:///{tmp_path}/no/such/directory.db")
    assert "\n" not in str(caught.value)
    with pytest.raises(BurnishError, match=r"postgresql://me:\*\*\*@") as caught:
        store.open_storage("postgresql://me:secret@127.0.0.1:1/nothing")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BurnishError, match=r"pip install 'burnish\[sweep\]'"):
        store.require_optuna()


def test_optunas_verbosity_is_as_it_was(url: str) -> None:
    before = optuna.logging.get_verbosity()
    with store.quiet_optuna():
        opened(url)
    assert optuna.logging.get_verbosity() == before


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of its own, on a socket in a temporary directory, as an unprivileged user."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'burnish[postgresql]'")
    found = shutil.which("pg_ctl") or next(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), None)
    if found is None:
        pytest.skip("no PostgreSQL server binaries on this machine")
    owner: dict[str, Any] = {}
    directory = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path must be short
    if os.getuid() == 0:  # the server refuses to run as root
        try:
            owner = {"user": "nobody"}
            shutil.chown(directory, "nobody")
        except (LookupError, PermissionError):
            pytest.skip("the server needs a user that is not root")
    programs = Path(found).resolve().parent

    def run(program: str, *arguments: str) -> None:
        subprocess.run([programs / program, *arguments], check=True, cwd=directory, stdout=subprocess.DEVNULL, **owner)

    data = str(directory / "data")
    run("initdb", "-D", data, "-U", "burnish", "--auth=trust", "--no-sync")
    run(
        "pg_ctl",
        "-D",
        data,
        "-w",
        "-l",
        str(directory / "log"),
        "-o",
        f"-c listen_addresses='' -k {directory}",
        "start",
    )
    try:
        yield f"postgresql://burnish@/postgres?host={directory}"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(directory)


def test_postgresql_serves_several_workers_and_a_killed_one(postgresql: str, tmp_path: Path) -> None:
    workers = [start(postgresql, tmp_path, 30, pause=0.02) for _ in range(4)]
    while len(done(tmp_path)) < 5:
        time.sleep(0.01)
    workers[0].kill()
    for process in workers[1:]:
        require_done(process, tmp_path, 30)
    assert sorted(set(done(tmp_path))) == list(range(30)) and len(done(tmp_path)) <= 31
