"""Parts that do nothing are found and cut away, and what stays is what was there: all families, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.checkpoint import Checkpoint
from burnish.prune import PrunePlan, Sizes, prune
from tests.conftest import logits_of
from tests.prune.models import DENSE_FAMILIES, Positions, inflate, save_dense, sizes_of

GROWN = {
    "layers": {"layers": 5},
    "neurons": {"intermediate_size": 61},
    "groups": {"kv_heads": 8},
    "hidden": {"hidden_size": 44},
    "everything": {"layers": 4, "intermediate_size": 55, "kv_heads": 5, "hidden_size": 40},
}


def wanted(sizes: Sizes) -> dict[str, int]:
    return sizes.model_dump()


def data(text_file: Path) -> dict[str, Any]:
    return {"dataset": str(text_file), "num_samples": 3, "max_length": 24}


def assert_same_tensors(found: Path, expected: Path) -> None:
    mine, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("grown", GROWN)
@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_u4_4_parts_without_effect_are_found_and_cut_away(
    family: str, grown: str, text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    core = save_dense(tmp_path / "core", family)
    small = sizes_of(core)
    changes = dict(GROWN[grown])
    if "kv_heads" in changes:
        changes["heads"] = changes["kv_heads"] * small.group
    big = small.model_copy(update=changes)
    source = inflate(core, tmp_path / "big", big, Positions(small, big))
    result = prune(source, tmp_path / "out", **wanted(small), **data(text_file))
    assert_same_tensors(tmp_path / "out", core)
    assert result.record["output"]["parameters"] == sum(
        t.numel() for t in load_file(core / "model.safetensors").values()
    )
    expected, ratio = logits_of(source, some_tokens), big.hidden_size / small.hidden_size
    assert expected.std() > 0.1
    if ratio != 1:  # the mean square over fewer channels is larger by the ratio of widths: make up for it in the norms
        file = tmp_path / "out" / "model.safetensors"
        hidden_norm = ("layernorm", "model.norm")
        tensors = load_file(file)
        for name in tensors:
            if any(part in name for part in hidden_norm):
                tensors[name] = tensors[name] * ratio**0.5
        save_file(tensors, file, {"format": "pt"})
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        config["rms_norm_eps"] *= ratio
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits_of(tmp_path / "out", some_tokens), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_u4_4_a_plan_cuts_heads_and_neurons_that_nothing_reads(
    family: str, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    core = save_dense(tmp_path / "core", family)
    small = sizes_of(core)
    big = small.model_copy(update={"heads": 2 * small.heads, "intermediate_size": 70})
    at = Positions(small, big)
    source = inflate(core, tmp_path / "big", big, at, dead_columns=True)
    layers = [{"layer": layer, "heads": at.heads, "neurons": at.neurons} for layer in range(3)]
    plan = PrunePlan(family=family, source=big, target=small, hidden=at.hidden, layers=layers)
    (tmp_path / "plan.json").write_text(plan.to_json())
    prune(source, tmp_path / "out", plan=tmp_path / "plan.json")
    assert_same_tensors(tmp_path / "out", core)
    torch.testing.assert_close(logits_of(tmp_path / "out", some_tokens), logits_of(source, some_tokens),
                               atol=2e-5, rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_pruning_nothing_copies_every_byte(
    family: str, text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    source = save_dense(tmp_path / "source", family)
    record = prune(source, tmp_path / "out", layers=3, **data(text_file)).record
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert b"".join(bytes(p) for p in before.chunks(name)) == b"".join(bytes(p) for p in after.chunks(name)), name
    assert record["counts"] == {
        "read": len(before.tensors),
        "converted": 0,
        "copied": len(before.tensors),
        "dropped": 0,
    }
    config, own = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", source))
    assert {key: value for key, value in config.items() if key != "head_dim"} == {
        key: value for key, value in own.items() if key != "head_dim"
    }
    assert torch.equal(logits_of(tmp_path / "out", some_tokens), logits_of(source, some_tokens))


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_u4_2_every_tensor_is_cut_copied_or_dropped_by_name_and_each_is_where_the_plan_says(
    family: str, text_file: Path, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "source", family)
    sizes = sizes_of(source)
    target = {"layers": 2, "hidden_size": 20, "intermediate_size": 18, "heads": sizes.kv_heads // 2 * sizes.group,
              "kv_heads": sizes.kv_heads // 2}  # fmt: skip
    result = prune(source, tmp_path / "out", **target, **data(text_file))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    plan, counts = result.plan, result.record["counts"]
    assert plan is not None
    kept = [layer.layer for layer in plan.layers]
    gone = next(layer for layer in range(3) if layer not in kept)
    assert result.record["dropped_tensors"] == sorted(name for name in before if f"layers.{gone}." in name)
    assert counts["read"] == len(before) == counts["converted"] + counts["copied"] + counts["dropped"]
    head_dim = json.loads((tmp_path / "out" / "config.json").read_text())["head_dim"]
    hidden = list(plan.hidden)
    for new, layer in enumerate(plan.layers):
        rows = [head * head_dim + c for head in layer.heads for c in range(head_dim)]
        groups = [
            group * head_dim + c for group in sorted({h // sizes.group for h in layer.heads}) for c in range(head_dim)
        ]
        old, mine = f"model.layers.{layer.layer}.", f"model.layers.{new}."
        for name, index in (("self_attn.q_proj", rows), ("self_attn.k_proj", groups), ("self_attn.v_proj", groups),
                            ("mlp.gate_proj", list(layer.neurons)), ("mlp.up_proj", list(layer.neurons))):  # fmt: skip
            assert torch.equal(after[f"{mine}{name}.weight"], before[f"{old}{name}.weight"][index][:, hidden]), name
            if f"{old}{name}.bias" in before:
                assert torch.equal(after[f"{mine}{name}.bias"], before[f"{old}{name}.bias"][index]), name
        for name, index in (("self_attn.o_proj", rows), ("mlp.down_proj", list(layer.neurons))):
            assert torch.equal(after[f"{mine}{name}.weight"], before[f"{old}{name}.weight"][hidden][:, index]), name
        norm = "post_attention_layernorm.weight"
        assert torch.equal(after[mine + norm], before[old + norm][hidden])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:, hidden])


def test_sliding_layers_keep_their_kind_when_others_go(
    text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    core = save_dense(tmp_path / "source", "qwen2", **changes)
    config = json.loads((core / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    sizes = sizes_of(core)
    for kept in ([0, 2], [1, 2]):
        layers = [{"layer": layer, "heads": "0-3", "neurons": "0-31"} for layer in kept]
        target = sizes.model_copy(update={"layers": 2})
        plan = PrunePlan(family="qwen2", source=sizes, target=target, hidden="0-31", layers=layers)
        out = tmp_path / f"out-{kept[0]}"
        prune(core, out, plan=plan)
        written = json.loads((out / "config.json").read_text())
        assert written["layer_types"] == [config["layer_types"][layer] for layer in kept]
        assert written["max_window_layers"] == (1 if 0 in kept else 0)


def test_dtype_casts_every_tensor_and_the_config(text_file: Path, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "source", "qwen3")
    prune(source, tmp_path / "same", intermediate_size=20, **data(text_file))
    prune(source, tmp_path / "cast", intermediate_size=20, dtype="bfloat16", **data(text_file))
    same, cast = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "cast"))
    for name, tensor in same.items():
        assert tensor.dtype == torch.float32 and torch.equal(cast[name], tensor.bfloat16()), name
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_tensors_are_cut_in_pieces(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_dense(tmp_path / "source", "llama")
    target = {"hidden_size": 22, "intermediate_size": 17, "heads": 2, "kv_heads": 1}
    prune(source, tmp_path / "whole", **target, **data(text_file))
    monkeypatch.setattr("burnish.prune.cut.PIECE_BYTES", 1000)  # seven rows of the embedding
    prune(source, tmp_path / "pieces", **target, **data(text_file))
    assert_same_tensors(tmp_path / "pieces", tmp_path / "whole")


def test_shards_and_statistics_can_be_used_again(text_file: Path, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "source", "qwen3")
    first = prune(source, tmp_path / "one", hidden_size=24, **data(text_file))
    statistics = tmp_path / "one" / "statistics" / "activations.safetensors"
    again = prune(source, tmp_path / "many", hidden_size=24, statistics=statistics, max_shard_size="10kB")
    assert again.plan == first.plan and again.record["seconds"]["observe"] < 0.05
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    for name in one.tensors:
        assert torch.equal(one.read(name), many.read(name))


def test_u5_1_output_loads_without_burnish(text_file: Path, tmp_path: Path, some_tokens: torch.Tensor) -> None:
    import subprocess
    import sys

    source = save_dense(tmp_path / "source", "qwen2")
    prune(source, tmp_path / "out", hidden_size=20, heads=2, kv_heads=1, layers=2, **data(text_file))
    code = (
        "import sys; sys.modules['burnish'] = None\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "print(model.config.num_hidden_layers, model(torch.arange(4, 12)[None]).logits.isfinite().all().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True"], done.stderr
