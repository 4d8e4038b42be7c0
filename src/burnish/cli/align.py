"""The verb `burnish align`: a model and preferences in, an aligned model or adapters out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.outcome import show


def _list_objectives(value: bool) -> None:
    if value:
        from burnish.align.objectives import OBJECTIVES

        for row in OBJECTIVES.values():
            needs = [row.data, *(["reference"] if row.needs_reference else []), *(["kl"] if row.takes_kl else [])]
            options = ", ".join(f"{name}={default}" for name, default in row.options.items())
            typer.echo(f"{row.name:23} {', '.join(needs):28} {row.formula}")
            typer.echo(f"{'':23} {row.paper}; options: {options or 'none'}" + (f"; {row.note}" if row.note else ""))
        raise typer.Exit


def align(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of the model to align.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.", show_default=False)],
    objective: Annotated[str, typer.Option(help="dpo, pd, pmle, rkl, simpo, kto, npo, ...; see --objectives.")] = "dpo",
    objectives: Annotated[
        bool, typer.Option("--objectives", callback=_list_objectives, is_eager=True, help="List them all, and exit.")
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Rows with prompt, chosen, rejected; or prompt, completion, label; or prompt: file, Hub id or -.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    eval_dataset: Annotated[str | None, typer.Option(help="Held-out rows.", show_default="no evaluation")] = None,
    eval_samples: Annotated[int, typer.Option(help="Held-out rows that are used.")] = 256,
    retain_dataset: Annotated[
        str | None, typer.Option(help="npo-gd, npo-kl: what is to be kept.", show_default=False)
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of the objective.", show_default="the objective's")] = None,
    gamma: Annotated[float | None, typer.Option(help="Of the objective.", show_default="the objective's")] = None,
    kl: Annotated[
        float | None, typer.Option(help="pmle, pd: weight of the on-policy KL to the reference.", show_default="0")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Other options of the objective: key=value.", show_default=False)
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Another model as the reference (Pre-DPO).", show_default="MODEL")
    ] = None,
    reference_logps: Annotated[
        Path | None, typer.Option(help="File of its log-probabilities: read, or written.", show_default=False)
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(help="Directory, Hub id, module:function or file.py:function.", show_default=False),
    ] = None,
    samples_per_prompt: Annotated[
        int | None, typer.Option(help="Completions that are drawn.", show_default="2; rkl, rlhf 4")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of a drawn completion.", show_default="64")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the draws.", show_default="1")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the draws.", show_default="1")] = None,
    reward_scale: Annotated[float | None, typer.Option(help="Factor of rewards of draws.", show_default="1")] = None,
    reward_clip: Annotated[
        tuple[float, float] | None, typer.Option(help="Lowest and highest of them.", show_default="no clip")
    ] = None,
    missing_end_penalty: Annotated[
        float | None, typer.Option(help="Taken from draws that do not end.", show_default="0")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Of drawn pairs: hard, soft, sampled, best-worst; with --rounds ask.", show_default="hard"),
    ] = None,
    label_scale: Annotated[float | None, typer.Option(help="Of rewards, for soft labels.", show_default="1")] = None,
    rounds: Annotated[int, typer.Option(help="Trainings, each on completions of the policy before it.")] = 0,
    sampler: Annotated[
        list[str] | None,
        typer.Option(help="Of a round: policy, reference, design or hybrid; repeat it.", show_default="policy"),
    ] = None,
    accumulate: Annotated[
        bool | None, typer.Option("--accumulate", help="Rounds train on the rows of all before.", show_default=False)
    ] = None,
    warm_start: Annotated[
        bool | None,
        typer.Option(
            "--warm-start/--cold-start", help="Rounds go on from the policy, or from MODEL.", show_default="warm"
        ),
    ] = None,
    prompts_per_round: Annotated[int | None, typer.Option(help="Of each round.", show_default="all")] = None,
    num_features: Annotated[
        int | None, typer.Option(help="Rounds: what designs and coverage see.", show_default="16")
    ] = None,
    eval_prompts: Annotated[int | None, typer.Option(help="Rounds are assessed on.", show_default="64")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (of a round).", show_default="of 1 epoch")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the rows, in place of --steps.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt with a completion.", show_default="1024, or what the model has"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per process at a time.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    layout: Annotated[str, typer.Option(help="Of a batch: auto, padded, shared or packed.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="adamw, muon, amuse, ...")] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="1e-6, with --lora 1e-5")] = None,
    schedule: Annotated[str, typer.Option(help="auto, cosine, linear or constant.")] = "auto",
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled.")] = 0.0,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradients are clipped to it.", show_default="1")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters; without them it is the reference.")] = False,
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
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the pass.")] = "auto",
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
    """Align a model with preferences: offline from pairs, or with a reward of what it draws itself.

    Example: burnish align Qwen/Qwen3-0.6B --objective dpo --dataset pairs.jsonl --lora --out aligned

    Example: burnish align sft --objective pd --dataset prompts.jsonl --reward-model rm --rounds 3 --out aligned
    """
    from burnish.align import align as run
    from burnish.runs import Progress

    result = run(
        model,
        out,
        objective=objective,
        dataset=dataset,
        split=split,
        eval_dataset=eval_dataset,
        eval_samples=eval_samples,
        retain_dataset=retain_dataset,
        beta=beta,
        gamma=gamma,
        kl=kl,
        options=_options(settings or []),
        reference=reference,
        reference_logps=reference_logps,
        reward_model=reward_model,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        reward_scale=reward_scale,
        reward_clip=reward_clip,
        missing_end_penalty=missing_end_penalty,
        labels=labels,
        label_scale=label_scale,
        rounds=rounds,
        sampler=sampler or None,
        accumulate=accumulate,
        warm_start=warm_start,
        prompts_per_round=prompts_per_round,
        num_features=num_features,
        eval_prompts=eval_prompts,
        steps=steps,
        epochs=epochs,
        max_length=max_length,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        layout=layout,
        optimizer=optimizer,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
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


def _options(settings: list[str]) -> dict[str, Any]:
    """`key=value` as an option of an objective; values are numbers, true, false or null."""
    import json

    found: dict[str, Any] = {}
    for setting in settings:
        name, given, value = setting.partition("=")
        if not (name and given):
            raise ValueError(f"--set {setting}: expected key=value")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = value
    return found
