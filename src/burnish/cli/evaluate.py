"""The verb `burnish evaluate`: one model, or before against after, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import as_text, show_table


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
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="1,4,16", help="Prompts at a time for speed.", show_default="the batch size")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="lm-eval tasks, groups or patterns.", show_default=False)
    ] = None,
    task_dir: Annotated[Path | None, typer.Option(help="Directory of more task files.", show_default=False)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question.", show_default="the task's own")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.", show_default="all")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Wrap the tasks' prompts in the chat template.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code beside the models.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write the JSON here.", show_default=False)
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the table into the README.md of each AFTER.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure quality, size, memory and speed of a model, or of several against the one before.

    Example: burnish evaluate --before moe/ --after dense/ --out before-after.json
    """
    from burnish.errors import OutputError

    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise OutputError(f"{out}: exists already, or its directory does not: choose another file")

    if update_card and not after:
        raise ValueError("--update-card writes a comparison: give --before and --after")

    from burnish.evaluate import evaluate as run
    from burnish.evaluate.card import require_card
    from burnish.evaluate.card import update_card as write_card
    from burnish.runs import Progress, write_json

    for directory in after or [] if update_card else []:
        require_card(directory)

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
        batch_sizes=None if batch_sizes is None else _numbers(batch_sizes),
        tasks=[name.strip() for name in tasks.split(",")] if tasks else (),
        task_dir=task_dir,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        trust_remote_code=trust_remote_code,
        revision=revision,
        progress=Progress(quiet=quiet),
    )
    if out is not None:
        write_json(out, result.to_dict())
    for directory in after or [] if update_card else []:
        write_card(directory, result)
    if as_json:
        typer.echo(as_text(result.to_dict()))
    else:
        show_table(result.table())


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--batch-sizes {text}: expected numbers with commas between them, such as 1,4,16") from None
