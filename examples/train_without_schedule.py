"""Train a small language model without a schedule: stop whenever you like, every checkpoint is a model to ship.

AMUSE in the Hugging Face `Trainer`, on the bundled text, on a CPU, in seconds. Nothing says in advance how long it
will take: after warmup the learning rate is constant, and what is evaluated and saved is an average that needs no
decay. At last a checkpoint from the middle is loaded as plain transformers loads it, and gives the loss it was saved
with::

    python examples/train_without_schedule.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from burnish.data import bundled_model, bundled_text, token_blocks
from burnish.optim import AMUSE, split_parameters
from burnish.optim.callback import AveragedWeights

LENGTH, BATCH = 64, 16


def build(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of 0.4 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def blocks(tokenizer: PreTrainedTokenizerBase, text: Path, count: int) -> list[dict[str, Tensor]]:
    """Blocks of tokens, each its own label."""
    ids = token_blocks(tokenizer, text, num_samples=count, max_length=LENGTH).input_ids
    return [{"input_ids": row, "labels": row} for row in ids]


def train(out: Path, steps: int, every: int, seed: int) -> Trainer:
    """Train, evaluate and save every so many steps."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    model = build(len(tokenizer))
    print(routing := split_parameters(model))
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        lr_scheduler_type="constant", eval_strategy="steps", eval_steps=every, save_steps=every,
        logging_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, seed=seed,
    )  # fmt: skip
    options = {"params": routing.param_groups(), "lr": 0.02, "warmup_steps": 20, "weight_decay": 0.05}
    trainer = Trainer(
        model,
        arguments,
        train_dataset=blocks(tokenizer, bundled_text("calibration"), min(steps * BATCH, 2500)),
        eval_dataset=blocks(tokenizer, bundled_text("heldout"), 64),
        optimizer_cls_and_kwargs=(AMUSE, options),
        callbacks=[AveragedWeights()],
    )
    trainer.train()
    return trainer


@torch.no_grad()
def loss_of(checkpoint: Path, rows: Sequence[dict[str, Tensor]]) -> float:
    """Nats per token of a checkpoint, as anybody would load it."""
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.stack([row["input_ids"] for row in rows])
    return float(model(input_ids=ids, labels=ids).loss)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the loss along the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=30, help="steps between evaluations and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    with TemporaryDirectory() as folder:
        trainer = train(Path(folder), args.steps, args.every, args.seed)
        seen = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
        print(f"\n{'step':>6}{'held-out loss':>16}{'perplexity':>13}")
        for step, loss in seen.items():
            print(f"{step:>6}{loss:>16.4f}{math.exp(loss):>13.1f}")
        middle = args.every * (args.steps // args.every // 2)
        again = loss_of(Path(folder) / f"checkpoint-{middle}", trainer.eval_dataset)
        print(f"\ncheckpoint-{middle}, loaded without burnish: {again:.4f}")


if __name__ == "__main__":
    main()
