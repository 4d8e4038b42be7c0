"""The verb `burnish demo`: the main job on the bundled model, from conversion to report, offline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

CHOICES = (("do-acp", 8), ("do-acp", 4), ("sf", 8), ("sf", 4))
NUM_SAMPLES, MAX_LENGTH = 256, 256
DISTILLED, TOKENS = "do-acp-k4", "131k"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")] = Path("demo-out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Densify the bundled model four ways, distil one student, evaluate all against the model, and write a report.

    The model is observed once; the other three students are decided from the same statistics.

    Example: burnish demo --out demo-out
    """
    from rich.console import Console

    from burnish.checkpoint.staging import refuse_existing
    from burnish.data import bundled_model
    from burnish.densify import densify
    from burnish.distill import distill
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
    students.append(out / f"{DISTILLED}-distilled")
    distill(
        out / DISTILLED,
        students[-1],
        teacher=teacher,
        tokens=TOKENS,
        max_length=MAX_LENGTH,
        batch_size=16,
        lr=5e-3,
        eval_samples=16,
        progress=progress,
    )
    result = evaluate(before=teacher, after=students, max_length=MAX_LENGTH, num_samples=128, progress=progress)
    write_json(out / "evaluation.json", result.to_dict())
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width, and the default of 80 folds the numbers
    console.print(result.table())
    typer.echo(
        f"A fresh student is a start: a uniform guess has perplexity 2,048. {students[-1].name} was trained on"
        f" {TOKENS} tokens."
    )
    typer.echo(f"report: {write_report(out)}")
