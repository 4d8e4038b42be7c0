"""The verb `burnish demo`: the main job on the bundled model, from conversion to report, offline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

CHOICES = (("do-acp", 8), ("do-acp", 4), ("sf", 8), ("sf", 4))
NUM_SAMPLES, MAX_LENGTH = 256, 256


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")] = Path("demo-out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Densify the bundled model four ways, evaluate the students against it, and write a report.

    The model is observed once; the other three students are decided from the same statistics.

    Example: burnish demo --out demo-out
    """
    from rich.console import Console

    from burnish.checkpoint.staging import refuse_existing
    from burnish.data import bundled_model
    from burnish.densify import densify
    from burnish.evaluate import evaluate
    from burnish.report import write_report
    from burnish.runs import Progress, write_json

    refuse_existing(out, overwrite=overwrite)
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    progress = Progress(quiet=quiet)
    teacher, statistics = bundled_model(), None
    for score, keep in CHOICES:
        student = out / f"{score}-k{keep}"
        progress.say(f"{student.name}: keep {keep} of 16 experts by {score}")
        densify(
            teacher,
            student,
            score=score,
            keep=keep,
            num_samples=NUM_SAMPLES,
            max_length=MAX_LENGTH,
            statistics=statistics,
            progress=progress,
        )
        statistics = statistics or student / "statistics" / "routing.safetensors"
    students = [out / f"{score}-k{keep}" for score, keep in sorted(CHOICES)]
    result = evaluate(before=teacher, after=students, max_length=MAX_LENGTH, num_samples=128, progress=progress)
    write_json(out / "evaluation.json", result.to_dict())
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width, and the default of 80 folds the numbers
    console.print(result.table())
    typer.echo("The students are initialisations: nothing was distilled yet. A uniform guess has perplexity 2,048.")
    typer.echo(f"report: {write_report(out)}")
