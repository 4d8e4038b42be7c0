"""One progress display for all verbs: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 30.0


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """Reports how far long work is: elapsed and remaining time and resident memory, on standard error.

    Args:
        quiet: report nothing.
        console: where to report; standard error by default.

    Attributes:
        note: shown behind the bar or in the next line, such as the current loss.

    Examples:
        >>> with Progress(quiet=True).task("observe", total=2) as advance:
        ...     advance(1)
        ...     advance(1)
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.note = ""
        self.console = console or Console(stderr=True)

    def say(self, message: str) -> None:
        """Print one line, unless quiet."""
        if not self.quiet:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Open a task of `total` steps, `done` of them finished before; yields `advance(steps)`."""
        self.note = ""
        if self.quiet:
            yield lambda steps: None
        elif self.console.is_terminal:
            with self._bar() as bar:
                row = bar.add_task(name, total=total, completed=done, rss="", note="")

                def advance(steps: int) -> None:
                    rss = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
                    bar.update(row, advance=steps, rss=rss, note=self.note)

                yield advance
        else:
            yield self._lines(name, total, done, unit)

    def _bar(self) -> Bar:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        more = (TimeRemainingColumn(), TextColumn("{task.fields[rss]}"), TextColumn("{task.fields[note]}"))
        return Bar(*columns, *more, console=self.console)

    def _lines(self, name: str, total: int, done: int, unit: str) -> Callable[[int], None]:
        start = last = time.monotonic()
        count = done

        def advance(steps: int) -> None:
            nonlocal count, last
            count += steps
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES and count < total:
                return
            last = now
            remaining = (now - start) / max(count - done, 1) * (total - count)
            rss = psutil.Process().memory_info().rss / 2**30
            self.say(
                f"{name}: {count}/{total} {unit}".rstrip()
                + f", elapsed {_seconds(now - start)}, remaining {_seconds(remaining)}, {rss:.1f} GiB"
                + (f", {self.note}" if self.note else "")
            )
            sys.stderr.flush()

        return advance
