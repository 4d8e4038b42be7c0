"""Bad input, through the library and through the command: one clear line, the right exit code, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.checkpoint import Checkpoint
from burnish.cli.main import run
from burnish.data import bundled_model
from burnish.errors import BurnishError
from burnish.prune import prune
from tests.prune.models import save_dense

WEIGHTS = "model.safetensors"


class Bad(NamedTuple):
    """A request that must fail: the model, options in the place of `layers=2`, what the line holds, the exit code."""

    model: Path
    options: dict[str, Any]
    says: str
    code: int = 1


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / WEIGHTS)


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...}))


def larger_than_the_source(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"hidden_size": 33}, r"hidden_size=33, but the model has 32: choose 1\.\.32", 2)


def too_many_parameters(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"parameters": "1B"}, r"parameters=1,000,000,000, but the model has 30,080: choose fewer", 2)


def too_few_parameters(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"parameters": 10}, r"parameters=10 cannot be reached: the smallest sizes \(1 layers", 2)


def parameters_without_a_number(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"parameters": "big"}, "parameters='big': write a positive number, such as", 2)


def heads_that_cannot_be_shared(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"heads": 3}, "heads=3 cannot be shared by 2 key-value heads", 2)


def sizes_that_transformers_refuses(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"hidden_size": 30}, "hidden 30, .*transformers refuses such a llama model: .*not a multiple", 2)


def no_target(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {}, r"found none: give one target: parameters, a plan, or sizes \(layers, hidden_size", 2)


def two_targets(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"layers": 2, "parameters": "20K"}, "found sizes and parameters: give one target", 2)


def mixture_of_experts(model: Path, tmp_path: Path) -> Bad:
    says = r"Qwen3-MoE \(qwen3_moe\) is a Mixture-of-Experts: densify it first"
    return Bad(bundled_model(), {"layers": 2}, says)


def unknown_family(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", model_type="gpt2")
    return Bad(model, {"layers": 2}, r"model_type 'gpt2' cannot be pruned; supported: Llama \(llama\), Mistral")


def quantised(model: Path, tmp_path: Path) -> Bad:
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8"})
    return Bad(model, {"layers": 2}, "the weights are quantised, which cannot be pruned")


def int8_weights(model: Path, tmp_path: Path) -> Bad:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    return Bad(model, {"layers": 2}, rf"tensor {re.escape(name)} is I8: quantised weights cannot be read")


def foreign_tensor(model: Path, tmp_path: Path) -> Bad:
    edit_weights(model, lambda tensors: tensors.update({"vision.patch.weight": torch.ones(2)}))
    return Bad(model, {"layers": 2}, r"tensor vision\.patch\.weight and 0 more have no place in LlamaForCausalLM")


def missing_tensor(model: Path, tmp_path: Path) -> Bad:
    edit_weights(model, lambda tensors: tensors.pop("model.layers.2.self_attn.o_proj.bias"))
    return Bad(model, {"layers": 2}, r"tensor model\.layers\.2\.self_attn\.o_proj\.bias .*expected \[32\], missing")


def transposed_tensor(model: Path, tmp_path: Path) -> Bad:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name].mT}))
    return Bad(model, {"layers": 2}, r"down_proj\.weight of LlamaForCausalLM: expected \[32, 48\], \[48, 32\]")


def not_a_number(model: Path, tmp_path: Path) -> Bad:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan

    edit_weights(model, edit)
    return Bad(model, {"hidden_size": 24}, r"tensor model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinite values")


def plan_of_another_model(model: Path, tmp_path: Path) -> Bad:
    other = save_dense(tmp_path / "other", "llama", num_hidden_layers=2)
    prune(other, tmp_path / "other-out", layers=1, num_samples=1, max_length=16)
    return Bad(model, {"plan": tmp_path / "other-out" / "plan.json"}, "the plan is for llama .2 layers")


def plan_that_keeps_only_zeros(model: Path, tmp_path: Path) -> Bad:
    """As when an index list was made for a matrix that is stored the other way round."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][:, :40] = 0

    edit_weights(model, edit)
    prune(model, tmp_path / "given", intermediate_size=40, num_samples=1, max_length=16)
    plan = json.loads((tmp_path / "given" / "plan.json").read_text())
    plan["layers"][0]["neurons"] = "0-39"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(tmp_path / "given")
    return Bad(
        model, {"plan": tmp_path / "plan.json"}, r"tensor model\.layers\.0\.mlp\.down_proj\.weight: only zeros stay"
    )


def statistics_of_another_model(model: Path, tmp_path: Path) -> Bad:
    other = save_dense(tmp_path / "other", "llama", intermediate_size=20)
    prune(other, tmp_path / "other-out", layers=1, num_samples=1, max_length=16)
    statistics = tmp_path / "other-out" / "statistics" / "activations.safetensors"
    return Bad(
        model, {"layers": 2, "statistics": statistics}, r"statistics of another model: 3 layers with .*20, 32, 32"
    )


def no_such_text(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"layers": 2, "dataset": str(tmp_path / "gone.txt")}, r"gone\.txt: no such file")


def unknown_dtype(model: Path, tmp_path: Path) -> Bad:
    return Bad(model, {"layers": 2, "dtype": "int8"}, "dtype='int8': choose auto, float32, bfloat16 or float16", 2)


CASES = [
    larger_than_the_source, too_many_parameters, too_few_parameters, parameters_without_a_number,
    heads_that_cannot_be_shared, sizes_that_transformers_refuses, no_target, two_targets, mixture_of_experts,
    unknown_family, quantised, int8_weights, foreign_tensor, missing_tensor, transposed_tensor, not_a_number,
    plan_of_another_model, plan_that_keeps_only_zeros, statistics_of_another_model, no_such_text, unknown_dtype,
]  # fmt: skip
READS_WEIGHTS = [not_a_number, plan_that_keeps_only_zeros]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: Callable[[Path, Path], Bad], text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bad = case(save_dense(tmp_path / "model", "llama"), tmp_path)
    options = {"dataset": str(text_file), "num_samples": 2, "max_length": 16, **bad.options}
    if case not in READS_WEIGHTS:  # U9.2
        monkeypatch.setattr(Checkpoint, "read", lambda *args, **options: pytest.fail("a weight was read"))
    with pytest.raises(ValueError if bad.code == 2 else BurnishError, match=bad.says):
        prune(bad.model, tmp_path / "out", **options)
    capfd.readouterr()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit) as ended:
        run(["prune", str(bad.model), "--out", str(tmp_path / "out"), "--quiet", *flags])
    printed = capfd.readouterr()
    assert ended.value.code == bad.code
    assert printed.out == "" and printed.err.startswith("burnish: ") and printed.err.count("\n") == 1
    assert re.search(bad.says, printed.err), printed.err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_or_lies_in_the_model_is_refused(text_file: Path, tmp_path: Path) -> None:
    model = save_dense(tmp_path / "model", "llama")
    for out in (model, model / "pruned"):
        with pytest.raises(BurnishError, match=r"exists already|lies in the model's own directory"):
            prune(model, out, layers=2, dataset=str(text_file), num_samples=2, max_length=16)


def test_u13_1_a_dry_run_writes_nothing_and_says_the_sizes(
    text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_dense(tmp_path / "model", "llama")
    with pytest.raises(SystemExit) as ended:
        run(["prune", str(model), "--out", str(tmp_path / "out"), "--parameters", "15_000", "--dry-run",
             "--dataset", str(text_file)])  # fmt: skip
    assert ended.value.code == 0
    printed = capfd.readouterr().out
    assert "dry run, nothing written" in printed and re.search(r"fewer than asked for: \d layers, hidden \d+", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_card_and_record_state_the_recipe(text_file: Path, tmp_path: Path) -> None:
    import yaml

    model = save_dense(tmp_path / "My-Dense", "granite")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Old card\n")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    result = prune(model, tmp_path / "o", parameters="9K", dataset=str(text_file), num_samples=2, max_length=32)
    card = (tmp_path / "o" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["base_model"], front["library_name"]) == ("mit", "My-Dense", "transformers")
    assert f"{result.record['output']['parameters']:,}" in card and "64 tokens" in card and "2407.14679" in card
    assert "more than half in one step is hard to recover" in card and str(tmp_path) not in card
    assert "chat_template.jinja" in result.record["files"]["copied"]
    assert result.record["files"]["changed"] == ["README.md", "config.json"]
    assert result.record == json.loads((tmp_path / "o" / "burnish.json").read_text())
