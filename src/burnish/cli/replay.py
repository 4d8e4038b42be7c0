"""The verb `burnish replay`: a base model and the log of a zeroth-order run in, the tuned model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import show


def replay(
    trajectory: Annotated[Path, typer.Argument(help="trajectory.jsonl of burnish tune, or the directory it lies in.")],
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the model that the run began with.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Write the model with the adapters in it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check log and model; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="With a unit: 5GB, 5GiB.")] = "5GB",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code beside the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make the weights of a zeroth-order tuning again from its base model and its log, bit for bit.

    Example: burnish replay trajectory.jsonl facebook/opt-1.3b --out tuned
    """
    from burnish.runs import Progress
    from burnish.tune import replay as run

    result = run(
        trajectory,
        model,
        out,
        merge=merge,
        dry_run=dry_run,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        progress=Progress(quiet=quiet or as_json),
    )
    show(result, as_json=as_json)
