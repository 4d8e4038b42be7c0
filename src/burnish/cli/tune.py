"""The verb `burnish tune`: a model and rows of prompts and answers in, a tuned model or adapters out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import show


def tune(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the model to tune.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Rows with messages, or prompt and completion: file, directory, Hub id or -.", show_default=False
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    eval_dataset: Annotated[str | None, typer.Option(help="Held-out rows.", show_default="no evaluation")] = None,
    eval_samples: Annotated[int, typer.Option(help="Held-out rows that are used.")] = 256,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default="of 3 epochs; 20000 for mezo and mezo-bcd")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data, in place of --steps.", show_default=False)
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of an example.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Examples per process at a time.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    objective: Annotated[
        str, typer.Option(help="loss; or exact-match or f1 of generated answers, for mezo and mezo-bcd.")
    ] = "loss",
    optimizer: Annotated[
        str, typer.Option(help="adamw, muon, amuse, ...; mezo or mezo-bcd: forward passes only, memory of inference.")
    ] = "adamw",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate.", show_default="2e-5, mezo 1e-6, mezo-bcd 1e-5; with --lora 2e-4, 5e-5, 5e-4"
        ),
    ] = None,
    schedule: Annotated[str, typer.Option(help="auto, cosine, linear or constant.")] = "auto",
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled.")] = 0.0,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Gradients are clipped to it.", show_default="1, where there are gradients")
    ] = None,
    penalty: Annotated[
        str | None, typer.Option(help="proxgen: l0, l1/2, l2/3, l1 or group-lasso.", show_default="l1")
    ] = None,
    penalty_strength: Annotated[
        float | None, typer.Option(help="proxgen: beside the mean loss.", show_default="1e-4")
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(help="mezo, mezo-bcd: how far weights are displaced.", show_default="1e-3; with --lora 1e-2"),
    ] = None,
    queries: Annotated[int | None, typer.Option(help="mezo, mezo-bcd: directions a step.", show_default="1")] = None,
    perturbation: Annotated[
        str | None,
        typer.Option(
            help="mezo, mezo-bcd: gaussian, rademacher, low-rank, subspace or sparse.", show_default="gaussian"
        ),
    ] = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            help="mezo-bcd: a number of weights (10M), or a name pattern for each block.", show_default="a layer each"
        ),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="mezo-bcd: random, ascending or descending.", show_default="random")
    ] = None,
    interval: Annotated[int | None, typer.Option(help="mezo-bcd: steps on a block.", show_default="100")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters, not the model's own weights.")] = False,
    lora_rank: Annotated[int | None, typer.Option(help="Of the adapters.", show_default="16")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Their scale times the rank.", show_default="2 RANK")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Before them.", show_default="0")] = None,
    lora_targets: Annotated[
        list[str] | None, typer.Option(help="Ends of module names.", show_default="all linear layers but the head")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the model with the adapters in it.")] = False,
    eval_every: Annotated[int | None, typer.Option(help="Steps.", show_default="a tenth of all")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps.", show_default="a tenth of all")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16: of the pass; for mezo of the weights.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order of the data and all draws.")] = 0,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, wandb or trackio.")] = "none",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and forecast; write nothing.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="With a unit: 5GB, 5GiB.")] = "5GB",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code beside the model.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT; start anew if it was of other inputs.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fine-tune a model on prompts and answers, with gradients or with forward passes only.

    Example: burnish tune facebook/opt-1.3b --dataset rows.jsonl --optimizer mezo-bcd --out tuned
    """
    from burnish.runs import Progress
    from burnish.tune import tune as run

    numbers = blocks is not None and len(blocks) == 1 and blocks[0][:1].isdecimal()
    result = run(
        model,
        out,
        dataset=dataset,
        split=split,
        eval_dataset=eval_dataset,
        eval_samples=eval_samples,
        steps=steps,
        epochs=epochs,
        max_length=max_length,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        objective=objective,
        optimizer=optimizer,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        penalty=penalty,
        penalty_strength=penalty_strength,
        eps=eps,
        queries=queries,
        perturbation=perturbation,
        blocks=blocks[0] if blocks and numbers else blocks,
        order=order,
        interval=interval,
        lora=lora,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        lora_targets=lora_targets,
        merge=merge,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        device=device,
        seed=seed,
        report_to=report_to,
        dry_run=dry_run,
        overwrite=overwrite,
        resume=resume,
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        progress=Progress(quiet=quiet or as_json),
    )
    show(result, as_json=as_json)
