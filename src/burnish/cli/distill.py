"""The verb `burnish distill`: a student and its teacher in, a better student out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.outcome import show


def distill(
    student: Annotated[str, typer.Argument(help="Directory or Hub id of the model to train.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    teacher: Annotated[
        str | None, typer.Option("--teacher", "-t", help="Directory or Hub id to learn from.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Text: file, directory, Hub id or -.", show_default="bundled corpus")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text.", show_default="bundled text where DATASET is, else none")
    ] = None,
    eval_samples: Annotated[int, typer.Option(help="Blocks of held-out text.")] = 32,
    tokens: Annotated[str, typer.Option(help="To train on: 300M, 4B.")] = "10M",
    max_length: Annotated[int, typer.Option(help="Tokens in a block.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Blocks per process at a time.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    loss: Annotated[
        str, typer.Option(help="forward-kl, reverse-kl, jensen-shannon or jensen-shannon:BETA.")
    ] = "forward-kl",
    temperature: Annotated[float, typer.Option(help="Softens both distributions.")] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Share of the cross-entropy with the text.")] = 0.0,
    hidden_weight: Annotated[float, typer.Option(help="Weight of the hidden-state loss.")] = 0.0,
    teacher_top_k: Annotated[
        int | None, typer.Option(help="Experts per token in the teacher.", show_default="its router's top-k")
    ] = None,
    teacher_logits: Annotated[
        Path | None, typer.Option(help="Store the teacher's best tokens here, or read them.", show_default=False)
    ] = None,
    top_logits: Annotated[int, typer.Option(help="Tokens stored per position.")] = 64,
    optimizer: Annotated[
        str, typer.Option(help="adamw, amuse, muon, normuon, adamw-schedule-free, ... or a name of TrainingArguments.")
    ] = "adamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="auto, cosine, linear or constant.")] = "auto",
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.02,
    weight_decay: Annotated[float, typer.Option(help="Decoupled.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = 1.0,
    eval_every: Annotated[str | None, typer.Option(help="Tokens.", show_default="a tenth of TOKENS")] = None,
    checkpoint_every: Annotated[str | None, typer.Option(help="Tokens.", show_default="a tenth of TOKENS")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the forward pass: auto, float32, bfloat16 or float16.")] = "auto",
    teacher_dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, wandb or trackio.")] = "none",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and forecast; write nothing.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="With a unit: 5GB, 5GiB.")] = "5GB",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code beside the models.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT; start anew if it was of other inputs.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a student to predict what its teacher predicts.

    Example: burnish distill qwen3-dense --teacher Qwen/Qwen3-30B-A3B --tokens 4B --out qwen3-distilled
    """
    from burnish.distill import distill as run
    from burnish.runs import Progress

    result = run(
        student,
        out,
        teacher=teacher,
        dataset=dataset,
        split=split,
        eval_dataset=eval_dataset,
        eval_samples=eval_samples,
        tokens=tokens,
        max_length=max_length,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        loss=loss,
        temperature=temperature,
        ce_weight=ce_weight,
        hidden_weight=hidden_weight,
        teacher_top_k=teacher_top_k,
        teacher_logits=teacher_logits,
        top_logits=top_logits,
        optimizer=optimizer,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
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
