"""The verb `burnish evaluate`: one model, or before against after, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory or Hub id.", show_default=False)
    ] = None,
    before: Annotated[str | None, typer.Option(help="Model to compare with.", show_default=False)] = None,
    after: Annotated[list[str] | None, typer.Option(help="Model to compare; repeatable.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of MODEL or BEFORE.", show_default=False)] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="File, directory, Hub id or - with text or messages.", show_default="bundled held-out text"),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    num_samples: Annotated[int, typer.Option(min=1, help="Blocks of text.")] = 64,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens in a block.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks at a time.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Order of the bundled documents.")] = 0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and memory.")] = True,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code beside the models.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write the JSON here.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure perplexity, size, memory and speed of a model, or of several against the one before.

    Example: burnish evaluate --before moe/ --after dense/ --out before-after.json
    """
    from burnish.errors import OutputError

    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise OutputError(f"{out}: exists already, or its directory does not: choose another file")

    import json

    from rich.console import Console

    from burnish.evaluate import evaluate as run
    from burnish.runs import Progress, write_json

    result = run(
        model,
        before=before,
        after=after,
        dataset=dataset,
        split=split,
        num_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        seed=seed,
        speed=speed,
        trust_remote_code=trust_remote_code,
        revision=revision,
        progress=Progress(quiet=quiet),
    )
    if out is not None:
        write_json(out, result.to_dict())
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width, and the default of 80 folds the numbers
    console.print(result.table())
