"""A tiny language model over printable characters, a fit of a few lines, and rounds of both, in this or any process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from burnish.align.options import RoundOptions
from burnish.align.policy import Policy
from burnish.align.rounds import OnPolicyRounds, Start
from burnish.align.trees import branch_logps, collate
from tests.conftest import VOCABULARY, save_tokenizer

PROMPTS = [f"{first}{second}" for first in "abcd" for second in "xyz"]


def tiny_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    directory.mkdir(exist_ok=True)
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def tiny_causal(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Weights so large that its distributions are far from uniform."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 64, **sizes, **ids, **changes})
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.35, generator=generator)
    return model


def with_adapters(model: Any, scale: float = 0.0) -> Any:
    """Adapters on the queries and values; `scale` makes their product differ from zero."""
    import peft

    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 1.0).mul_(scale)
    return adapted


def vowels(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """A reward: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


class TinyFit:
    """DPO by plain AdamW. Remembers what it was called with."""

    def __init__(self, policy: Policy, lr: float = 1e-2, steps: int = 2) -> None:
        self.policy, self.lr, self.steps = policy, lr, steps
        self.calls: list[tuple[list[dict[str, Any]], int, Start]] = []

    def __call__(self, rows: list[dict[str, Any]], round_number: int, start: Start) -> dict[str, float]:
        self.calls.append((rows, round_number, start))
        model = self.policy.model
        plain = model.get_base_model() if self.policy.adapters else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)
        reference = torch.tensor([row["ref_logps"] for row in rows])
        labels = torch.tensor([row["label"] for row in rows])
        for _ in range(self.steps):
            logps = branch_logps(plain, collate(rows, "padded", pad=0)).view(-1, 2)
            ratios = logps - reference
            margin = ratios[:, 0] - ratios[:, 1]
            loss = -(labels * F.logsigmoid(margin) + (1 - labels) * F.logsigmoid(-margin)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": loss.item()}


def tiny_rounds(
    out: Path, tokenizer: PreTrainedTokenizerBase, *, lora: bool = False, **changes: Any
) -> tuple[OnPolicyRounds, TinyFit]:
    """Rounds ready to run; what is no option of rounds goes to their constructor."""
    names = ("reward", "eval_prompts", "fingerprint", "overwrite", "progress")
    others = {"reward": vowels} | {name: changes.pop(name) for name in names if name in changes}
    model = tiny_causal()
    policy = Policy(with_adapters(model) if lora else model, tokenizer, batch_size=16)
    fit = TinyFit(policy)
    options = RoundOptions(**{"max_new_tokens": 6, "num_features": 3, **changes})
    return OnPolicyRounds(out, policy, fit, PROMPTS, options=options, **others), fit


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]
