"""The planner: exact parameter counts of the published students, from config arithmetic over headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.checkpoint import Checkpoint, TensorInfo
from burnish.errors import CheckpointError, UnsupportedModelError
from burnish.families import FAMILIES, describe_student, outline, resolve_config
from claims.moe_to_dense import DEEPSEEK_V2_LITE, GPT_OSS_20B, QWEN3_30B_A3B
from tests.conftest import FAMILIES as NAMES
from tests.conftest import TinyModel


@pytest.mark.parametrize(
    ("config", "teacher_parameters", "student_parameters", "width", "architecture"),
    [
        (QWEN3_30B_A3B, 30_532_122_624, 3_340_449_792, 6144, "Qwen3ForCausalLM"),
        (DEEPSEEK_V2_LITE, 15_706_484_224, 2_659_708_416, 11264, "DeepseekV2ForCausalLM"),
        (GPT_OSS_20B, 20_914_757_184, 4_185_089_880, 11520, "GptOssForCausalLM"),
    ],
    ids=["qwen3", "deepseek", "gpt-oss"],
)
def test_parameter_counts_of_the_released_students(
    config: dict[str, Any], teacher_parameters: int, student_parameters: int, width: int, architecture: str
) -> None:
    teacher = outline(config)
    assert sum(tensor.nbytes // 2 for tensor in teacher.tensors.values()) == teacher_parameters
    family = FAMILIES[config["model_type"]]
    student = describe_student(teacher, family, resolve_config(config), config["num_experts_per_tok"])
    assert student.num_parameters == student_parameters
    assert student.width == width and student.twin.architecture == architecture


@pytest.mark.parametrize("name", NAMES)
def test_u4_2_every_source_tensor_is_converted_copied_or_dropped(name: str, tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model(name))
    config = resolve_config(teacher.config)
    student = describe_student(teacher, FAMILIES[name], config, FAMILIES[name].shape(config).top_k)
    copied = {tensor.copy_of for tensor in student.tensors if tensor.copy_of}
    assert len(copied) + len(student.converted) + len(student.dropped) == len(teacher.tensors)
    assert copied | student.converted | student.dropped == teacher.tensors.keys()


@pytest.mark.parametrize("name", NAMES)
def test_oracle_14_a_plain_dense_student_has_no_expert_router_or_moe_key(name: str, tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model(name))
    config = resolve_config(teacher.config)
    student = describe_student(teacher, FAMILIES[name], config, FAMILIES[name].shape(config).top_k)
    if student.twin.kind == "dense":
        for tensor in student.tensors:
            assert not any(word in tensor.name for word in ("expert", "router", "mlp.gate.weight")), tensor.name
        moe_keys = [key for key in student.config if "expert" in key or "moe" in key or "topk" in key]
        assert moe_keys == [] and "num_experts_per_tok" not in json.dumps(student.config)
    else:
        assert student.twin.why and student.config.get("num_local_experts", student.config.get("num_experts")) == 1


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_u5_5_tied_embeddings_stay_tied(name: str, tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model(name, tie_word_embeddings=True))
    config = resolve_config(teacher.config)
    student = describe_student(teacher, FAMILIES[name], config, 2)
    assert student.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in {tensor.name for tensor in student.tensors}


def test_u3_3_a_tensor_without_a_place_is_refused_by_name(tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model("qwen3_moe"))
    odd = "model.visual.patch_embed.weight"
    teacher.tensors[odd] = TensorInfo(odd, "F32", (4,), Path("none"), 0, 16)
    with pytest.raises(UnsupportedModelError, match=r"model\.visual\.patch_embed\.weight .*no place in Qwen3"):
        describe_student(teacher, FAMILIES["qwen3_moe"], resolve_config(teacher.config), 2)


def test_a_missing_tensor_of_the_dense_class_is_named(tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model("qwen3_moe"))
    del teacher.tensors["model.layers.1.self_attn.q_norm.weight"]
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.q_norm\.weight .*missing"):
        describe_student(teacher, FAMILIES["qwen3_moe"], resolve_config(teacher.config), 2)


def test_layers_with_different_numbers_of_experts_are_refused(tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model("qwen3_moe"))
    for part in ("gate", "up", "down"):
        del teacher.tensors[f"model.layers.2.mlp.experts.7.{part}_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.7\..*8 experts"):
        describe_student(teacher, FAMILIES["qwen3_moe"], resolve_config(teacher.config), 2)


def test_a_model_without_moe_layers_has_nothing_to_densify(tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model("qwen3_moe", mlp_only_layers=[0, 1, 2]))
    with pytest.raises(UnsupportedModelError, match="nothing to densify"):
        describe_student(teacher, FAMILIES["qwen3_moe"], resolve_config(teacher.config), 2)


def test_old_and_new_config_keys_are_both_written(tiny_model: TinyModel) -> None:
    teacher = Checkpoint.open(tiny_model("qwen3_moe"))
    config = resolve_config(teacher.config)
    dense = describe_student(teacher, FAMILIES["qwen3_moe"], config, 2).config
    assert dense["rope_theta"] == dense["rope_parameters"]["rope_theta"]
    assert dense["intermediate_size"] == 24 and dense["head_dim"] == 16


@pytest.mark.parametrize("name", NAMES)
def test_an_outline_has_the_tensors_of_a_saved_model(name: str, tiny_model: TinyModel) -> None:
    saved = Checkpoint.open(tiny_model(name))
    drawn = outline(saved.config, dtype="F32")
    assert {n: t.shape for n, t in drawn.tensors.items()} == {n: t.shape for n, t in saved.tensors.items()}
