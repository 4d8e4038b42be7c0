"""The model card of an aligned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.align.objectives.table import find

TEMPLATE = """\
---
base_model: {base_model}
base_model_relation: {relation}
library_name: {library}
tags:
- burnish
- preference-alignment
{tags}{extra}---

# {title}, aligned

{architecture}, {weights:,} weights trained by burnish {version}{kind}. It loads in {library} without burnish.

## Recipe

- objective: {objective} ({paper}){settings}
- data: {data}, {examples:,} rows in {steps:,} steps of {per_step}{drawn}
- reference: {reference}
- optimizer: {optimizer}, learning rate {lr}, {schedule} schedule
- evaluation on held-out rows: {before} before, {after} after
- every setting and version is in `burnish.json`, the course of training in `metrics.jsonl`{rounds}
{notes}
## Limits

Rewards and labels are those of the data or of the reward model that is named above; what they do not see is not
aligned. Measure before you ship: `burnish evaluate --before BASE --after THIS`.
"""

DRAWN = {
    "offline": "",
    "online": "; completions drawn from the policy in each step",
    "rounds": "; completions drawn from the policy in {rounds} rounds",
}


def model_card(record: dict[str, Any], front_matter: dict[str, str]) -> str:
    """README.md of an aligned model, from its run record and the keys to carry over from the source's own card."""
    source, options, training = record["source"], record["options"], record["training"]
    name, adapters = _shown(source["name"]), training["adapters"]
    settings = ", ".join(f"{key} {value}" for key, value in training["objective_options"].items() if value is not None)
    scored = f", scored by {_shown(options['reward_model'])}" if options["reward_model"] else ""
    return TEMPLATE.format(
        base_model=name,
        relation="adapter" if adapters else "finetune",
        library="peft" if adapters else "transformers",
        tags="- lora\n" if adapters else "",
        extra="".join(f"{key}: {value}\n" for key, value in front_matter.items()),
        title=name.rpartition("/")[2],
        architecture=source["architecture"],
        weights=training["trained_weights"],
        kind=" in LoRA adapters" if adapters else ", in LoRA adapters that were merged" if options["lora"] else "",
        version=record["environment"]["versions"]["burnish"],
        objective=training["objective"],
        paper=find(training["objective"]).paper,
        settings=f", {settings}" if settings else "",
        data=_shown(options["dataset"]),
        examples=training["examples"],
        steps=training["steps"],
        per_step=training["rows_per_step"],
        drawn=DRAWN[training["mode"]].format(rounds=options["rounds"]) + scored,
        reference=_reference(options["reference"], training["needs_reference"]),
        optimizer=options["optimizer"],
        lr=options["lr"],
        schedule=options["schedule"],
        before=_evaluation(training["first_evaluation"]),
        after=_evaluation(training["last_evaluation"]),
        rounds=", that of rounds in `rounds/`" if training["mode"] == "rounds" else "",
        notes="".join(f"- {note}\n" for note in record["notes"]),
    )


def _reference(reference: str | None, needed: bool) -> str:
    if not needed:
        return "none, the objective needs none"
    return "the base model" if reference is None else _shown(reference)


def _shown(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


def _evaluation(line: dict[str, float] | None) -> str:
    if not line:
        return "not measured"
    accuracy = f", accuracy {line['eval_accuracy']:.3f}" if "eval_accuracy" in line else ""
    return f"loss {line['eval_loss']:.4f}{accuracy}"
