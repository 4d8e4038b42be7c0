"""Progress: plain lines where there is no terminal, at most one in 30 s and always the last; nothing when quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from burnish.runs import Progress, progress


def lines_of(steps: int, clock: list[float], monkeypatch: pytest.MonkeyPatch, done: int = 0) -> list[str]:
    times = iter(clock)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    out = io.StringIO()
    with Progress(console=Console(file=out, width=200)).task(
        "observe", total=done + steps, done=done, unit="batches"
    ) as advance:
        for _ in range(steps):
            advance(1)
    return out.getvalue().splitlines()


def test_u13_2_one_line_in_30_seconds_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(4, [0, 10, 31, 40, 50], monkeypatch)
    assert [line.split(",")[0] for line in lines] == ["observe: 2/4 batches", "observe: 4/4 batches"]
    assert "elapsed 0:00:31, remaining 0:00:31" in lines[0] and lines[0].endswith("GiB")


def test_remaining_time_counts_only_what_this_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(2, [0, 60, 120], monkeypatch, done=8)
    assert "observe: 9/10 batches, elapsed 0:01:00, remaining 0:01:00" in lines[0]


def test_quiet_prints_nothing() -> None:
    out = io.StringIO()
    quiet = Progress(quiet=True, console=Console(file=out))
    quiet.say("hello")
    with quiet.task("x", total=1) as advance:
        advance(1)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Progress(console=Console(file=out, force_terminal=True, width=100)).task("write", total=2) as advance:
        advance(1)
        advance(1)
    assert "write" in out.getvalue() and "2/2" in out.getvalue()


def test_text_is_not_taken_for_markup() -> None:
    out = io.StringIO()
    Progress(console=Console(file=out)).say("layers [0, 1]")
    assert out.getvalue() == "layers [0, 1]\n"
