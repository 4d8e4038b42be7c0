"""The model card of a tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = """\
---
base_model: {base_model}
base_model_relation: {relation}
library_name: {library}
tags:
- burnish
{tags}{extra}---

# {title}, tuned

{architecture}, {weights:,} weights tuned by burnish {version}{kind}. It loads in {library} without burnish.

## Recipe

- data: {data}, {examples:,} examples in {steps:,} steps of {per_step}
- objective: {objective}
- optimizer: {optimizer}, learning rate {lr}, {schedule} schedule
- evaluation on held-out rows: {before} before, {after} after
- every setting and version is in `burnish.json`, the course of training in `metrics.jsonl`{trajectory}
{notes}
## Limits

Measure before you ship: `burnish evaluate --before BASE --after THIS`. A model that was tuned for one task may have
lost others.
"""


def model_card(record: dict[str, Any], front_matter: dict[str, str]) -> str:
    """README.md of a tuned model, from its run record and the keys to carry over from the source's own card."""
    source, options, training = record["source"], record["options"], record["training"]
    name, adapters = _shown(source["name"]), training["adapters"]
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
        data=_shown(options["dataset"]),
        examples=training["examples"],
        steps=training["steps"],
        per_step=training["examples_per_step"],
        objective="cross-entropy of the answers" if options["objective"] == "loss" else options["objective"],
        optimizer=options["optimizer"],
        lr=options["lr"],
        schedule=options["schedule"],
        before=_evaluation(training["first_evaluation"], options["objective"]),
        after=_evaluation(training["last_evaluation"], options["objective"]),
        trajectory="; `burnish replay` makes the same weights\n  of the base model and `trajectory.jsonl`"
        if training["forward_only"] else "",
        notes="".join(f"- {note}\n" for note in record["notes"]),
    )  # fmt: skip


REPLAYED = """\
---
base_model: {base_model}
base_model_relation: {relation}
library_name: {library}
tags:
- burnish
{extra}---

# {title}, tuned

The weights of a tuning with {optimizer}, made again by burnish {version} from the base model and the log of its
{steps:,} steps. It loads in {library} without burnish.
"""


def replay_card(record: dict[str, Any], front_matter: dict[str, str]) -> str:
    """README.md of a model that a log was replayed into."""
    name, training = _shown(record["source"]["name"]), record["training"]
    return REPLAYED.format(
        base_model=name,
        relation="adapter" if training["adapters"] else "finetune",
        library="peft" if training["adapters"] else "transformers",
        extra="".join(f"{key}: {value}\n" for key, value in front_matter.items()),
        title=name.rpartition("/")[2],
        optimizer=training["optimizer"],
        version=record["environment"]["versions"]["burnish"],
        steps=training["steps"],
    )


def _shown(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


def _evaluation(line: dict[str, float] | None, objective: str) -> str:
    if not line:
        return "not measured"
    score = f"{objective} {line['eval_score']:.3f}, " if "eval_score" in line else ""
    return f"{score}{line['eval_nll']:.4f} nats per token"
