"""The model card of a dense student: what it is made of and how, for people and for the hub's search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.densify.plan import DensifyPlan

TEMPLATE = """\
---
base_model: {base_model}
base_model_relation: finetune
library_name: transformers
tags:
- burnish
- moe-to-dense
{extra}---

# {title}

A dense {architecture}, made from the Mixture-of-Experts model `{base_model}` ({teacher_architecture}) by
burnish {version}. It loads in transformers without burnish.

| | teacher | this model |
|---|---|---|
| class | {teacher_architecture} | {architecture} |
| parameters | {teacher_parameters:,} | {parameters:,} |
| bytes of weights | {teacher_bytes:,} | {bytes:,} |
| experts per layer | {num_experts} (top {top_k}) | {keep} kept in {num_groups} blocks |

## Recipe

- score: {score}; grouping: {grouping}; scaling: {scaling}
- calibration: {calibration}
- every decision is in `plan.json`, every setting and version in `burnish.json`
{notes}
## Limits

This is an initialisation: the router is gone, and each token now goes through the same experts. Quality is below the
teacher's until the student has been distilled from it. Measure with `burnish evaluate --before TEACHER --after THIS`.

Method: "Pruning and Distilling Mixture-of-Experts into Dense Language Models", arXiv 2605.28207.
"""


CONTROL = """\
---
library_name: transformers
tags:
- burnish
- control
{extra}---

# A control for students of {base_model}

A dense {architecture} of {parameters:,} parameters in the shape of a student of `{base_model}`, with the start
`{init}` in the place of experts. It is there to be distilled beside that student, and for nothing else.
"""


def model_card(record: dict[str, Any], plan: DensifyPlan | None, front_matter: dict[str, str]) -> str:
    """README.md of a student.

    Args:
        record: the run record (`burnish.json`).
        plan: the decision; None for a control.
        front_matter: keys to carry over from the teacher's own card, such as its license.
    """
    source, output, options = record["source"], record["output"], record["options"]
    tokens = record["statistics"]["num_tokens"]
    name = source["name"] if not Path(source["name"]).exists() else Path(source["name"]).resolve().name
    extra = "".join(f"{key}: {value}\n" for key, value in front_matter.items())
    if plan is None:
        return CONTROL.format(
            extra=extra,
            base_model=name,
            architecture=output["architecture"],
            parameters=output["parameters"],
            init=options["init"],
        )
    data = options["dataset"] or "the bundled corpus"
    return TEMPLATE.format(
        base_model=name,
        extra=extra,
        title=f"{name.rpartition('/')[2]}, dense",
        architecture=output["architecture"],
        teacher_architecture=source["architecture"],
        version=record["environment"]["versions"]["burnish"],
        teacher_parameters=source["parameters"],
        parameters=output["parameters"],
        teacher_bytes=source["bytes"],
        bytes=output["bytes"],
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        keep=sum(len(group) for group in plan.layers[0].groups),
        num_groups=plan.num_groups,
        score=plan.score or "chosen by hand",
        grouping=plan.grouping or "none",
        scaling=plan.scaling or "chosen by hand",
        calibration=f"{tokens:,} tokens of {data}" if tokens else "none in this run (a given plan)",
        notes="".join(f"- {note}\n" for note in record["notes"]),
    )
