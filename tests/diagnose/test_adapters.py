"""Spectra of adapters in a model against the full decomposition of what PEFT itself adds to the weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from burnish.diagnose import SpectrumTracker, adapter_spectra
from burnish.errors import OutputError, TrainingError

peft = pytest.importorskip("peft", reason="PEFT makes the adapters of these tests")

WIDTH = 24


class Small(nn.Module):
    """A layer of each kind that an adapter can sit on, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.narrow = nn.Linear(WIDTH, 10)
        self.conv = nn.Conv2d(3, 7, 3)


class Experts(nn.Module):
    """Four experts stacked in one parameter [experts, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 10, WIDTH))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,ti->teo", self.stack, inputs)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


def adapted(model: nn.Module, **options: Any) -> Any:
    """The model with an adapter whose factors are both random."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_()
    return model


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, **sizes))


def truth(layer: Any, adapter: str = "default") -> torch.Tensor:
    """Singular values of what the layer's weight would gain in a merge, convolutions as [out, everything else]."""
    delta = layer.get_delta_weight(adapter).detach().double()
    return torch.linalg.svdvals(delta.flatten(1) if delta.dim() == 4 else delta)[..., : layer.r[adapter]]


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 12 / 4), ({"use_rslora": True}, 12 / math.sqrt(4)), ({"use_dora": True}, 12 / 4)]
)
def test_values_scale_and_kind_are_those_of_the_layer(options: dict[str, Any], scale: float) -> None:
    model = adapted(Small(), target_modules=["narrow"], **options)
    (spectrum,) = adapter_spectra(model)
    layer = model.base_model.model.narrow
    torch.testing.assert_close(spectrum.values, truth(layer), atol=1e-5, rtol=1e-6)
    assert (spectrum.adapter, spectrum.scale) == ("narrow", pytest.approx(scale))
    assert spectrum.dora == ("use_dora" in options)


@pytest.mark.parametrize("kind", ["embed", "conv"])
def test_embeddings_and_convolutions(kind: str) -> None:
    model = adapted(Small(), target_modules=[kind])
    (spectrum,) = adapter_spectra(model)
    torch.testing.assert_close(spectrum.values, truth(getattr(model.base_model.model, kind)), atol=1e-4, rtol=1e-5)


def test_each_expert_of_a_stack_has_its_own_spectrum() -> None:
    model = adapted(Mixture(), target_parameters=["experts.stack"])
    layer = model.base_model.model.experts
    spectra = adapter_spectra(model)
    assert [spectrum.adapter for spectrum in spectra] == [f"experts.stack.{expert}" for expert in range(4)]
    torch.testing.assert_close(torch.stack([s.values for s in spectra]), truth(layer), atol=1e-4, rtol=1e-5)


def test_conv1d_of_gpt2_is_stored_transposed_and_has_the_same_values() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    model = adapted(gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    (spectrum,) = adapter_spectra(model)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    torch.testing.assert_close(spectrum.values, truth(layer), atol=1e-5, rtol=1e-6)


def test_names_are_those_of_the_model_before_it_was_wrapped() -> None:
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"])
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel holds it
    expected = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv"]
    for holder in (model, wrapped, torch.compile(model)):
        assert [spectrum.adapter for spectrum in adapter_spectra(holder)] == expected


def test_only_names_of_wrappers_are_taken_off() -> None:
    inner = nn.Module()
    inner.module = Small()  # a layer that its author named so
    inner.checkpointed = nn.Module()
    inner.checkpointed._checkpoint_wrapped_module = Small()
    names = [spectrum.adapter for spectrum in adapter_spectra(adapted(inner, target_modules=["narrow"]))]
    assert names == ["module.narrow", "checkpointed.narrow"]


SHARDED = """
import json, sys, torch
from torch.distributed.fsdp import fully_shard
from tests.diagnose.test_adapters import adapted, tiny_llama
from burnish.diagnose import SpectrumTracker
torch.distributed.init_process_group("gloo")
model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"])
fully_shard(model)
rank = torch.distributed.get_rank()
assert type(model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight).__name__ == "DTensor"
spectra = SpectrumTracker("sharded").measure(model, 0, write=rank == 0)
json.dump([spectrum.line(0) for spectrum in spectra], open(f"rank{rank}.json", "w"))
torch.distributed.destroy_process_group()
"""


def test_u7_2_sharded_factors_are_gathered_and_one_rank_writes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "script.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = [
        spectrum.line(0) for spectrum in adapter_spectra(adapted(tiny_llama(), target_modules=["q_proj", "v_proj"]))
    ]
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == whole
    assert lines(tmp_path / "sharded") == whole


def test_merging_the_adapter_does_not_change_its_spectrum_and_other_adapters_are_apart() -> None:
    model = adapted(Small(), target_modules=["narrow"])
    before = adapter_spectra(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False))
    assert [spectrum.adapter for spectrum in adapter_spectra(model, "other")] == ["conv"]
    model.merge_adapter()
    assert adapter_spectra(model) == before


def test_a_fresh_adapter_has_no_spectrum_yet() -> None:
    model = peft.get_peft_model(Small(), peft.LoraConfig(r=4, target_modules=["narrow"]))
    (spectrum,) = adapter_spectra(model)
    assert spectrum.singular_values == (0.0,) * 4
    assert spectrum.effective_rank is None


def test_models_without_the_adapter_are_refused_with_those_it_has() -> None:
    with pytest.raises(ValueError, match="nowhere in the model: it has no LoRA layer: add one with PEFT"):
        adapter_spectra(Small())
    with pytest.raises(ValueError, match="adapter='first' is nowhere in the model: its adapters are default"):
        adapter_spectra(adapted(Small(), target_modules=["narrow"]), "first")


def test_factors_that_cannot_be_read_are_refused() -> None:
    three = peft.AdaLoraConfig(init_r=4, target_modules=["narrow"], total_step=10)
    with pytest.raises(ValueError, match="is not LoRA with two factors"):
        adapter_spectra(peft.get_peft_model(Small(), three))
    model = adapted(Small(), target_modules=["narrow"])
    layer = model.base_model.model.narrow
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="narrow: the factors of adapter 'default' hold values that are not finite"):
        adapter_spectra(model)
    layer.lora_B["default"].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="empty here: gather ZeRO-3 partitions first"):
        adapter_spectra(model)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "spectrum.jsonl").read_text().splitlines()]


def train(directory: Path, steps: int, *, every: int = 2, resume: bool = False, **tracker: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids = torch.randint(96, (8, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    tracking = SpectrumTracker(directory, every=every, **tracker)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[tracking])
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def test_a_trainer_writes_start_course_and_end(tmp_path: Path) -> None:
    model = train(tmp_path, 5)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [step for step in (0, 2, 4, 5) for _ in range(4)]
    assert written[-4:] == [spectrum.line(5) for spectrum in adapter_spectra(model)]
    assert written[0]["singular_values"] == [0.0] * 4 and written[0]["effective_rank"] is None


def test_u2_4_a_resumed_training_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    train(tmp_path / "whole", 6)
    train(tmp_path / "resumed", 4)
    with (tmp_path / "resumed" / "spectrum.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5}) + '\n{"step": 5, "adap')  # what a kill leaves behind
    train(tmp_path / "resumed", 6, resume=True)
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")


def test_the_file_of_another_training_is_not_replaced_unasked(tmp_path: Path) -> None:
    train(tmp_path, 1)
    with pytest.raises(OutputError, match=r"spectrum\.jsonl exists: choose another directory, or pass overwrite=True"):
        train(tmp_path, 1)
    train(tmp_path, 2, overwrite=True)
    assert {line["step"] for line in lines(tmp_path)} == {0, 2}


def test_a_loop_of_ones_own_measures_when_it_likes(tmp_path: Path) -> None:
    model = adapted(Small(), target_modules=["narrow"])
    tracker = SpectrumTracker(tmp_path / "run")
    first = tracker.measure(model, 0)
    with torch.no_grad():
        model.base_model.model.narrow.lora_B["default"].weight *= 2
    second = tracker.measure(model, 7)
    torch.testing.assert_close(second[0].values, 2 * first[0].values)
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 7]
    with pytest.raises(ValueError, match="step=7 after step 7: expected ascending steps"):
        tracker.measure(model, 7)
    with pytest.raises(ValueError, match="every=0: expected 1 or more steps"):
        SpectrumTracker(tmp_path, every=0)
