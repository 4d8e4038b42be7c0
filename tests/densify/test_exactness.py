"""Where the router is constant and every expert is used, the dense student must equal the teacher: all families."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.densify import densify
from tests.conftest import FAMILIES, TINY, TinyModel, logits_of

NUM_EXPERTS = {name: next(v for k, v in tiny.items() if k.endswith("experts") and "shared" not in k)
               for name, tiny in TINY.items()}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_u4_4_constant_router_student_equals_teacher(
    family: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    changes = {"num_experts_per_tok": NUM_EXPERTS[family]}
    if family == "deepseek_v2":
        changes |= {"topk_method": "greedy"}
    teacher = tiny_model(family, constant_router=True, **changes)
    result = densify(teacher, tmp_path / "out", score="sf", dataset=str(text_file), num_samples=2, max_length=32)
    expected, got = logits_of(teacher, some_tokens), logits_of(tmp_path / "out", some_tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    for layer in result.plan.layers:
        assert sorted(expert for group in layer.groups for expert in group) == list(range(NUM_EXPERTS[family]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [result.record["output"]["architecture"]]


def rewrite(
    directory: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """A copy of a saved model whose tensors are changed; other files stay."""
    shutil.copytree(directory, target)
    save_file(change(load_file(directory / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-expert tensors -> the 3-D tensors that transformers holds in memory."""
    fused: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, list[torch.Tensor]]] = {}
    for name in sorted(tensors, key=lambda name: [int(p) if p.isdigit() else p for p in name.split(".")]):
        prefix, found, rest = name.partition(".experts.")
        if found:
            matrix = {"w1": "gate", "w3": "up", "w2": "down"}.get(rest.split(".")[1], rest.split(".")[1][:-5])
            parts.setdefault(prefix, {}).setdefault(matrix, []).append(tensors[name])
        else:
            fused[name] = tensors[name]
    for prefix, matrices in parts.items():
        module = prefix.replace("block_sparse_moe", "mlp")
        gate_up = torch.cat((torch.stack(matrices["gate"]), torch.stack(matrices["up"])), dim=1)
        fused[f"{module}.experts.gate_up_proj"] = gate_up
        fused[f"{module}.experts.down_proj"] = torch.stack(matrices["down"])
    return fused


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2"])
def test_both_layouts_on_disk_give_the_same_student(
    family: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    separate = tiny_model(family)
    fused = rewrite(separate, tmp_path / "fused", fuse)
    data = {"score": "acp", "dataset": str(text_file), "num_samples": 2, "max_length": 32}
    first = densify(separate, tmp_path / "a", **data)
    second = densify(fused, tmp_path / "b", **data)
    assert first.plan == second.plan
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_granite_as_published_and_as_in_memory(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj",
                 "router.layer.weight": "router.weight"}  # fmt: skip
        for old, new in names.items():
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return tensors

    published = tiny_model("granitemoe")
    assert any("input_linear" in name for name in load_file(published / "model.safetensors"))
    other = rewrite(published, tmp_path / "memory", rename)
    data = {"score": "sf", "dataset": str(text_file), "num_samples": 2, "max_length": 32}
    densify(published, tmp_path / "a", **data)
    densify(other, tmp_path / "b", **data)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_gpt_oss_in_mxfp4_equals_its_dequantised_form(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    packed: dict[str, torch.Tensor] = {}

    def dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
            experts, columns, rows = tensors[name].shape  # stored as [E, in, out]; MXFP4 as [E, out, in / 32, 16]
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
            tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        plain = {n: t.bfloat16() for n, t in tensors.items() if not n.endswith(("gate_up_proj", "experts.down_proj"))}
        return plain | packed

    teacher = tiny_model("gpt_oss")
    plain = rewrite(teacher, tmp_path / "plain", dequantised)
    mxfp4 = rewrite(teacher, tmp_path / "mxfp4", quantised)
    for directory in (plain, mxfp4):
        config = json.loads((directory / "config.json").read_text()) | {"dtype": "bfloat16"}
        if directory == mxfp4:
            config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
        (directory / "config.json").write_text(json.dumps(config))
    data = {"score": "do-acp", "dataset": str(text_file), "num_samples": 2, "max_length": 32}
    first, second = densify(plain, tmp_path / "a", **data), densify(mxfp4, tmp_path / "b", **data)
    assert first.plan == second.plan
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert first.record["source"]["parameters"] == second.record["source"]["parameters"]


def test_a_mixtral_with_a_window_becomes_mistral(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    teacher = tiny_model("mixtral", constant_router=True, num_experts_per_tok=4, sliding_window=6)
    result = densify(teacher, tmp_path / "o", score="sf", dataset=str(text_file), num_samples=2, max_length=32)
    assert result.record["output"]["architecture"] == "MistralForCausalLM"
    tokens = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits_of(tmp_path / "o", tokens), logits_of(teacher, tokens), atol=2e-5, rtol=1e-5)


def test_a_qwen3_with_a_window_keeps_it_in_every_layer(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    teacher = tiny_model(
        "qwen3_moe", constant_router=True, num_experts_per_tok=8, use_sliding_window=True, sliding_window=6
    )
    densify(teacher, tmp_path / "o", score="sf", dataset=str(text_file), num_samples=2, max_length=32)
    tokens = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits_of(tmp_path / "o", tokens), logits_of(teacher, tokens), atol=2e-5, rtol=1e-5)


def test_layers_that_are_dense_already_may_be_the_wider_ones(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    changes = {"mlp_only_layers": [1], "intermediate_size": 120, "num_experts_per_tok": 8}
    teacher = tiny_model("qwen3_moe", constant_router=True, **changes)
    densify(teacher, tmp_path / "o", score="sf", dataset=str(text_file), num_samples=2, max_length=32)
    torch.testing.assert_close(
        logits_of(tmp_path / "o", some_tokens), logits_of(teacher, some_tokens), atol=2e-5, rtol=1e-5
    )
    weights = load_file(tmp_path / "o" / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (120, 32)
    assert bool(weights["model.layers.0.mlp.up_proj.weight"][96:].any(dim=1).all())  # padding can be trained
    assert not bool(weights["model.layers.0.mlp.down_proj.weight"][:, 96:].any())  # and changes nothing now


def test_a_group_of_one_keeps_its_bits_and_merging_averages(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    teacher = tiny_model("qwen3_moe")
    result = densify(teacher, tmp_path / "o", score="sf", dataset=str(text_file), num_samples=2, max_length=32)
    plan = result.plan.model_copy(
        update={"layers": [
            layer.model_copy(update={"groups": [[3], [0, 5]], "weights": [[1.0], [1.0, 3.0]], "scales": [1.0, 0.5]})
            for layer in result.plan.layers
        ]}
    )  # fmt: skip
    (tmp_path / "edited.json").write_text(plan.to_json())
    densify(teacher, tmp_path / "p", plan=tmp_path / "edited.json")
    source, made = load_file(teacher / "model.safetensors"), load_file(tmp_path / "p" / "model.safetensors")
    prefix = "model.layers.1.mlp"
    for part in ("gate", "up"):
        got = made[f"{prefix}.{part}_proj.weight"]
        assert torch.equal(got[:12], source[f"{prefix}.experts.3.{part}_proj.weight"])
        average = [source[f"{prefix}.experts.{e}.{part}_proj.weight"] for e in (0, 5)]
        torch.testing.assert_close(got[12:], 0.25 * average[0] + 0.75 * average[1])
    down = made[f"{prefix}.down_proj.weight"]
    assert torch.equal(down[:, :12], source[f"{prefix}.experts.3.down_proj.weight"])
    average = [source[f"{prefix}.experts.{e}.down_proj.weight"] for e in (0, 5)]
    torch.testing.assert_close(down[:, 12:], 0.5 * (0.25 * average[0] + 0.75 * average[1]))


def test_merging_is_not_concatenation(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    teacher = tiny_model("qwen3_moe", constant_router=True, num_experts_per_tok=8)
    data = {"score": "sf", "dataset": str(text_file), "num_samples": 2, "max_length": 32}
    wide = densify(teacher, tmp_path / "wide", **data)
    layers = [
        layer.model_copy(update={"groups": [list(range(8))], "weights": [[1.0] * 8], "scales": [1.0]})
        for layer in wide.plan.layers
    ]
    densify(teacher, tmp_path / "merged", plan=wide.plan.model_copy(update={"layers": layers}))
    tokens = torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    difference = (logits_of(tmp_path / "merged", tokens) - logits_of(teacher, tokens)).abs().max()
    assert float(difference) > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_casts_every_tensor_once(dtype: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    teacher = tiny_model("qwen3_moe")
    data = {"score": "sf", "dataset": str(text_file), "num_samples": 2, "max_length": 32}
    densify(teacher, tmp_path / "f", **data)
    densify(teacher, tmp_path / "c", **data, dtype=dtype)
    full, cast = load_file(tmp_path / "f" / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    for name, tensor in full.items():
        assert torch.equal(cast[name], tensor.to(getattr(torch, dtype))), name
    assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == dtype


def test_many_small_shards_hold_the_same_model(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    teacher = tiny_model("qwen3_moe")
    data = {"score": "sf", "dataset": str(text_file), "num_samples": 2, "max_length": 32}
    densify(teacher, tmp_path / "one", **data)
    densify(teacher, tmp_path / "many", **data, max_shard_size="20KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    one = load_file(tmp_path / "one" / "model.safetensors")
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], one[name])
    tokens = torch.randint(4, 90, (1, 8))
    assert torch.equal(logits_of(tmp_path / "many", tokens), logits_of(tmp_path / "one", tokens))


def test_keeping_more_experts_as_blocks_of_their_own_makes_a_wider_student(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    data = {"score": "sf", "dataset": str(text_file), "num_samples": 2, "max_length": 32}
    wide = densify(tiny_model("qwen3_moe"), tmp_path / "w", **data, keep=5, grouping="none")
    merged = densify(tiny_model("qwen3_moe"), tmp_path / "m", **data, keep=5)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["intermediate_size"] == 5 * 12
    assert json.loads((tmp_path / "m" / "config.json").read_text())["intermediate_size"] == 2 * 12
    assert wide.plan.layers[0].scales == [0.2] * 5 and merged.plan.layers[0].scales == [0.5] * 2
