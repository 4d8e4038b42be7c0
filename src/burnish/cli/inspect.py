"""The verb `burnish inspect`: what a model is, and what converting it would give and need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import as_text, show_table


def inspect(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the Mixture-of-Experts model.")],
    num_samples: Annotated[int, typer.Option(help="Calibration sequences to forecast for.")] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    family: Annotated[Path | None, typer.Option(help="Python file that defines the model's family.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="List known obstacles: transformers 5, transformers 4, vllm, llama.cpp or sglang; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's family and sizes, and what each number of kept experts would give and need.

    Example: burnish inspect Qwen/Qwen3-30B-A3B --engine vllm
    """
    from burnish.densify.inspect import inspect as run

    result = run(
        model,
        num_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        family=family,
        revision=revision,
        engines=engine or (),
    )
    if as_json:
        typer.echo(as_text(result.to_dict()))
    else:
        show_table(result.table())
