"""Trials that wait are taken once, come back when a worker is lost, and belong to one sweep."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import BurnishError, ResumeMismatchError
from burnish.recipes.sweep import store

optuna = pytest.importorskip("optuna")

WORKER = """
import sys, time
from burnish.recipes.sweep import store
url, log, count, pause, crash = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
store.HEARTBEAT_SECONDS, store.GRACE_SECONDS = 1, 2

def trials():
    made = [store.waiting_trial({"cell": i}, {"cell": range(count)}, index=i) for i in range(count)]
    return made

def do(trial):
    with open(log, "a") as file:
        file.write(f"{trial.user_attrs['index']}\\n")
    time.sleep(pause)
    store.finish(storage, trial, float(trial.params["cell"]), {"found": trial.params["cell"]})

with store.quiet_optuna():
    storage = store.open_storage(url)
    if crash:
        import optuna
        add, added = optuna.study.Study.add_trial, []
        def dies(self, trial):
            add(self, trial)
            added.append(1)
            if len(added) == int(crash):
                import os, signal
                os.kill(os.getpid(), signal.SIGKILL)
        optuna.study.Study.add_trial = dies
    study = store.open_study(storage, "test", {"of": 1}, trials)
    done = store.work_off(storage, study, count, do, advance=lambda n: None, patience=0.1)
print(sorted((i, t.value, t.user_attrs["found"]) for i, t in done.items()))
"""


def worker(url: str, log: Path, count: int, pause: float = 0.0, crash: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, url, str(log), str(count), str(pause), crash]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def expected(count: int) -> str:
    return str([(i, float(i), i) for i in range(count)])


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def quiet() -> Iterator[None]:
    with store.quiet_optuna():
        yield


def test_three_workers_do_every_trial_once_and_print_nothing_of_optunas(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [worker(url, log, 40) for _ in range(3)]
    for process in workers:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert out.strip() == expected(40) and error == ""
    assert sorted(map(int, log.read_text().split())) == list(range(40))


def test_u2_1_a_killed_workers_trial_is_done_again_and_no_other(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = worker(url, log, 6, pause=0.5)
    while not log.exists() or len(log.read_text().split()) < 3:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, error = worker(url, log, 6).communicate(timeout=60)
    assert out.strip() == expected(6), error
    assert sorted(map(int, log.read_text().split())) == [0, 1, 2, 2, 3, 4, 5]


def test_u2_1_a_worker_killed_while_it_adds_trials_is_replaced(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = worker(url, log, 6, crash="4")
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    out, error = worker(url, log, 6).communicate(timeout=60)
    assert out.strip() == expected(6), error
    assert sorted(map(int, log.read_text().split())) == list(range(6))


def opened(url: str, count: int = 2) -> tuple[Any, Any]:
    storage = store.open_storage(url)
    trials = [store.waiting_trial({"cell": i}, {"cell": range(count)}, index=i) for i in range(count)]
    return storage, store.open_study(storage, "test", {"model": {"a": 1}, "seed": 0}, lambda: trials)


def test_a_trial_taken_by_one_is_not_taken_by_another(url: str, quiet: None) -> None:
    (mine, study), (theirs, other) = opened(url), opened(url)
    taken = [store.take(mine, study), store.take(theirs, other), store.take(mine, study)]
    assert [trial and trial.user_attrs["index"] for trial in taken] == [0, 1, None]


def test_a_result_that_comes_too_late_has_no_effect(
    url: str, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(ResumeMismatchError, match=r"model\.a was 1, is 2: choose another --storage, or pass --overwrite"):
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


