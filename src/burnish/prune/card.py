"""The model card of a pruned model: what it is made of and how, for people and for the hub's search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.prune.plan import PrunePlan, to_ranges

TEMPLATE = """\
---
base_model: {base_model}
base_model_relation: finetune
library_name: transformers
tags:
- burnish
- pruned
{extra}---

# {title}, pruned

A smaller {architecture}, cut from `{base_model}` by burnish {version}. It loads in transformers without burnish.

| | source | this model |
|---|---|---|
| parameters | {source_parameters:,} | {parameters:,} |
| bytes of weights | {source_bytes:,} | {bytes:,} |
| layers | {source.layers} | {target.layers} |
| hidden size | {source.hidden_size} | {target.hidden_size} |
| feed-forward size | {source.intermediate_size} | {target.intermediate_size} |
| heads | {source.heads} ({source.kv_heads} key-value) | {target.heads} ({target.kv_heads} key-value) |

## Recipe

- layers kept, by block influence: {layers}
- feed-forward neurons, heads and hidden channels kept by the size of their activations
- calibration: {calibration}
- every decision is in `plan.json`, every setting and version in `burnish.json`
{notes}
## Limits

This is an initialisation: what was cut away is missing until the model has been distilled from its source. Measure
with `burnish evaluate --before SOURCE --after THIS`.

Method: "Compact Language Models via Pruning and Knowledge Distillation", arXiv 2407.14679.
"""


def model_card(record: dict[str, Any], plan: PrunePlan, front_matter: dict[str, str]) -> str:
    """README.md of a pruned model.

    Args:
        record: the run record (`burnish.json`).
        plan: the decision.
        front_matter: keys to carry over from the source's own card, such as its licence.
    """
    source, output = record["source"], record["output"]
    tokens = record["statistics"]["num_tokens"]
    name = source["name"] if not Path(source["name"]).exists() else Path(source["name"]).resolve().name
    data = record["options"]["dataset"] or "the bundled corpus"
    return TEMPLATE.format(
        base_model=name,
        extra="".join(f"{key}: {value}\n" for key, value in front_matter.items()),
        title=name.rpartition("/")[2],
        architecture=output["architecture"],
        version=record["environment"]["versions"]["burnish"],
        source_parameters=source["parameters"],
        parameters=output["parameters"],
        source_bytes=source["bytes"],
        bytes=output["bytes"],
        source=plan.source,
        target=plan.target,
        layers=to_ranges(layer.layer for layer in plan.layers),
        calibration=f"{tokens:,} tokens of {data}" if tokens else "none in this run (a given plan)",
        notes="".join(f"- {note}\n" for note in record["notes"]),
    )
