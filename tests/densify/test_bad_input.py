"""Bad input, through the library and through the command: one clear line, the right exit code, nothing written.

Each case makes a model (or other files) that cannot be used and says what the line must hold. Cases that headers,
configs and flags can tell are refused before any weight is read (U9.2).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.checkpoint import Checkpoint
from burnish.cli.main import run
from burnish.densify import densify
from burnish.errors import BurnishError, OutputError
from tests.conftest import VOCABULARY, TinyModel

Options = dict[str, Any]
WEIGHTS = "model.safetensors"
FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.")


class Bad(NamedTuple):
    """A request that must fail: the model, further options, what the line holds, the exit code."""

    model: Path
    options: Options
    says: str
    code: int


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / WEIGHTS)


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))


def shard(model: Path) -> Path:
    """Split a model in two files with an index; gives the second."""
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (2 * i >= len(names))}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, model / file)
    (model / WEIGHTS).unlink()
    edit_json(model / "model.safetensors.index.json", metadata={}, weight_map=files)
    return model / "model-00002-of-00002.safetensors"


def fuse(model: Path) -> None:
    """Rewrite the experts in the fused form: gate_up_proj [E, 2m, d] and down_proj [E, d, m]."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for layer in sorted({match[1] for name in tensors if (match := FUSED.match(name))}):
            block = f"model.layers.{layer}.mlp.experts"
            experts = len([name for name in tensors if name.startswith(block) and "gate_proj" in name])

            def pop(part: str, block: str = block, experts: int = experts) -> torch.Tensor:
                return torch.stack([tensors.pop(f"{block}.{expert}.{part}.weight") for expert in range(experts)])

            tensors[f"{block}.gate_up_proj"] = torch.cat((pop("gate_proj"), pop("up_proj")), dim=1)
            tensors[f"{block}.down_proj"] = pop("down_proj")

    edit_weights(model, edit)


def truncated_shard(model: Path, tmp_path: Path) -> Bad:
    file = shard(model)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 10)
    return Bad(model, {}, r"model-00002-of-00002\.safetensors: truncated: tensor model\.", 1)


def missing_shard(model: Path, tmp_path: Path) -> Bad:
    shard(model).unlink()
    return Bad(model, {}, r"index\.json: tensor .* is said to be in model-00002.*, which does not exist", 1)


def no_weights(model: Path, tmp_path: Path) -> Bad:
    (model / WEIGHTS).unlink()
    return Bad(model, {}, r"expected model\.safetensors or .*found: none", 1)


def no_config(model: Path, tmp_path: Path) -> Bad:
    (model / "config.json").unlink()
    return Bad(model, {}, r"config\.json: cannot be read .*not a Hugging Face checkpoint", 1)


def no_directory(model: Path, tmp_path: Path) -> Bad:
    return Bad(tmp_path / "gone", {}, "gone: no such directory", 1)


def keep_below_top_k(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"keep": 1}, r"keep=1 is less than the router's top_k=2: choose 2 or more", 2)


def keep_above_experts(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"keep": 9}, "keep=9, but a layer has 8 experts: choose 8 or less", 2)


def layer_with_fewer_experts(model: Path, tmp_path: Path) -> Bad:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".2.mlp.experts.7." in name]:
            del tensors[name]

    edit_weights(model, edit)
    return Bad(model, {}, r"expert tensor model\.layers\.2\.mlp\.experts\.7\..* is missing: .*the 8 experts", 1)


def layer_with_more_experts(model: Path, tmp_path: Path) -> Bad:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = "model.layers.1.mlp.experts.{}." + part + ".weight"
            tensors[name.format(8)] = tensors[name.format(7)].clone()

    edit_weights(model, edit)
    return Bad(model, {}, r"tensor model\.layers\.1\.mlp\.experts\.8\.down_proj\.weight and 2 more have no place", 1)


def fused_layer_with_fewer_experts(model: Path, tmp_path: Path) -> Bad:
    fuse(model)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name][:7]}))
    return Bad(model, {}, re.escape(f"tensor {name} has shape [7, 24, 32], config.json implies [8, 24, 32]"), 1)


def fused_layer_with_more_experts(model: Path, tmp_path: Path) -> Bad:
    fuse(model)
    name = "model.layers.0.mlp.experts.down_proj"
    edit_weights(model, lambda tensors: tensors.update({name: torch.cat((tensors[name], tensors[name][:1]))}))
    return Bad(model, {}, re.escape(f"tensor {name} has shape [9, 32, 12], config.json implies [8, 32, 12]"), 1)


def transposed_expert(model: Path, tmp_path: Path) -> Bad:
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].mT}))
    return Bad(model, {}, re.escape(f"tensor {name} has shape [32, 12], config.json implies [12, 32]"), 1)


def no_router(model: Path, tmp_path: Path) -> Bad:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            del tensors[name]

    edit_weights(model, edit)
    return Bad(model, {}, r"no router found, such as model\.layers\.0\.mlp\.gate\.weight", 1)


def dense_model(model: Path, tmp_path: Path) -> Bad:
    changes = dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), ...)
    edit_json(model / "config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"], **changes)
    return Bad(model, {}, "model_type 'qwen3' .*it is dense, nothing to densify", 1)


def no_layer_with_experts(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", mlp_only_layers=[0, 1, 2])
    return Bad(model, {}, "no layer has experts: it is dense, nothing to densify", 1)


def fp8_by_config(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return Bad(model, {}, r"config\.json: the weights are quantised with fp8, .*bfloat16 or float16", 1)


def quantised_without_method(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", quantization_config={"bits": 4})
    return Bad(model, {}, "the weights are quantised with an unknown method", 1)


def quantised_by_name(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", quantization_config="awq")
    return Bad(model, {}, "the weights are quantised with awq", 1)


def int8_experts(model: Path, tmp_path: Path) -> Bad:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    return Bad(model, {}, rf"tensor {re.escape(name)} is I8: quantised weights cannot be read", 1)


def int8_attention(model: Path, tmp_path: Path) -> Bad:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    return Bad(model, {}, rf"tensor {re.escape(name)} is I8: quantised weights cannot be read", 1)


def unknown_family(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", model_type="qwen3_moee")
    says = r"model_type 'qwen3_moee' is not supported; nearest is 'qwen3_moe'; supported: .*\(mixtral\).*\(gpt_oss\)"
    return Bad(model, {}, says, 1)


def broken_config_value(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", hidden_size="wide")
    return Bad(model, {}, r"config\.json: not a valid qwen3_moe config", 1)


def unknown_score(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"score": "doacp"}, r"score='doacp' is unknown: choose one of .*do-acp", 2)


def unknown_grouping(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"grouping": "random"}, "grouping='random' is unknown: choose one of", 2)


def unknown_scaling(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"scaling": "linear"}, "scaling='linear' is unknown: choose one of", 2)


def size_without_unit(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"max_shard_size": "5"}, "size '5': write a positive number with a unit", 2)


def no_samples(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"num_samples": 0}, "num_samples=0: expected 1 or more", 2)


def unknown_dtype(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"dtype": "int8"}, "dtype='int8': choose auto, float32, bfloat16 or float16", 2)


def unknown_device(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"device": "tpu9000"}, "device='tpu9000': expected auto, cpu", 2)


def no_such_text(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"dataset": str(tmp_path / "gone.txt")}, r"gone\.txt: no such file or directory", 1)


def no_tokenizer(model: Path, tmp_path: Path) -> Bad:
    for file in model.glob("tokenizer*"):
        file.unlink()
    return Bad(model, {}, "no tokenizer, none of tokenizer.json", 1)


def token_beyond_the_embedding(model: Path, tmp_path: Path) -> Bad:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": VOCABULARY, "content": "<extra>"})
    file.write_text(json.dumps(content))
    return Bad(model, {}, r"tokenizer\.json: token id 96 has no row in the embedding of 96 rows", 1)


def end_token_beyond_the_embedding(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "generation_config.json", eos_token_id=[2, VOCABULARY])
    return Bad(model, {}, r"generation_config\.json: eos_token_id 96 has no row in the embedding of 96 rows", 1)


def embedding_of_other_size(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", vocab_size=VOCABULARY + 1)
    return Bad(model, {}, r"tensor lm_head\.weight .*expected \[97, 32\], \[96, 32\]", 1)


def vision_tower(model: Path, tmp_path: Path) -> Bad:
    edit_weights(model, lambda tensors: tensors.update({"visual.patch_embed.proj.weight": torch.ones(4, 4)}))
    return Bad(model, {}, r"tensor visual\.patch_embed\.proj\.weight .*no place in Qwen3ForCausalLM", 1)


def multi_token_prediction_head(model: Path, tmp_path: Path) -> Bad:
    edit_weights(model, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(32, 64)}))
    return Bad(model, {}, r"tensor model\.layers\.3\.eh_proj\.weight .*no place in Qwen3ForCausalLM", 1)


def missing_norm(model: Path, tmp_path: Path) -> Bad:
    edit_weights(model, lambda tensors: tensors.pop("model.norm.weight"))
    return Bad(model, {}, r"tensor model\.norm\.weight of Qwen3ForCausalLM: expected \[32\], missing", 1)


def wrapped_names(model: Path, tmp_path: Path) -> Bad:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({f"_orig_mod.{name}": tensors.pop(name)}))
    return Bad(model, {}, r"tensor _orig_mod\.model\.layers\.0.*no place in Qwen3ForCausalLM", 1)


def plan_of(model: Path, tmp_path: Path) -> dict[str, Any]:
    layers = [
        {"layer": layer, "groups": [[0], [1]], "weights": [[1.0], [1.0]], "scales": [0.5, 0.5]} for layer in range(3)
    ]
    return {"family": "qwen3_moe", "num_experts": 8, "top_k": 2, "layers": layers}


def bad_plan(model: Path, tmp_path: Path, says: str, change: Callable[[dict[str, Any]], Any]) -> Bad:
    plan = plan_of(model, tmp_path)
    change(plan)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    return Bad(model, {"plan": str(file)}, says, 1)


def plan_is_corrupt(model: Path, tmp_path: Path) -> Bad:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_of(model, tmp_path))[:-20])
    return Bad(model, {"plan": str(file)}, r"plan\.json: not a plan: ", 1)


def plan_is_missing(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"plan": str(tmp_path / "plan.json")}, r"plan\.json: cannot be read \(No such file", 1)


def plan_with_unknown_key(model: Path, tmp_path: Path) -> Bad:
    says = r"plan\.json: not a plan: layers\.1\.gruops: "
    return bad_plan(model, tmp_path, says, lambda plan: plan["layers"][1].update(gruops=[]))


def plan_of_another_family(model: Path, tmp_path: Path) -> Bad:
    says = "the plan is for mixtral with 8 experts, the model is qwen3_moe with 8"
    return bad_plan(model, tmp_path, says, lambda plan: plan.update(family="mixtral"))


def plan_of_another_depth(model: Path, tmp_path: Path) -> Bad:
    says = r"the plan covers layers \[0, 1\], the model's MoE layers are \[0, 1, 2\]"
    return bad_plan(model, tmp_path, says, lambda plan: plan["layers"].pop())


def plan_with_expert_twice(model: Path, tmp_path: Path) -> Bad:
    says = "plan of layer 1: expert 4 is in two groups"
    return bad_plan(model, tmp_path, says, lambda plan: plan["layers"][1].update(groups=[[4], [4]]))


def plan_with_expert_beyond(model: Path, tmp_path: Path) -> Bad:
    says = r"plan of layer 2: group \[8\] .*needs experts 0\.\.7"
    return bad_plan(model, tmp_path, says, lambda plan: plan["layers"][2].update(groups=[[0], [8]]))


def plan_with_negative_expert(model: Path, tmp_path: Path) -> Bad:
    says = r"plan\.json: not a plan: layers\.0\.groups\.0\.0: "
    return bad_plan(model, tmp_path, says, lambda plan: plan["layers"][0].update(groups=[[-1], [2]]))


def plan_with_unequal_groups(model: Path, tmp_path: Path) -> Bad:
    change = {"groups": [[1]], "weights": [[1.0]], "scales": [1.0]}
    says = "plan of layer 1: 1 groups, the first layer has 2"
    return bad_plan(model, tmp_path, says, lambda plan: plan["layers"][1].update(change))


def statistics_of_another_kind(model: Path, tmp_path: Path) -> Bad:
    save_file({"layers.0.counts": torch.ones(8)}, tmp_path / "routing.safetensors")
    options = {"statistics": str(tmp_path / "routing.safetensors")}
    return Bad(model, options, r"routing\.safetensors: holds no routing statistics", 1)


def statistics_that_are_corrupt(model: Path, tmp_path: Path) -> Bad:
    (tmp_path / "stats.safetensors").write_bytes(b"not safetensors at all")
    return Bad(model, {"statistics": str(tmp_path / "stats.safetensors")}, r"cannot be read as routing statistics", 1)


def corrupt_tokenizer(model: Path, tmp_path: Path) -> Bad:
    (model / "tokenizer.json").write_text("{")
    return Bad(model, {}, r"tokenizer\.json: not valid JSON", 1)


def generation_config_of_another_kind(model: Path, tmp_path: Path) -> Bad:
    (model / "generation_config.json").write_text("[]")
    return Bad(model, {}, r"generation_config\.json: expected a JSON object, found list", 1)


def end_token_that_is_no_number(model: Path, tmp_path: Path) -> Bad:
    (model / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    return Bad(model, {}, r"generation_config\.json: eos_token_id '</s>' has no row", 1)


def no_expert_per_token(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", num_experts_per_tok=0)
    return Bad(model, {}, r"config\.json: 0 experts per token of \d+: not a valid", 1)


def plan_that_is_not_text(model: Path, tmp_path: Path) -> Bad:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    return Bad(model, {"plan": str(tmp_path / "plan.json")}, r"plan\.json: not UTF-8 text", 1)


def family_file_that_is_missing(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"family": str(tmp_path / "mine.py")}, r"mine\.py: no Python file with a family", 1)


def family_file_that_fails(model: Path, tmp_path: Path) -> Bad:
    (tmp_path / "mine.py").write_text("import burnish.nothing_here\n")
    says = r"mine\.py: cannot be run \(ModuleNotFoundError: .*nothing_here"
    return Bad(model, {"family": str(tmp_path / "mine.py")}, says, 1)


def family_file_without_family(model: Path, tmp_path: Path) -> Bad:
    (tmp_path / "mine.py").write_text("FAMILY = 'qwen'\n")
    return Bad(model, {"family": str(tmp_path / "mine.py")}, r"mine\.py: defines no FAMILY of type", 1)


def output_that_exists(model: Path, tmp_path: Path) -> Bad:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("precious")
    return Bad(model, {}, "out: exists already: choose another name, or pass --overwrite", 1)


def output_that_is_a_file(model: Path, tmp_path: Path) -> Bad:
    (tmp_path / "out").write_text("precious")
    return Bad(model, {"overwrite": True}, "out: is a file, expected a directory name", 1)


CHEAP = [value for value in list(globals().values()) if inspect.isfunction(value) and value.__module__ == __name__
         and list(inspect.signature(value).parameters) == ["model", "tmp_path"] and value is not plan_of]  # fmt: skip


def nan_in_a_copied_tensor(model: Path, tmp_path: Path) -> Bad:
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].view(-1)[3].fill_(torch.nan))
    return Bad(model, {}, r"model\.safetensors: tensor model\.norm\.weight has NaN or infinite values", 1)


def infinity_in_an_expert(model: Path, tmp_path: Path) -> Bad:
    name = "model.layers.1.mlp.experts.6.down_proj.weight"
    edit_weights(model, lambda tensors: tensors[name].view(-1)[-1].fill_(torch.inf))
    return Bad(model, {}, rf"model\.safetensors: tensor {re.escape(name)} has NaN or infinite values", 1)


def tied_head_that_differs(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", tie_word_embeddings=True)
    says = r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight, but the two tensors differ"
    return Bad(model, {}, says, 1)


def plan_that_scales_to_nothing(model: Path, tmp_path: Path) -> Bad:
    says = r"tensor model\.layers\.1\.mlp\.down_proj\.weight: all zeros"
    return bad_plan(model, tmp_path, says, lambda plan: plan["layers"][1].update(scales=[0.0, 0.0]))


def cast_that_overflows(model: Path, tmp_path: Path) -> Bad:
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].mul_(1e6))
    return Bad(model, {"dtype": "float16"}, r"tensor model\.norm\.weight has NaN or infinite values", 1)


FOUND_IN_WEIGHTS = [nan_in_a_copied_tensor, infinity_in_an_expert, tied_head_that_differs, plan_that_scales_to_nothing,
                    cast_that_overflows]  # fmt: skip


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A sound model to be spoiled."""
    return Path(shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "model"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command sets its own


def tree(directory: Path) -> dict[str, str]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def flags(options: Options) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def run_both(bad: Bad, tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library raises, and the command prints, the same line; nothing but unfinished work changes on disk."""
    out = tmp_path / "out"
    options = {"dataset": str(text_file), "num_samples": 2, "max_length": 16, **bad.options}
    before = tree(tmp_path)
    with pytest.raises(ValueError if bad.code == 2 else BurnishError) as raised:
        densify(bad.model, out, **options)
    message = " ".join(str(raised.value).split())
    assert re.search(bad.says, message), message
    assert "\n" not in str(raised.value)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(["densify", str(bad.model), "--out", str(out), "--quiet", *flags(options)])
    printed = capfd.readouterr()
    assert ended.value.code == bad.code
    assert printed.err == f"burnish: {message}\n"
    assert printed.out == ""
    after = tree(tmp_path)
    assert {name: mark for name, mark in after.items() if not name.startswith(".out.partial")} == before
    assert out.exists() == any(name.split("/")[0] == "out" for name in before)


@pytest.mark.parametrize("case", CHEAP, ids=lambda case: case.__name__)
def test_u9_2_what_headers_and_flags_can_tell_is_refused_before_a_weight_is_read(
    case: Callable[[Path, Path], Bad],
    model: Path,
    tmp_path: Path,
    text_file: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = case(model, tmp_path)

    def never(*args: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "_read_into", never)
    run_both(bad, tmp_path, text_file, capfd)
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("case", FOUND_IN_WEIGHTS, ids=lambda case: case.__name__)
def test_u4_1_what_only_the_weights_can_tell_is_refused_without_an_output(
    case: Callable[[Path, Path], Bad], model: Path, tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_both(case(model, tmp_path), tmp_path, text_file, capfd)


def test_the_sound_model_and_the_sound_plan_of_these_cases_are_accepted(
    model: Path, tmp_path: Path, text_file: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_of(model, tmp_path)))
    before = tree(model)
    densify(model, tmp_path / "planned", plan=file)
    densify(model, tmp_path / "seen", dataset=str(text_file), num_samples=2, max_length=16)
    fuse(model)
    densify(model, tmp_path / "fused", plan=file)
    shard(model)
    densify(model, tmp_path / "sharded", plan=file)
    assert len(before) == len(tree(model)) - 2
    planned = load_file(tmp_path / "planned" / WEIGHTS)
    for name in ("fused", "sharded"):
        found = load_file(tmp_path / name / WEIGHTS)
        assert found.keys() == planned.keys()
        assert all(torch.equal(found[key], planned[key]) for key in planned)


def test_u5_5_a_stored_head_that_equals_its_tied_embedding_is_dropped_as_redundant(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", tie_word_embeddings=True)
    edit_weights(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    (tmp_path / "plan.json").write_text(json.dumps(plan_of(model, tmp_path)))
    densify(model, tmp_path / "tied", plan=tmp_path / "plan.json")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / WEIGHTS)


def test_u5_5_and_u5_6_an_untied_head_is_kept_and_no_name_has_a_wrapper(model: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan_of(model, tmp_path)))
    densify(model, tmp_path / "untied", plan=tmp_path / "plan.json")
    written, source = load_file(tmp_path / "untied" / WEIGHTS), load_file(model / WEIGHTS)
    assert json.loads((tmp_path / "untied" / "config.json").read_text()).get("tie_word_embeddings", False) is False
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"])
    assert all(name == "lm_head.weight" or name.startswith("model.") for name in written)


def test_a_full_disk_is_refused_before_the_start(
    model: Path, tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    run_both(Bad(model, {}, r"out: needs 0\.00 GB of disk, 0\.00 GB are free", 1), tmp_path, text_file, capfd)
    assert not (tmp_path / ".out.partial").exists()


def test_u13_1_a_dry_run_fails_where_the_run_would(
    model: Path, tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    run_both(Bad(model, {"dry_run": True}, "GB of disk", 1), tmp_path, text_file, capfd)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real)
    before = tree(tmp_path)
    options = {"dataset": str(text_file), "num_samples": 2, "max_length": 16, "dry_run": True}
    with pytest.raises(SystemExit) as ended:
        run(["densify", str(model), "--out", str(tmp_path / "out"), *flags(options)])
    assert ended.value.code == 0
    assert "dry run, nothing written" in capfd.readouterr().out
    assert tree(tmp_path) == before


def test_a_disk_that_fills_up_is_one_line_and_the_next_run_finishes(
    model: Path, tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.write, 50_000

    def write(descriptor: int, piece: memoryview) -> int:
        nonlocal left
        if left < len(piece):
            raise OSError(28, "No space left on device")
        left -= len(piece)
        return real(descriptor, piece)

    options = {"dataset": str(text_file), "num_samples": 2, "max_length": 16, "max_shard_size": "30kB"}
    before = tree(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OutputError, match=r"cannot write model-0000.*the disk is full; [1-9] finished shards"):
            densify(model, tmp_path / "out", **options)
        with pytest.raises(SystemExit) as ended:
            run(["densify", str(model), "--out", str(tmp_path / "out"), "--quiet", *flags(options)])
    printed = capfd.readouterr()
    assert ended.value.code == 1
    assert len(printed.err.splitlines()) == 1 and "the disk is full" in printed.err
    assert not (tmp_path / "out").exists()
    assert tree(model) == before
    densify(model, tmp_path / "out", **options)
    densify(model, tmp_path / "at-once", **options)
    weights = {name: mark for name, mark in tree(tmp_path / "at-once").items() if name != "burnish.json"}
    assert {name: mark for name, mark in tree(tmp_path / "out").items() if name != "burnish.json"} == weights


USAGE = {
    "unknown flag": (["densify", "m", "--out", "o", "--kep", "3"], r"No such option: --kep .*--keep"),
    "unknown with underscore": (["densify", "m", "--out", "o", "--num_sample", "3"], r"--num-sample .*--num-samples"),
    "unknown verb": (["densfy", "m"], r"No such command 'densfy'.*densify"),
    "no output": (["densify", "m"], r"Missing option '--out'"),
    "no model": (["densify", "--out", "o"], r"Missing argument 'model'"),
    "not a number": (["densify", "m", "--out", "o", "--keep", "few"], r"'--keep'.*integer"),
    "flag without a value": (["densify", "m", "--out"], r"--out.* requires an argument"),
    "too many words": (["densify", "m", "n", "--out", "o"], r"unexpected extra argument"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_u9_1_a_mistyped_command_line_is_one_line_with_the_nearest_word(
    case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words, says = USAGE[case]
    with pytest.raises(SystemExit) as ended:
        run(words)
    printed = capfd.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("burnish: ") and printed.err.count("\n") == 1
    assert re.search(says, printed.err), printed.err
    assert re.search(r"; see burnish( densify)? --help$", printed.err)


def test_u13_3_interruption_says_how_to_go_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("burnish.densify.densify", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(["densify", "m", "--out", "o"])
    assert ended.value.code == 130
    assert capfd.readouterr().err == "burnish: interrupted; run the same command again to go on where it stopped\n"


def test_debug_shows_the_traceback_of_any_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BurnishError, match="no such directory"):
        run(["densify", str(tmp_path / "gone"), "--out", str(tmp_path / "out"), "--debug"])


@pytest.mark.parametrize(("words", "code"), [(["--keep", "1"], 2), (["--score", "sf"], 1), (["--kep", "1"], 2)])
def test_the_installed_command_gives_the_same_lines_and_codes(
    words: list[str], code: int, model: Path, tmp_path: Path
) -> None:
    if code == 1:
        (model / WEIGHTS).unlink()
    done = subprocess.run(
        [sys.executable, "-c", "from burnish.cli.main import run; run()", "densify", str(model),
         "--out", str(tmp_path / "out"), *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("burnish: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_inside_the_model_is_refused(model: Path, text_file: Path) -> None:
    before = tree(model)
    for out in (model / "dense", model):
        with pytest.raises(OutputError, match=r"lies in the model's own directory|exists already"):
            densify(model, out, dataset=str(text_file), num_samples=2, max_length=16)
    with pytest.raises(OutputError, match="lies in the model's own directory"):
        densify(model, model, dataset=str(text_file), num_samples=2, max_length=16, overwrite=True)
    assert tree(model) == before


def test_u6_1_what_is_left_behind_is_recorded_and_a_card_in_another_encoding_is_no_obstacle(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    (model / "pytorch_model.bin").write_bytes(b"old weights")
    (model / ".hidden").write_text("x")
    (model / "README.md").write_bytes("---\nlicense: mit\n---\ncaf\xe9".encode("latin-1"))
    result = densify(model, tmp_path / "out", score="sf", dataset=str(text_file), num_samples=2, max_length=16)
    assert result.record["files"]["dropped"] == [".hidden", "pytorch_model.bin"]
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
