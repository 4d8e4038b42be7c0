"""The decision as a record: which experts of each layer are kept, how they are grouped, merged and scaled.

A plan is a readable JSON file. It can be edited by hand and applied with `plan=` (`--plan FILE`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from burnish.errors import BurnishError
from burnish.families import MoEShape
from burnish.families.conversion import load_plan

Expert = Annotated[int, Field(ge=0)]


class LayerPlan(BaseModel):
    """The decision for one MoE layer.

    Attributes:
        layer: index of the decoder layer.
        groups: experts of each block of the dense feed-forward.
        weights: merge weights of each group; they are divided by their sum.
        scales: factor of each block's down projection.
        shared_scale: factor of the shared experts' down projection.
        scores: importance of every expert, for the record.
        relative_block_error: expected squared error of the block output over its energy; None when not known.
        effective_rank: of the kept experts' outputs; None when not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    groups: list[list[Expert]]
    weights: list[list[FiniteFloat]]
    scales: list[FiniteFloat]
    shared_scale: FiniteFloat = 1.0
    scores: list[FiniteFloat] | None = None
    relative_block_error: FiniteFloat | None = None
    effective_rank: FiniteFloat | None = None


class DensifyPlan(BaseModel):
    """The decision for a model; `score`, `keep`, `grouping` and `scaling` say how it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["burnish.densify.plan/1"] = "burnish.densify.plan/1"
    family: str
    num_experts: int
    top_k: int
    score: str | None = None
    keep: int | None = None
    grouping: str | None = None
    scaling: str | None = None
    notes: list[str] = []
    layers: list[LayerPlan]

    @property
    def num_groups(self) -> int:
        """Blocks of each dense feed-forward."""
        return len(self.layers[0].groups)

    def require_fits(self, model_type: str, shape: MoEShape) -> Self:
        """Hold the plan against a model.

        Raises:
            BurnishError: another family, other layers or expert numbers, unequal lists, or an impossible group; names
                the layer and the value.
        """
        if (self.family, self.num_experts) != (model_type, shape.num_experts):
            raise BurnishError(
                f"the plan is for {self.family} with {self.num_experts} experts, the model is {model_type} with"
                f" {shape.num_experts}"
            )
        if [layer.layer for layer in self.layers] != list(shape.moe_layers):
            raise BurnishError(
                f"the plan covers layers {[layer.layer for layer in self.layers]}, the model's MoE layers are"
                f" {list(shape.moe_layers)}"
            )
        for layer in self.layers:
            _require_sound(layer, self.num_groups, shape.num_experts)
        return self

    def to_json(self) -> str:
        """Indented JSON with the lists of a layer on one line each, so that a diff shows what changed."""
        head = self.model_dump(exclude={"layers"})
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        layers = []
        for layer in self.layers:
            rows = [f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in layer.model_dump().items()]
            layers.append("    {\n" + ",\n".join(rows) + "\n    }")
        return "{\n" + "\n".join(lines) + '\n  "layers": [\n' + ",\n".join(layers) + "\n  ]\n}\n"

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a plan file; raises as `load_plan`."""
        return load_plan(cls, file)


def _require_sound(layer: LayerPlan, num_groups: int, num_experts: int) -> None:
    place = f"plan of layer {layer.layer}"
    if not layer.groups or len(layer.groups) != num_groups:
        raise BurnishError(f"{place}: {len(layer.groups)} groups, the first layer has {num_groups}: all need the same")
    if len(layer.scales) != num_groups or len(layer.weights) != num_groups:
        raise BurnishError(f"{place}: {num_groups} groups need as many scales and weights")
    for group, weights in zip(layer.groups, layer.weights, strict=True):
        if not group or len(group) != len(weights) or any(expert >= num_experts for expert in group):
            raise BurnishError(
                f"{place}: group {group} with weights {weights}: needs experts 0..{num_experts - 1} and one weight each"
            )
        if sum(weights) <= 0 or min(weights) < 0:
            raise BurnishError(f"{place}: group {group}: merge weights must be >= 0 with a positive sum, are {weights}")
    experts = sorted(expert for group in layer.groups for expert in group)
    if repeated := _repeated(experts):
        raise BurnishError(f"{place}: expert {repeated} is in two groups")


def _repeated(ordered: Sequence[int]) -> int | None:
    return next((a for a, b in itertools.pairwise(ordered) if a == b), None)
