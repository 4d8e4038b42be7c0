"""The verb `burnish prune`: a dense checkpoint in, a smaller dense one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import show


def prune(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a dense model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    layers: Annotated[int | None, typer.Option(help="Layers to keep.", show_default="all")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Hidden channels to keep.", show_default="all")] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Feed-forward neurons to keep in a layer.", show_default="all")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads to keep in a layer.", show_default="all")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads to keep in a layer.", show_default="all")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="In the place of sizes: at most this many, such as 1.5B.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Calibration text: file, directory, Hub id or -.", show_default="bundled corpus"),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    dtype: Annotated[str, typer.Option(help="Of the output: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="Apply this plan file instead of observing.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Decide from this statistics file of an earlier run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and forecast; write nothing.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="With a unit: 5GB, 5GiB.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT; start anew if it was of other inputs.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Cut a dense model down to exact sizes, or to a number of parameters.

    Example: burnish prune Qwen/Qwen3-8B --out qwen3-4b --parameters 4B
    """
    from burnish.prune import prune as run
    from burnish.runs import Progress

    result = run(
        model,
        out,
        layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        parameters=parameters,
        dataset=dataset,
        num_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        plan=plan,
        statistics=statistics,
        dry_run=dry_run,
        overwrite=overwrite,
        resume=resume,
        max_shard_size=max_shard_size,
        revision=revision,
        progress=Progress(quiet=quiet or as_json),
    )
    show(result, as_json=as_json)
