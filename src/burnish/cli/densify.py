"""The verb `burnish densify`: a Mixture-of-Experts checkpoint in, a dense one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import show


def densify(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the Mixture-of-Experts model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    score: Annotated[str, typer.Option(help="sf, pp, cp, acp, do-acp, reap or ean.")] = "do-acp",
    keep: Annotated[int | None, typer.Option(help="Experts kept per layer.", show_default="the router's top-k")] = None,
    grouping: Annotated[
        str,
        typer.Option(help="Merge more experts than top-k by weights, outputs, router, dominant, balanced; or none."),
    ] = "weights",
    scaling: Annotated[
        str, typer.Option(help="auto, uniform, score, conditional, mass, marginal or least-squares.")
    ] = "auto",
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
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write plan and statistics, no model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and forecast; write nothing.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="With a unit: 5GB, 5GiB.")] = "5GB",
    family: Annotated[Path | None, typer.Option(help="Python file that defines the model's family.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    init: Annotated[
        str, typer.Option(help="experts; or a control of the same shape: random-ffn or random.")
    ] = "experts",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT; start anew if it was of other inputs.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Convert a Mixture-of-Experts model into a plain dense one.

    Example: burnish densify Qwen/Qwen3-30B-A3B --out qwen3-dense --score do-acp --num-samples 128
    """
    from burnish.densify import densify as run
    from burnish.runs import Progress

    result = run(
        model,
        out,
        score=score,
        keep=keep,
        grouping=grouping,
        scaling=scaling,
        dataset=dataset,
        num_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        plan=plan,
        statistics=statistics,
        plan_only=plan_only,
        dry_run=dry_run,
        overwrite=overwrite,
        resume=resume,
        max_shard_size=max_shard_size,
        family=family,
        revision=revision,
        init=init,
        progress=Progress(quiet=quiet or as_json),
    )
    show(result, as_json=as_json)
