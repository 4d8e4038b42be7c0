"""The log of a run directory: what progress and warnings say, beside where they are shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from burnish.runs import Progress


@contextmanager
def logged(shown: Progress, file: Path) -> Iterator[Progress]:
    """A progress that is shown as `shown` and appended to `file`, quiet or not; so are our warnings and the end."""
    with file.open("a", encoding="utf-8") as stream, warnings.catch_warnings():
        progress = _Both(shown, _Lines(stream))
        show = warnings.showwarning

        def show_and_log(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            show(message, category, *where, **more)
            if category is UserWarning:
                progress.lines.say(f"warning: {message}")

        warnings.showwarning = show_and_log
        try:
            yield progress
        except BaseException as error:
            progress.lines.say(f"stopped: {type(error).__name__} {error}".rstrip())
            raise


class _Lines(Progress):
    """Plain lines with the time before each, flushed one by one."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(console=Console(file=stream, force_terminal=False))
        self.stream = stream

    def say(self, message: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for line in message.splitlines():
            self.stream.write(f"{now} {line}\n")
            self.stream.flush()


class _Both(Progress):
    """Shown as it would be alone, and written as lines."""

    def __init__(self, shown: Progress, lines: _Lines) -> None:
        super().__init__(quiet=shown.quiet, console=shown.console)
        self.shown, self.lines = shown, lines

    def say(self, message: str) -> None:
        self.shown.say(message)
        self.lines.say(message)

    @contextmanager
    def task(self, name: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Callable[[int], None]]:
        self.note = ""
        with (
            self.shown.task(name, total, done=done, unit=unit) as show,
            self.lines.task(name, total, done=done, unit=unit) as write,
        ):

            def advance(steps: int) -> None:
                self.shown.note = self.lines.note = self.note
                show(steps)
                write(steps)

            yield advance
