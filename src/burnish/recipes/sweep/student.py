"""Dense students in memory: one model a width, whose feed-forward is filled again for every plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.checkpoint import Checkpoint, PlannedTensor
from burnish.densify import DensifyPlan
from burnish.densify.assemble import assemble
from burnish.families import Student
from burnish.recipes.sweep.grid import substance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Place:
    """A feed-forward tensor of the model in memory, and the planned tensors that it is made of, by part."""

    name: str
    layer: int
    planned: dict[str, PlannedTensor]


class FilledStudent:
    """A dense student of one width; everything but its feed-forward is read once.

    A tensor is filled only when the new plan gives it other values: plans that differ in their scales share gate and
    up projections.

    Args:
        teacher: where tensors are read from.
        student: the structure.
        device, dtype: of the model in memory; every tensor is rounded to its planned type first.
        seed: of the padding.
    """

    def __init__(
        self, teacher: Checkpoint, student: Student, *, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        self.teacher, self.student, self.seed = teacher, student, seed
        self.model = _empty_model(student, dtype)
        self.places = _places(student, {tensor.name: tensor for tensor in student.tensors})
        self.filled: dict[str, Any] = {}
        self._load(device, dtype)

    @property
    def num_parameters(self) -> int:
        """Stored elements of the student, a tied head once."""
        return self.student.num_parameters

    def _load(self, device: torch.device, dtype: torch.dtype) -> None:
        state = {}
        compute = assemble(self.student, _no_plan(self.student), self.teacher, seed=self.seed)
        for planned in self.student.tensors:
            if planned.name in self.student.feed_forward:
                continue
            tensor = compute(planned) if planned.copy_of is None else self.teacher.read(planned.copy_of)
            state[self.student.family.module_name(planned.name)] = tensor.to(device, dtype)
        shapes = self.model.state_dict()
        state |= {
            place.name: torch.empty(shapes[place.name].shape, device=device, dtype=dtype) for place in self.places
        }
        if self.model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self.model.load_state_dict(state, strict=True, assign=True)
        self.model.tie_weights()
        self.model.to(device).eval().requires_grad_(False)

    def fill(self, plan: DensifyPlan) -> PreTrainedModel:
        """The model with the feed-forward that a plan makes of the teacher's experts."""
        compute = assemble(self.student, plan, self.teacher, seed=self.seed)
        layers = {layer.layer: layer for layer in plan.layers}
        parameters = dict(self.model.named_parameters())
        for place in self.places:
            layer = layers.get(place.layer)
            scaled = any(part.startswith("down") for part in place.planned)
            wanted = "dense already" if layer is None else substance(layer, scaled=scaled)
            if self.filled.get(place.name) == wanted:
                continue
            self.filled.pop(place.name, None)
            parameters[place.name].data.copy_(self._tensor(place, compute))
            self.filled[place.name] = wanted
        return self.model

    def _tensor(self, place: _Place, compute: Any) -> Tensor:
        if place.name in self.student.feed_forward:
            return compute(next(iter(place.planned.values())))  # type: ignore[no-any-return]
        storage = self.student.family.module_storage  # the only expert, which transformers holds fused
        fused = storage.compose(tuple(place.planned), lambda part: compute(place.planned[part]))
        return fused.unsqueeze(0)


def _places(student: Student, planned: dict[str, PlannedTensor]) -> list[_Place]:
    """Where the feed-forward goes: under its planned names, or fused where only transformers' own names differ."""
    if student.twin.kind == "dense" or student.twin.storage == student.family.module_storage:
        return [
            _Place(name, target.layer, dict.fromkeys(target.parts, planned[name]))
            for name, target in student.feed_forward.items()
        ]
    by_part = {
        (target.layer, part): planned[name] for name, target in student.feed_forward.items() for part in target.parts
    }
    return [
        _Place(name, layer, {part: by_part[layer, part] for part in parts})
        for layer in sorted({target.layer for target in student.feed_forward.values()})
        for name, parts in student.family.module_storage.pieces(layer, 0).items()
    ]


def _no_plan(student: Student) -> DensifyPlan:
    """For tensors that no plan changes."""
    shape = student.shape
    return DensifyPlan(family=student.family.model_type, num_experts=shape.num_experts, top_k=shape.top_k, layers=[])


def _empty_model(student: Student, dtype: torch.dtype) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = {key: value for key, value in student.config.items() if key != "model_type"}
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[student.twin.model_type](**settings), dtype=dtype)
