"""The verb `burnish run`: a recipe in, a run directory out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import show, show_table


def run_recipe(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML file, or the name of a shipped recipe.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set a value of the recipe; repeatable.", show_default=False),
    ] = None,
    list_shipped: Annotated[bool, typer.Option("--list", help="Show the shipped recipes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and forecast; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard a run in OUT and start anew.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on inside a step that was stopped half-way.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run a chain of verbs from a recipe in one directory; the same command goes on where it stopped.

    Example: burnish run miniature --out run --set distill.tokens=100k
    """
    import json

    from burnish.recipes import run_recipe as run
    from burnish.recipes import shipped

    if list_shipped:
        recipes = shipped()
        width = max(map(len, recipes))
        typer.echo(json.dumps(recipes) if as_json else "\n".join(f"{k:{width}}  {v}" for k, v in recipes.items()))
        return
    if recipe is None or out is None:
        raise ValueError("expected a recipe and --out DIR; burnish run --list shows the shipped recipes")

    from burnish.runs import Progress

    result = run(
        recipe,
        out,
        settings=settings or (),
        dry_run=dry_run,
        overwrite=overwrite,
        resume=resume,
        progress=Progress(quiet=quiet or as_json),
    )
    for step in result.results.values():
        if hasattr(step, "table") and not as_json:
            show_table(step.table())
    show(result, as_json=as_json)
