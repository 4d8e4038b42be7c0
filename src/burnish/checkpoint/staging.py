"""Output that appears complete or not at all: work in a hidden sibling directory, then rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from burnish.errors import OutputError, ResumeMismatchError

STATE_FILE = "state.json"
DONE_FILE = "done.json"


class Staging:
    """The unfinished state of one output directory, kept beside it as `.NAME.partial` until `publish`.

    A run that was killed finds its finished files there and goes on. The fingerprint (inputs, options, versions)
    decides whether they belong to the same run.

    Args:
        out: the final directory.
        fingerprint: nested, JSON-ready description of everything that determines the output.
        overwrite: replace an existing output, and discard unfinished work of another fingerprint.
        resume: continue unfinished work; when False it is discarded.

    Raises:
        OutputError: `out` exists and `overwrite` is False.
        ResumeMismatchError: unfinished work has another fingerprint; names the fields and both values.
    """

    def __init__(
        self, out: Path, fingerprint: Mapping[str, Any], *, overwrite: bool = False, resume: bool = True
    ) -> None:
        self.out = out.absolute()
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self.files = self.path / "files"
        self.work = self.path / "work"
        refuse_existing(self.out, overwrite=overwrite)
        stored = self._stored_fingerprint()
        wanted = json.loads(json.dumps(fingerprint))
        if stored is not None and (not resume or (overwrite and stored != wanted)):
            shutil.rmtree(self.path)
            stored = None
        if stored is not None and stored != wanted:
            raise ResumeMismatchError(
                f"{self.path}: unfinished work of another run: {differences(stored, wanted)}: pass --overwrite to start"
                " anew"
            )
        try:
            self.files.mkdir(parents=True, exist_ok=True)
            self.work.mkdir(exist_ok=True)
            if stored is None:
                _write_durably(self.path / STATE_FILE, json.dumps(wanted, indent=1).encode())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be created ({error.strerror})") from error

    def _stored_fingerprint(self) -> Any:
        if not self.path.exists():
            return None
        try:
            stored = json.loads((self.path / STATE_FILE).read_bytes())
        except (OSError, ValueError):
            stored = None  # killed before its first mark: nothing in it is finished
        if stored is None or not self.files.exists():  # or after its last: `publish` had moved the files away
            shutil.rmtree(self.path)
            return None
        return stored

    def finished(self) -> dict[str, str]:
        """Finished files of the output and the hash of each, as recorded by `finish`."""
        try:
            marks: dict[str, str] = json.loads((self.path / DONE_FILE).read_bytes())
        except FileNotFoundError:
            return {}
        return marks

    def finish(self, file: str, digest: str) -> None:
        """Record that `files/<file>` is complete and durable."""
        _write_durably(self.path / DONE_FILE, json.dumps({**self.finished(), file: digest}).encode())

    def verified(self, file: str) -> bool:
        """Whether `files/<file>` was finished and still has the recorded hash."""
        digest = self.finished().get(file)
        return digest is not None and (self.files / file).exists() and hash_file(self.files / file) == digest

    @contextmanager
    def explaining(self, file: str) -> Iterator[None]:
        """An OSError while `file` is written becomes an OutputError that says what is kept and what to do."""
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise OutputError(
                f"{self.out}: cannot write {file}: {reason}; {len(self.finished())} finished shards are"
                f" kept in {self.path}: make room and run the same command again"
            ) from error

    def publish(self) -> None:
        """Give the output its final name; the last step, and the only one that makes it visible."""
        for file in self.files.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(self.files)
        old = self.out.with_name(f".{self.out.name}.old")
        try:
            if self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.out.rename(old)
            self.files.rename(self.out)
        except OSError as error:
            raise OutputError(f"{self.out}: the finished output cannot take its name ({error.strerror})") from error
        _sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.path)


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError when `out` is taken: a file, or a directory with something in it and no `overwrite`."""
    if out.is_file():
        raise OutputError(f"{out}: is a file, expected a directory name")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise OutputError(f"{out}: exists already: choose another name, or pass --overwrite")


def remove_traces(out: Path) -> None:
    """Remove what is left beside a complete output when its writer was killed right after giving it its name."""
    for ending in ("partial", "old"):
        shutil.rmtree(out.with_name(f".{out.name}.{ending}"), ignore_errors=True)


def require_apart(out: Path, source: Path) -> None:
    """Raise OutputError when `out` is the source directory or lies inside it: it would be copied into itself."""
    if out.absolute().resolve().is_relative_to(source.resolve()):
        raise OutputError(f"{out}: lies in the model's own directory {source}: choose a place beside it")


def hash_file(file: Path) -> str:
    """xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(8 * 2**20):
            digest.update(piece)
    return digest.hexdigest()


def differences(stored: Any, wanted: Any) -> str:
    """Which fields of two nested records differ, the first three with both values."""
    old, new = dict(_flat(stored)), dict(_flat(wanted))
    fields = [field for field in sorted(old.keys() | new.keys()) if old.get(field) != new.get(field)]
    shown = "; ".join(f"{field} was {_short(old.get(field))}, is {_short(new.get(field))}" for field in fields[:3])
    return shown + (f" and {len(fields) - 3} more" if len(fields) > 3 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({xxhash.xxh3_64_hexdigest(text.encode())})"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _write_durably(file: Path, content: bytes) -> None:
    partial = file.with_name(file.name + ".new")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
