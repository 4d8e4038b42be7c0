"""Work shared by any number of workers: an Optuna study whose trials wait, are taken once, and are retried when lost.

SQLite serves the workers of one machine, PostgreSQL those of many. A worker may be killed at any moment: its trial
shows no sign of life for `GRACE_SECONDS` and waits again.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from burnish.checkpoint.staging import differences
from burnish.errors import BurnishError, ResumeMismatchError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 30
BUSY_SECONDS = 60
"""How long a worker waits for another's transaction on SQLite."""
UNREACHABLE_SECONDS = 10
OPENINGS = 10

FINGERPRINT, READY = "fingerprint", "ready"


def require_optuna() -> None:
    """Raise BurnishError where Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise BurnishError("a sweep needs Optuna, which is not installed: pip install 'burnish[sweep]'") from None


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Our own progress speaks: Optuna's log and its notes on experimental features are off meanwhile."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def shown_url(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def open_storage(url: str) -> RDBStorage:
    """The database of a `--storage` URL, made where it is a SQLite file that does not exist.

    Raises:
        ValueError: not a database URL.
        BurnishError: it cannot be reached, or its driver is not installed.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

    try:
        address = make_url(url)
    except ArgumentError:
        raise ValueError(
            f"storage={url!r}: expected a URL such as sqlite:///sweep.db or postgresql://USER@HOST/DATABASE"
        ) from None
    kind = address.get_backend_name()
    if address.drivername == "postgresql":  # which driver that means depends on the version of SQLAlchemy
        address = address.set(drivername="postgresql+psycopg")
    wait = {"sqlite": {"timeout": BUSY_SECONDS}, "postgresql": {"connect_timeout": UNREACHABLE_SECONDS}}
    for attempt in range(OPENINGS):
        try:
            storage = RDBStorage(
                address.render_as_string(hide_password=False),
                {"connect_args": wait.get(kind, {})},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=_retry,
            )
            break
        except (ImportError, NoSuchModuleError) as error:
            extra = ": pip install 'burnish[postgresql]'" if kind.startswith("postgres") else ""
            raise BurnishError(f"{shown_url(url)}: no driver for this database is installed{extra}") from error
        except SQLAlchemyError as error:
            made_meanwhile = isinstance(error, IntegrityError) or "already exists" in str(error)
            if made_meanwhile and attempt + 1 < OPENINGS:  # another worker makes the same tables
                time.sleep(0.2)
                continue
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise BurnishError(f"{shown_url(url)}: the storage cannot be opened ({reason})") from error
    if kind == "sqlite":
        _lock_first(storage)
    return storage


def _lock_first(storage: RDBStorage) -> None:
    """Begin every transaction with the write lock.

    SQLite has no SELECT ... FOR UPDATE: two workers could both read that a trial waits, and both take it.
    """
    from sqlalchemy import event

    engine = storage.engine

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()


def open_study(
    storage: RDBStorage,
    name: str,
    fingerprint: Mapping[str, Any],
    trials: Callable[[], Sequence[FrozenTrial]],
    *,
    pruner: BasePruner | None = None,
) -> Study:
    """The study of this name: made, with its waiting trials, by the first worker; joined by the others.

    Args:
        storage: the database.
        name: of the study.
        fingerprint: JSON-ready description of everything that its results depend on.
        trials: makes the trials; called where there is no study yet.
        pruner: decides when a trial stops early.

    Raises:
        ResumeMismatchError: the study there has another fingerprint; names the fields and both values.
    """
    import optuna

    options: dict[str, Any] = {"storage": storage, "study_name": name, "sampler": optuna.samplers.RandomSampler(seed=0)}
    waiting: Sequence[FrozenTrial] | None = None
    while True:
        # A study that vanishes while it is looked at was unfinished and stalled: another worker has removed it.
        with contextlib.suppress(KeyError):
            if name not in optuna.get_all_study_names(storage):
                waiting = trials() if waiting is None else waiting
                with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
                    study = optuna.create_study(**options, pruner=pruner, direction="minimize")
                    study.set_user_attr(FINGERPRINT, fingerprint)
                    for trial in waiting:
                        study.add_trial(trial)
                    study.set_user_attr(READY, len(waiting))
            study = optuna.load_study(**options, pruner=pruner)
            _require_same(storage, study, fingerprint)
            if _becomes_ready(study):
                return study
            optuna.delete_study(study_name=name, storage=storage)


def _require_same(storage: RDBStorage, study: Study, fingerprint: Mapping[str, Any]) -> None:
    stored = study.user_attrs.get(FINGERPRINT)
    if stored not in (None, fingerprint):
        raise ResumeMismatchError(
            f"{shown_url(storage.url)}: holds another sweep: {differences(stored, fingerprint)}: choose another"
            " --storage, or pass --overwrite to discard it"
        )


def _becomes_ready(study: Study) -> bool:
    """Whether all trials are there, soon; False when the worker that adds them has stopped."""
    seen, since = -1, time.monotonic()
    while READY not in study.user_attrs:
        count = len(study.get_trials(deepcopy=False))
        if count != seen:
            seen, since = count, time.monotonic()
        if time.monotonic() - since > GRACE_SECONDS:
            return False
        time.sleep(0.2)
    return True


def size(study: Study) -> int:
    """Trials that the study was made with."""
    count: int = study.user_attrs[READY]
    return count


def waiting_trial(params: Mapping[str, Any], choices: Mapping[str, Sequence[Any]], **attributes: Any) -> FrozenTrial:
    """A trial that waits to be taken, with its parameters and user attributes."""
    import optuna

    return optuna.create_trial(
        state=optuna.trial.TrialState.WAITING,
        params=dict(params),
        distributions={name: optuna.distributions.CategoricalDistribution(list(choices[name])) for name in params},
        user_attrs=attributes,
    )


def take(storage: RDBStorage, study: Study) -> FrozenTrial | None:
    """A waiting trial, which from now on is this worker's; None when none waits. Lost ones wait again first."""
    import optuna

    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
        # The sign of life comes first: a trial that runs without any would never be found lost.
        storage.record_heartbeat(trial._trial_id)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            if storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.RUNNING):
                return trial
    return None


@contextlib.contextmanager
def alive(storage: RDBStorage, trial: FrozenTrial) -> Iterator[None]:
    """Shows signs of life for a trial while the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(Exception):  # one that is missed does no harm; the main thread sees real trouble
                storage.record_heartbeat(trial._trial_id)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def finish(
    storage: RDBStorage,
    trial: FrozenTrial,
    value: float | None,
    attributes: Mapping[str, Any] | None = None,
    *,
    pruned: bool = False,
) -> None:
    """Record a result and what else was found.

    Without effect where the trial was given up for lost meanwhile: another worker has it.
    """
    import optuna

    state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        for name, attribute in (attributes or {}).items():
            storage.set_trial_user_attr(trial._trial_id, name, attribute)
        storage.set_trial_state_values(trial._trial_id, state, None if value is None else [value])


def results(study: Study) -> dict[int, FrozenTrial]:
    """The first result of each trial, by the `index` it was given; complete or pruned."""
    import optuna

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    found: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False, states=states):
        found.setdefault(trial.user_attrs["index"], trial)
    return found


def seconds(results: Mapping[int, FrozenTrial]) -> float:
    """Time that all workers together spent on results."""
    return sum(trial.duration.total_seconds() for trial in results.values() if trial.duration is not None)


def forget(storage: RDBStorage, names: Sequence[str]) -> None:
    """Remove the studies of these names, where there are any."""
    import optuna

    for name in names:
        with contextlib.suppress(KeyError):
            optuna.delete_study(study_name=name, storage=storage)


def work_off(
    storage: RDBStorage,
    study: Study,
    total: int,
    do: Callable[[FrozenTrial], None],
    *,
    advance: Callable[[int], None],
    patience: float = 1.0,
) -> dict[int, FrozenTrial]:
    """Take trials until all `total` have a result, waiting for those of other workers.

    Args:
        storage, study: as opened.
        total: trials that will have a result in the end.
        do: does one trial, and calls `finish`.
        advance: called with the number of trials that anybody finished since the last call.
        patience: seconds between two looks while other workers are busy.

    Returns:
        All results, by index.
    """
    done, idle = results(study), 0
    while len(done) < total:
        trial = take(storage, study)
        if trial is None:
            idle += 1
            time.sleep(patience)
            if idle > 1:
                _wait_again(study)
        else:
            idle = 0
            with alive(storage, trial):
                do(trial)
        before, done = len(done), results(study)
        advance(len(done) - before)
    return done


def _wait_again(study: Study) -> None:
    """Put back what was lost with the worker that was just about to put it back."""
    import optuna

    trials = study.get_trials(deepcopy=False)
    failed = optuna.trial.TrialState.FAIL
    kept = {trial.user_attrs["index"] for trial in trials if trial.state != failed}
    lost = {trial.user_attrs["index"]: trial for trial in trials if trial.state == failed}
    for index, trial in lost.items():
        if index not in kept:
            _retry(study, trial)


def _retry(study: Study, trial: FrozenTrial) -> None:
    """A lost trial waits again, with what it had reported."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, trial)
