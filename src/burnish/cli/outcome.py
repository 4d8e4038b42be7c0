"""What a verb did, on standard output: once, however many ranks did it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType


class Outcome(Protocol):
    """What a verb returns."""

    def summary(self) -> str:
        """A few lines for people."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        ...


def show(outcome: Outcome, *, as_json: bool) -> None:
    """One JSON object, or a few lines for people."""
    from burnish.runs import ranks

    if ranks.rank() == 0:
        typer.echo(as_text(outcome.to_dict()) if as_json else outcome.summary())


def as_text(content: dict[str, Any]) -> str:
    """A JSON object on one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def show_table(table: RenderableType) -> None:
    """A table for people."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width, and the default of 80 folds the numbers
    console.print(table)
