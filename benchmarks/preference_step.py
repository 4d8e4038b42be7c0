"""A step of DPO: ours against TRL's `DPOTrainer`, time and peak memory, at equal losses.

Both sides train the same model (SmolLM2-135M's shape, random weights, with a vocabulary of choice) on the same pairs in
the same order, each in a process of its own, in turns; `results/preference_step.json` grows by one entry::

    python benchmarks/preference_step.py                                       # vocab 49,152, 1,024 tokens, bfloat16
    python benchmarks/preference_step.py --vocab 151936 --length 2048 --lora
    python benchmarks/preference_step.py --device cuda --pairs 8 --vocab 151936 --length 2048

The peer runs as its documentation says is fast: `--peer precompute` has its reference log-probabilities computed before
training, `--peer default` is the trainer as it comes, which keeps a reference model. Times are of optimizer steps after
the first; memory is what the process takes above the libraries, from before the model is built.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "preference_step.json"
BAR = {"memory": 0.6, "time": 1.0, "loss": 1e-4}
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_theta": 100000.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs of random tokens: a prompt, and completions of which the shorter has seven eighths of the tokens."""
    draw = torch.Generator().manual_seed(0)
    prompt = int(arguments.length * arguments.prompt_share)
    rest = arguments.length - prompt

    def tokens(count: int) -> list[int]:
        return torch.randint(3, arguments.vocab, (count,), generator=draw).tolist()

    return [
        {"prompt_ids": tokens(prompt), "chosen_ids": tokens(rest), "rejected_ids": tokens(rest - rest // 8)}
        for _ in range(arguments.pairs * arguments.steps)
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses, seconds of a step and peak memory of one side in this process."""
    import peft
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from burnish.align.trainer import PreferenceTrainer
    from burnish.runs import peak_rss_bytes

    class Encoded(DPOTrainer):  # type: ignore[misc]
        """TRL's trainer on rows that are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    torch.set_num_threads(arguments.threads)
    cuda = arguments.device == "cuda"
    before = 0 if cuda else peak_rss_bytes()
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", vocab_size=arguments.vocab, **SHAPE)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if arguments.side == "peer" and arguments.peer == "default" and not arguments.lora:
            model.save_pretrained(directory)  # where the peer reads its reference from
            model.config._name_or_path = directory
        tokenizer = _tokenizer(PreTrainedTokenizerFast, arguments.vocab)
        args = DPOConfig(
            directory, per_device_train_batch_size=arguments.pairs, max_steps=arguments.steps, logging_steps=1,
            learning_rate=1e-5, lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=not cuda, bf16=arguments.dtype == "bfloat16", max_length=None, seed=0, data_seed=0,
            gradient_checkpointing=arguments.gradient_checkpointing, optim="adamw_torch",
            precompute_ref_log_probs=arguments.peer == "precompute",
        )  # fmt: skip
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        clock = Clock()
        options = {"model": model, "args": args, "processing_class": tokenizer, "callbacks": [clock],
                   "peft_config": lora if arguments.lora else None}  # fmt: skip
        data = rows(arguments)
        trainer: Any
        if arguments.side == "peer":
            trainer = Encoded(train_dataset=Dataset.from_list(data), **options)
        else:
            trees = [{"prompt_ids": row["prompt_ids"], "branch_ids": [row["chosen_ids"], row["rejected_ids"]]}
                     for row in data]  # fmt: skip
            trainer = PreferenceTrainer(objective="dpo", train_dataset=trees, layout=arguments.layout, **options)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"peak_bytes": peak - before, "seconds": statistics.median(seconds), "losses": losses}


def _tokenizer(kind: Any, vocab: int) -> Any:
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return kind(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>",
                bos_token="<s>", eos_token="</s>", unk_token="<unk>")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--length", type=int, default=1_024, help="tokens of a prompt with its longer completion")
    parser.add_argument("--prompt-share", type=float, default=0.5)
    parser.add_argument("--pairs", type=int, default=2, help="in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peer", choices=["precompute", "default"], default="precompute")
    parser.add_argument("--layout", default="auto", help="of ours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the forward pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["peer", "ours"], help="measure one side in this process")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    found: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        one = {}
        for side in ("peer", "ours") if number % 2 == 0 else ("ours", "peer"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if run.returncode:
                raise SystemExit(run.stderr)
            one[side] = json.loads(run.stdout.splitlines()[-1])
        found.append(one)
        print(json.dumps(one), flush=True)
    from burnish.runs import environment

    memory = [one["ours"]["peak_bytes"] / one["peer"]["peak_bytes"] for one in found]
    seconds = [one["ours"]["seconds"] / one["peer"]["seconds"] for one in found]
    losses = max(abs(a - b) for one in found for a, b in zip(one["ours"]["losses"], one["peer"]["losses"], strict=True))
    result = {
        "setting": {key: value for key, value in vars(arguments).items() if key != "side"},
        "rounds": found,
        "memory_ratio": {"median": statistics.median(memory), "min": min(memory), "max": max(memory)},
        "time_ratio": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "loss_difference": losses,
        "bar": BAR,
        "environment": environment(),
    }
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*earlier, result], indent=1) + "\n")
    print(f"memory {result['memory_ratio']}, time {result['time_ratio']}, losses differ by {losses:.1e}; bars {BAR}")


if __name__ == "__main__":
    main()
