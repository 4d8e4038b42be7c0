"""Peak memory: the same for few layers and many, while observing and while writing (measured in child processes)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from burnish.families import outline
from tests.conftest import save_tokenizer

EXPERTS = 16


def make_teacher(directory: Path, num_layers: int) -> Path:
    """A float32 Qwen3-MoE of random weights with 38 MB of experts a layer.

    Not bfloat16: oneDNN keeps up to 1,024 of its bfloat16 kernels, one for each number of tokens that an expert gets,
    and that cache would be measured here instead of the layers.
    """
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=512, num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=384, vocab_size=96, norm_topk_prob=True,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="float32",
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    save_tokenizer(directory)
    drawn = outline(json.loads((directory / "config.json").read_text()), "F32")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.05 * torch.randn(info.shape, generator=generator) for name, info in drawn.tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def peak(teacher: Path, out: Path, *arguments: str) -> dict[str, Any]:
    code = "import sys; from burnish.cli.main import run; run(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "densify", str(teacher), "--out", str(out), "--json", *arguments],
        check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_u1_1_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, text_file: Path) -> None:
    few, many = make_teacher(tmp_path / "few", 4), make_teacher(tmp_path / "many", 16)
    extra = (many / "model.safetensors").stat().st_size - (few / "model.safetensors").stat().st_size
    assert extra > 450e6  # a leak of the layers could not hide
    data = ["--dataset", str(text_file), "--num-samples", "4", "--max-length", "64"]
    observed = [peak(model, tmp_path / f"{model.name}-plan", "--score", "acp", *data) for model in (few, many)]
    assert observed[1]["peak_rss_bytes"] == pytest.approx(observed[0]["peak_rss_bytes"], rel=0.10)
    plans = [tmp_path / f"{model.name}-plan" / "plan.json" for model in (few, many)]
    written = [
        peak(model, tmp_path / f"{model.name}-out", "--plan", str(plan))
        for model, plan in zip((few, many), plans, strict=True)
    ]
    assert written[1]["peak_rss_bytes"] == pytest.approx(written[0]["peak_rss_bytes"], rel=0.10)
    for result in written:
        expected = result["forecast"]["act_peak_bytes"]
        assert expected == pytest.approx(result["peak_rss_bytes"], rel=0.25)  # U1.3
    kept = (tmp_path / "many-plan" / "model.safetensors").read_bytes()
    assert (tmp_path / "many-out" / "model.safetensors").read_bytes() == kept
