"""The verb `burnish sweep`: every way to densify a model, measured and compared, and the best distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import as_text, show_table


def sweep(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the Mixture-of-Experts model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the sweep.", show_default=False)],
    scores: Annotated[str, typer.Option(help="Comma between: sf,pp,cp,acp,do-acp,reap,ean.", show_default="all")] = "",
    groupings: Annotated[
        str,
        typer.Option(
            help="weights,outputs,router,dominant,balanced; none adds wider students.", show_default="the first five"
        ),
    ] = "",
    scalings: Annotated[
        str,
        typer.Option(help="uniform,score,conditional,mass,marginal,least-squares.", show_default="uniform,score"),
    ] = "",
    keeps: Annotated[
        str, typer.Option(help="Experts kept, such as 4,8,16.", show_default="five from top-k to all")
    ] = "",
    dataset: Annotated[
        str | None,
        typer.Option(help="Calibration and training text: file, directory or Hub id.", show_default="bundled corpus"),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens in a sequence, or block of held-out text.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    statistics: Annotated[Path | None, typer.Option(help="Decide from this statistics file of an earlier run.")] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text, as --dataset.", show_default="bundled held-out text")
    ] = None,
    eval_samples: Annotated[int, typer.Option(help="Blocks of it.")] = 64,
    finalists: Annotated[int, typer.Option(help="Best students to distil; 0 for none.")] = 0,
    tokens: Annotated[
        str | None, typer.Option(help="To distil a finalist on in full, such as 1M.", show_default=False)
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the distillation.")] = 1e-4,
    storage: Annotated[
        str | None,
        typer.Option(help="Database URL that workers share, such as postgresql://...", show_default="OUT/sweep.db"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="To measure in: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    family: Annotated[Path | None, typer.Option(help="Python file that defines the model's family.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and forecast; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard another sweep in OUT and storage.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compare every way to densify a model over one set of statistics, and distil the best.

    Start the same command again for another worker, or to go on after an interruption.

    Example: burnish sweep Qwen/Qwen3-30B-A3B --out sweep --finalists 4 --tokens 10M
    """
    from burnish.recipes.sweep import sweep as run
    from burnish.runs import Progress

    result = run(
        model,
        out,
        scores=_words(scores),
        groupings=_words(groupings),
        scalings=_words(scalings),
        keeps=_numbers("keeps", keeps),
        dataset=dataset,
        num_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        statistics=statistics,
        eval_dataset=eval_dataset,
        eval_samples=eval_samples,
        finalists=finalists,
        tokens=tokens,
        lr=lr,
        storage=storage,
        seed=seed,
        dtype=dtype,
        device=device,
        family=family,
        revision=revision,
        dry_run=dry_run,
        overwrite=overwrite,
        progress=Progress(quiet=quiet or as_json),
    )
    if as_json:
        shown = {"out": str(result.out) if result.out else None, "record": result.record, **result.to_dict()}
        typer.echo(as_text(shown))
        return
    if result.rows:
        show_table(result.table())
    typer.echo(result.summary())


def _words(text: str) -> list[str] | None:
    """`a, b` -> ["a", "b"]; nothing where nothing was said."""
    return [word.strip() for word in text.split(",") if word.strip()] or None


def _numbers(name: str, text: str) -> list[int] | None:
    words = _words(text)
    try:
        return words and [int(word) for word in words]  # type: ignore[return-value]
    except ValueError:
        raise ValueError(f"{name}={text!r}: expected whole numbers with commas between, such as 4,8") from None
