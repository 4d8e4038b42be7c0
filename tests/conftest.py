"""Tiny random models of every family, saved as transformers saves them, and a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
# Expert widths are below, above and equal to the hidden size: orientation must not be inferred from it (U4.3).
TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True,
                  "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "intermediate_size": 40,
                  "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24},
    "deepseek_v2": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                    "intermediate_size": 28, "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16,
                    "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                    "num_key_value_heads": 4, "routed_scaling_factor": 1.5, "n_group": 4, "topk_group": 2,
                    "topk_method": "group_limited_greedy"},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 8,
                "sliding_window": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24,
                   "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0,
                   "attention_multiplier": 0.3},
}  # fmt: skip
FAMILIES = list(TINY)

TinyModel = Callable[..., Path]


def build_model(model_type: str, **changes: Any) -> Any:
    """A random model of a family, float32, with weights large enough that experts matter."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**{**COMMON, **TINY[model_type], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.3 if "bias" in name else 0.2)
    return model


def make_router_constant(model: Any) -> None:
    """All router logits 0 and every expert chosen: the mixture is a plain mean, which a dense layer can equal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                part in name for part in (".mlp.gate.", ".router.", ".block_sparse_moe.gate.", "shared_expert_gate")
            ):
                parameter.zero_()


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of VOCABULARY ids: printable ASCII and the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for code in range(32, 32 + VOCABULARY - len(vocabulary)):
        vocabulary.setdefault(chr(code), len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Makes (once) a saved tiny model: `tiny_model("mixtral", constant_router=True, num_experts_per_tok=4)`."""
    made: dict[str, Path] = {}

    def make(model_type: str, *, constant_router: bool = False, **changes: Any) -> Path:
        key = repr((model_type, constant_router, sorted(changes.items())))
        if key not in made:
            model = build_model(model_type, **changes)
            if constant_router:
                make_router_constant(model)
            made[key] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(made[key])
            save_tokenizer(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kilobytes of text that the tiny tokenizer knows."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the expert", "a router", "one layer", "of many", "weights", "are chosen", "by tokens", "42 times,"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (600,), generator=generator)
    file.write_text(" ".join(words[int(pick)] for pick in picks), encoding="utf-8")
    return file


def logits_of(directory: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits of a saved model in plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids).logits


@pytest.fixture
def some_tokens() -> torch.Tensor:
    """[2, 24] token ids."""
    return torch.randint(4, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
