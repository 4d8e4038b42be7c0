"""The verb `burnish claims`: the board of what papers claim and what was measured here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Show the board of measured claims, or measure them.\n\nExample: burnish claims run --only parameter-counts",
    invoke_without_command=True,
)
Directory = Annotated[Path, typer.Option("--dir", help="Directory of claims files.")]


@app.callback()
def show(context: typer.Context, directory: Directory = Path("claims")) -> None:
    """Show every claim with its newest result.

    Example: burnish claims
    """
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from burnish.runs.claims import board

    table = Table("claim", "paper says", "here", "verdict", "device", "date, commit", show_lines=True)
    for file, claim, result in board(directory):
        last = ["not yet run", "", "", ""]
        if result is not None:
            device = ", ".join(result["environment"].get("devices", ["?"]))
            last = [result["number"], result["verdict"], device, f"{result['date']}, {result['commit']}"]
        table.add_row(f"{file}: {claim.name}", claim.paper_number, *last)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


@app.command("run")
def run(
    directory: Directory = Path("claims"),
    only: Annotated[str | None, typer.Option(help="Only the claim of this name.")] = None,
    budget: Annotated[str, typer.Option(help="cpu-minutes, cpu-hours or h100-10min.")] = "cpu-minutes",
    scratch: Annotated[
        Path | None, typer.Option(help="Keep what is trained here, and find it again.", show_default="a new directory")
    ] = None,
) -> None:
    """Measure claims and append the results beside them.

    Example: burnish claims run --only parameter-counts
    """
    from burnish.runs.claims import load_claims, run_claim

    known = load_claims(directory)
    chosen = [(f, c) for f, claims in known.items() for c in claims if c.budget == budget and only in (None, c.name)]
    if not chosen:
        names = ", ".join(claim.name for claims in known.values() for claim in claims)
        raise ValueError(f"no claim {only or ''} with budget {budget!r}: known are {names}")
    for file, claim in chosen:
        typer.echo(f"{file}: {claim.name} ...", err=True)
        with tempfile.TemporaryDirectory() as temporary:
            place = scratch or Path(temporary)
            place.mkdir(parents=True, exist_ok=True)
            result = run_claim(claim, directory, file, place.resolve())
        typer.echo(f"{claim.name}: {result['verdict']}: {result['number']} ({result['seconds']} s)")
