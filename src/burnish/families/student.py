"""Decide the structure of a dense student: its config, every tensor of it, and where each one comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from burnish.checkpoint import DTYPES, Checkpoint, PlannedTensor, TensorInfo
from burnish.checkpoint.tensors import FLOATING
from burnish.errors import CheckpointError, UnsupportedModelError
from burnish.families.family import Config, DenseTwin, Family, MoEShape
from burnish.families.outline import class_tensors, require_tensors
from burnish.families.storage import ExpertStorage, PackedMxfp4, Part, Separate, Shape

MOE_KEYS = frozenset(
    (
        *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group", "topk_group", "topk_method"),
        *("decoder_sparse_step", "mlp_only_layers", "first_k_dense_replace", "moe_layer_freq", "ep_size"),
        *("n_shared_experts", "shared_expert_intermediate_size", "output_router_logits", "router_jitter_noise"),
        *("router_aux_loss_coef", "aux_loss_alpha", "seq_aux"),
    )
)
"""Config keys that only a Mixture-of-Experts model has; a plain dense student keeps none of them."""


@dataclass(frozen=True)
class FeedForward:
    """A tensor of a student's feed-forward: the `parts` of `layer` that it is made of."""

    layer: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Student:
    """The structure of a dense student.

    Attributes:
        family, twin, shape: what it is made from and for.
        config: content of its `config.json`.
        width: feed-forward width of every layer: the widest that any layer needs.
        storage: how the teacher's experts lie on disk.
        tensors: all tensors of the output.
        feed_forward: the computed ones among them.
        casts: output name -> source name of tensors that only change type.
        zeros: tensors of zeros (the router of a one-expert student).
        converted: source tensors that the computed ones are made of.
        dropped: source tensors that have no place in the student (routers).
    """

    family: Family
    twin: DenseTwin
    shape: MoEShape
    config: dict[str, Any]
    width: int
    storage: ExpertStorage
    tensors: tuple[PlannedTensor, ...]
    feed_forward: Mapping[str, FeedForward]
    casts: Mapping[str, str]
    zeros: frozenset[str]
    converted: frozenset[str]
    dropped: frozenset[str]

    @property
    def num_parameters(self) -> int:
        """Parameters of the student as stored (a tied head counts once)."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def copied(self) -> list[str]:
        """Source tensors that are copied as they are, or only change type."""
        return [tensor.copy_of for tensor in self.tensors if tensor.copy_of is not None] + [*self.casts.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def describe_student(
    teacher: Checkpoint, family: Family, config: Config, num_groups: int, dtype: str | None = None
) -> Student:
    """Decide the structure of the dense student of a teacher; reads headers, and a stored head that should be tied.

    Args:
        teacher: the Mixture-of-Experts checkpoint.
        family: its family.
        config: its resolved config.
        num_groups: expert blocks in each dense feed-forward (`keep` under pure pruning, else the router's top-k).
        dtype: safetensors type of all floating tensors; None keeps each as it is.

    Raises:
        CheckpointError: expert tensors are missing, of unequal number or not of the shape that the config says.
        UnsupportedModelError: a tensor is quantised or has no place in the student's class, or one is missing there.
    """
    shape, twin = family.shape(config), family.twin(config)
    if not shape.moe_layers:
        raise UnsupportedModelError(f"{teacher.path}: no layer has experts: it is dense, nothing to densify")
    storage = _find_storage(teacher, family, shape)
    width = max(num_groups * shape.expert_width + shape.shared_width, shape.dense_width)
    expert_dtype = _expert_dtype(teacher, storage, shape)
    tensors: list[PlannedTensor] = []
    feed_forward: dict[str, FeedForward] = {}
    casts: dict[str, str] = {}
    zeros: set[str] = set()
    converted: set[str] = set()
    dropped = _router_tensors(teacher, family, shape) | redundant_tensors(teacher, config)
    for layer in range(shape.num_layers):
        if layer in shape.moe_layers:
            converted |= _moe_tensors(teacher, family, storage, shape, layer)
        elif family.dense_ffn is not None and shape.dense_width != width:
            converted |= family.dense_ffn.tensors(layer, 1, shape.hidden_size, shape.dense_width).keys()
        else:
            continue
        shapes = twin.storage.tensors(layer, 1, shape.hidden_size, width)
        for name, parts in twin.storage.pieces(layer, 0).items():
            tensors.append(PlannedTensor(name, dtype or expert_dtype, shapes[name]))
            feed_forward[name] = FeedForward(layer, parts)
        for template, has_hidden in (twin.zero_router or {}).items():
            name = template.format(layer=layer)
            tensors.append(PlannedTensor(name, dtype or expert_dtype, (1, shape.hidden_size) if has_hidden else (1,)))
            zeros.add(name)
    for name, info in teacher.tensors.items():
        if name in converted or name in dropped:
            continue
        require_floating(info)
        if dtype is None or info.dtype == dtype:
            tensors.append(PlannedTensor(name, info.dtype, info.shape, copy_of=name))
        else:
            tensors.append(PlannedTensor(name, dtype, info.shape))
            casts[name] = name
    student = Student(
        family=family,
        twin=twin,
        shape=shape,
        config=dense_config(config, teacher.config, twin, width, dtype or expert_dtype),
        width=width,
        storage=storage,
        tensors=tuple(tensors),
        feed_forward=feed_forward,
        casts=casts,
        zeros=frozenset(zeros),
        converted=frozenset(converted),
        dropped=frozenset(dropped),
    )
    require_loadable(student)
    return student


def dense_config(config: Config, raw: Config, twin: DenseTwin, width: int, dtype: str) -> dict[str, Any]:
    """`config.json` of the student.

    Keys that older readers know (`rope_theta`, `rope_scaling`, `torch_dtype`) are written beside the ones of
    transformers 5, so that both majors, vLLM and llama.cpp read the same model.

    Args:
        config: the teacher's resolved config.
        raw: the teacher's `config.json`.
        twin: the student's class.
        width: feed-forward width.
        dtype: safetensors type of the weights.
    """
    from transformers import CONFIG_MAPPING

    unwanted = {"_name_or_path", "quantization_config", "transformers_version", "model_type"}
    if twin.kind == "dense":
        unwanted |= MOE_KEYS
    settings = {key: value for key, value in config.items() if key not in unwanted}
    settings |= {**(twin.settings or {}), twin.width_key: width}
    settings |= {"architectures": [twin.architecture], "dtype": DTYPES[dtype][1]}
    dense: dict[str, Any] = CONFIG_MAPPING[twin.model_type](**settings).to_diff_dict()
    kept = set(twin.settings or {})
    dense = {key: value for key, value in dense.items() if twin.kind != "dense" or key in kept or key not in MOE_KEYS}
    rope = dense.get("rope_parameters") or {}
    if "rope_theta" in rope:
        dense["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            dense["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "torch_dtype" in raw:
        dense["torch_dtype"] = dense["dtype"]
    return dense


def require_loadable(student: Student) -> None:
    """Hold the planned tensors against the student's class, built without weights.

    Raises:
        UnsupportedModelError: a planned tensor has no place in the class (a vision tower, an MTP head ...), a tensor
            of the class is not planned, or a shape differs; names the tensor.
    """
    expected = class_tensors({**student.config, "model_type": student.twin.model_type})
    if student.twin.kind == "one-expert":
        for layer in student.shape.moe_layers:
            one = (layer, 1, student.shape.hidden_size, student.width)
            fused = student.family.module_storage.tensors(*one)
            if fused == {name: expected.get(name) for name in fused}:
                for name in fused:
                    del expected[name]
                expected |= student.twin.storage.tensors(*one)
    require_tensors({tensor.name: tensor.shape for tensor in student.tensors}, expected, student.twin.architecture)


def require_floating(info: TensorInfo) -> None:
    """Refuse a weight that is not a plain floating number: copied as it is, the student would compute nonsense."""
    if info.dtype not in FLOATING:
        raise UnsupportedModelError(
            f"{info.file}: tensor {info.name} is {info.dtype}: quantised weights cannot be read, give a checkpoint in"
            " bfloat16, float16 or float32"
        )


def _find_storage(teacher: Checkpoint, family: Family, shape: MoEShape) -> ExpertStorage:
    """The layout of which most tensors are there; then all of them must be, in the right shape."""

    def expected_by(storage: ExpertStorage) -> dict[str, Shape]:
        one = [
            storage.tensors(layer, shape.num_experts, shape.hidden_size, shape.expert_width)
            for layer in shape.moe_layers
        ]
        return {name: wanted for tensors in one for name, wanted in tensors.items()}

    def share(storage: ExpertStorage) -> float:
        expected = expected_by(storage)
        return len(expected.keys() & teacher.tensors.keys()) / len(expected)

    storage = max(family.storages, key=share)
    expected = expected_by(storage)
    if expected.keys().isdisjoint(teacher.tensors):
        raise CheckpointError(f"{teacher.path}: no expert tensors of {family.name}, such as {next(iter(expected))}")
    for name, wanted in expected.items():
        info = teacher.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{teacher.path}: expert tensor {name} is missing: every MoE layer must have the"
                f" {shape.num_experts} experts that config.json says"
            )
        if info.shape != wanted:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json implies {list(wanted)}"
            )
    return storage


def _expert_dtype(teacher: Checkpoint, storage: ExpertStorage, shape: MoEShape) -> str:
    if isinstance(storage, PackedMxfp4):
        return "BF16"
    info: TensorInfo | None = None
    for layer in shape.moe_layers:
        for name in storage.tensors(layer, shape.num_experts, shape.hidden_size, shape.expert_width):
            info = teacher.tensors[name]
            require_floating(info)
    assert info is not None
    return info.dtype


def _moe_tensors(teacher: Checkpoint, family: Family, storage: ExpertStorage, shape: MoEShape, layer: int) -> set[str]:
    names = set(storage.tensors(layer, shape.num_experts, shape.hidden_size, shape.expert_width))
    if family.shared is not None and shape.shared_width:
        shared: Separate = family.shared.storage
        for name, wanted in shared.tensors(layer, 1, shape.hidden_size, shape.shared_width).items():
            if teacher.info(name).shape != wanted:
                raise CheckpointError(
                    f"{teacher.info(name).file}: tensor {name} has shape {list(teacher.info(name).shape)},"
                    f" config.json implies {list(wanted)}"
                )
            names.add(name)
        if family.shared.gate is not None:
            names.add(teacher.info(family.shared.gate.format(layer=layer)).name)
    return names


def _router_tensors(teacher: Checkpoint, family: Family, shape: MoEShape) -> set[str]:
    names = {template.format(layer=layer) for template in family.router_tensors for layer in shape.moe_layers}
    found = names & teacher.tensors.keys()
    if not found:
        raise CheckpointError(f"{teacher.path}: no router found, such as {min(names)}")
    return found


def redundant_tensors(teacher: Checkpoint, config: Config) -> set[str]:
    """Old rotary buffers, and a head that repeats the embedding it is tied to."""
    names = {name for name in teacher.tensors if name.endswith("rotary_emb.inv_freq")}
    if config.get("tie_word_embeddings") and "lm_head.weight" in teacher.tensors:
        embedding = "model.embed_tokens.weight"
        if any(a != b for a, b in zip(teacher.chunks("lm_head.weight"), teacher.chunks(embedding), strict=True)):
            raise CheckpointError(
                f"{teacher.path}: config.json ties lm_head.weight to {embedding}, but the two tensors differ"
            )
        names.add("lm_head.weight")
    return names
