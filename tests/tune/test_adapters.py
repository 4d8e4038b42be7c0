"""Adapters: PEFT's own directory, merged weights that are the same model, and a base that nobody touches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from burnish.errors import UnsupportedModelError
from burnish.tune import TuneResult, replay
from tests.conftest import TinyModel, logits_of
from tests.distill.test_train import hashes, kill
from tests.tune.conftest import ZEROTH, Run

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lora": True, "lr": 1e-2},
    "mezo-bcd": {"lora": True, **ZEROTH, "eps": 1e-2, "lr": 1e-2},
}


@pytest.mark.parametrize("optimizer", OPTIONS)
def test_peft_loads_the_directory_and_the_merged_model_is_the_same(
    optimizer: str, run: Run, llama: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    run(tmp_path / "adapters", **OPTIONS[optimizer])
    run(tmp_path / "merged", **OPTIONS[optimizer], merge=True)
    names = {file.name for file in (tmp_path / "adapters").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "burnish.json"}
    assert not names & {"config.json", "model.safetensors"}
    with torch.inference_mode():
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapters").eval()
        logits = found(some_tokens).logits
        direct = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").eval()(some_tokens).logits
    assert torch.equal(logits, direct)  # the base is found by the name in the config
    assert torch.allclose(logits_of(tmp_path / "merged", some_tokens), logits, atol=1e-4)
    assert (logits - logits_of(llama, some_tokens)).abs().max() > 1e-2


def test_adapters_start_as_nothing_and_alone_are_trained(run: Run, llama: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "out", lora=True, lora_rank=2, lora_alpha=6, lora_targets="v_proj")
    without = run(tmp_path / "other", eval_dataset=None, lora=False, steps=1)
    assert whole.history[0]["eval_nll"] == pytest.approx(
        run(tmp_path / "plain", steps=1).history[0]["eval_nll"], rel=1e-6
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ["v_proj"])
    assert config["base_model_name_or_path"] == str(llama)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 6 and all(".v_proj.lora_" in name for name in tensors)
    assert whole.record["training"]["trained_weights"] == 3 * 2 * (32 + 16)
    assert without.record["training"]["adapters"] is False


@pytest.mark.parametrize("optimizer", OPTIONS)
@pytest.mark.parametrize("point", ["7", "before publishing"])
def test_u2_1_killed_and_run_again_gives_the_same_adapters(
    point: str, optimizer: str, run: Run, tmp_path: Path
) -> None:
    def adapters(out: Path, **changes: Any) -> TuneResult:
        return run(out, **OPTIONS[optimizer] | changes)

    whole = adapters(tmp_path / "whole")
    kill(point, adapters, tmp_path / "out")
    again = adapters(tmp_path / "out")
    assert again.record["training"]["resumed_at_step"] == {"7": 4}.get(point, 12)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert again.history == whole.history


def test_dropout_is_active_with_gradients_alone(run: Run, tmp_path: Path) -> None:
    plain, dropped = (run(tmp_path / str(p), **OPTIONS["adamw"], lora_dropout=p) for p in (0.0, 0.5))
    assert plain.history[-1] != dropped.history[-1]
    plain, dropped = (run(tmp_path / f"z{p}", **OPTIONS["mezo-bcd"], lora_dropout=p) for p in (0.0, 0.5))
    assert plain.history == dropped.history


def test_experts_get_adapters_too(run: Run, tiny_model: TinyModel, tmp_path: Path, some_tokens: torch.Tensor) -> None:
    moe = tiny_model("qwen3_moe")
    run(tmp_path / "adapters", model=moe, **OPTIONS["adamw"])
    run(tmp_path / "merged", model=moe, **OPTIONS["adamw"], merge=True)
    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert any("experts" in name for name in tensors)
    with torch.inference_mode():
        logits = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").eval()(some_tokens).logits
    assert torch.allclose(logits_of(tmp_path / "merged", some_tokens), logits, atol=1e-3)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (its import takes seconds and talks)")
    from transformers import BitsAndBytesConfig

    from tests.conftest import save_tokenizer
    from tests.tune.conftest import save_llama

    # its kernel for CPUs wants multiples of 64
    plain = save_llama(tmp_path_factory.mktemp("plain"), hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    out = tmp_path_factory.mktemp("four-bit")
    model.save_pretrained(out)
    save_tokenizer(out)
    return out


@pytest.mark.parametrize("optimizer", ["mezo", "mezo-bcd"])
def test_adapters_of_a_four_bit_base_are_tuned_without_gradients(
    optimizer: str, run: Run, four_bit: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    options = OPTIONS["mezo-bcd"] if optimizer == "mezo-bcd" else {"lora": True, "eps": 1e-2, "lr": 1e-2}
    result = run(tmp_path / "out", model=four_bit, **options | {"optimizer": optimizer, "steps": 40})
    training = result.record["training"]
    assert training["last_evaluation"]["eval_nll"] < training["first_evaluation"]["eval_nll"] - 0.1
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(four_bit, device_map={"": "cpu"}).eval()
        before = base(some_tokens).logits
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(some_tokens).logits
    assert (found - before).abs().max() > 1e-2
    replay(tmp_path / "out", four_bit, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert hashes(tmp_path / "again")[name] == hashes(tmp_path / "out")[name]


def test_quantised_weights_themselves_are_not_trained(run: Run, llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="its quantised weights cannot be trained: train adapters, --lora"):
        run(tmp_path / "out", model=tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="cannot be merged into"):
        run(tmp_path / "out", model=tmp_path / "model", lora=True, merge=True)
