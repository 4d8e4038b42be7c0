"""Train the dense counterpart of the bundled miniature: as many parameters in all, the same text, tokens and order.

It is the teacher of the dense-to-dense baseline: `claims/moe_to_dense.py` prunes it to the shape of the miniature's
dense student and distils that from it. Wider and deeper than the student, as the paper's dense teacher is::

    python examples/train_miniature.py --fetch --text-dir texts
    python examples/train_counterpart.py --text-dir texts --out counterpart

The flags are those of ``train_miniature.py``; ``--out`` receives a Hugging Face directory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from typing import Any

import torch
import train_miniature
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 6, 192, 6, 3, 32
FFN = 740  # brings the total to that of the miniature


def build(tokenizer: Any) -> Qwen3ForCausalLM:
    """A dense Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, intermediate_size=FFN, tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def perplexity(model: Qwen3ForCausalLM, rows: torch.Tensor) -> float:
    """Per token, over windows of the training length."""
    total, count = 0.0, 0
    for batch in rows.split(16):
        logits, targets = model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, save and measure; returns the measurements, which also lie in ``training.json``."""
    args = train_miniature.parse(argv)
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    corpus = train_miniature.prepare(args)
    model = build(corpus.tokenizer)
    run = train_miniature.train(args, model, corpus.rows)
    train_miniature.save(model, corpus.tokenizer, args.out)
    saved = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    documents = [text for texts in corpus.heldout.values() for text in texts]
    heldout = train_miniature.pack(train_miniature.encode(corpus.tokenizer, documents), args.sequence_length)
    run |= {"parameters": saved.num_parameters(), "seed": args.seed, "heldout_perplexity": perplexity(saved, heldout)}
    (args.out / "training.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(args.work_dir)
    print(json.dumps(run, indent=2))
    return run


if __name__ == "__main__":
    main()
