"""The model card of a distilled student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = """\
---
base_model: {base_model}
base_model_relation: finetune
library_name: transformers
tags:
- burnish
- distillation
{extra}---

# {title}, distilled

{architecture}, {parameters:,} parameters, distilled by burnish {version} from `{teacher}`. It loads in transformers
without burnish.

## Recipe

- loss: {loss}, temperature {temperature}; cross-entropy share {ce_weight}, hidden-state weight {hidden_weight}
- data: {tokens:,} tokens of {data}, in blocks of {max_length}
- optimizer: {optimizer}, learning rate {lr}, {schedule} schedule, {tokens_per_step:,} tokens a step
- evaluation on held-out text: {before} before, {after} after
- every setting and version is in `burnish.json`, the course of training in `metrics.jsonl`
{notes}
## Limits

Measure before you ship: `burnish evaluate --before TEACHER --after THIS`. With a few billion tokens a student stays
below its teacher and below models of its size that were trained from scratch on trillions.
"""


def model_card(record: dict[str, Any], front_matter: dict[str, str]) -> str:
    """README.md of a distilled student, from its run record and the keys to carry over from the student's own card."""
    source, options, training = record["source"], record["options"], record["training"]
    name = _shown(source["name"])
    return TEMPLATE.format(
        base_model=name,
        extra="".join(f"{key}: {value}\n" for key, value in front_matter.items()),
        title=name.rpartition("/")[2],
        architecture=source["architecture"],
        parameters=source["parameters"],
        version=record["environment"]["versions"]["burnish"],
        teacher=_shown(record["teacher"]["name"]),
        loss=options["loss"],
        temperature=options["temperature"],
        ce_weight=options["ce_weight"],
        hidden_weight=options["hidden_weight"],
        tokens=training["tokens"],
        data=_shown(options["dataset"] or "the bundled corpus"),
        max_length=options["max_length"],
        optimizer=options["optimizer"],
        lr=options["lr"],
        schedule=options["schedule"],
        tokens_per_step=training["tokens_per_step"],
        before=_evaluation(training["first_evaluation"]),
        after=_evaluation(training["last_evaluation"]),
        notes="".join(f"- {note}\n" for note in record["notes"]),
    )


def _shown(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


def _evaluation(line: dict[str, float] | None) -> str:
    return f"KL {line['eval_kl']:.4f}, nll {line['eval_nll']:.4f} nats per token" if line else "not measured"
