"""The verb `burnish report`: a run directory in, one HTML page out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        Path, typer.Argument(help="Run directory, directory of a recipe, or a directory of run directories.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Page to write.", show_default="RUN/report.html")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
    mix_settings: Annotated[
        bool, typer.Option("--mix-settings", help="Put results of different settings into one table.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Write one self-contained HTML page that shows what a run did and what it cost.

    Example: burnish report dense/
    """
    from burnish.report import write_report

    page = write_report(run, out, overwrite=overwrite, mix_settings=mix_settings)
    if not quiet:
        typer.echo(f"wrote {page}")
