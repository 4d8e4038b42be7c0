"""Preferences in rounds: draw from the policy, label, train, and again, always against the same reference. On a CPU.

The small model that ships with burnish begins sentences, and is rewarded for those about a woman (each "she" or "her").
It is trained twice on as many labels: on pairs that it draws itself in each round, and on pairs that are always drawn
from the reference. With `--out` everything that was drawn, labelled and measured stays on disk, `burnish report
OUT/policy` draws it by round, and the same command again goes on where it was::

    python examples/on_policy_rounds.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from burnish.align.options import RoundOptions
from burnish.align.policy import Policy
from burnish.align.rounds import OnPolicyRounds, Start
from burnish.align.trainer import PreferenceTrainer
from burnish.data import bundled_model

WHO = ("The old man", "A young girl", "The captain", "My dear friend", "His sister", "The king", "That night he")
DOES = ("said that", "was", "went to the", "had never", "looked at", "came")
PROMPTS = [f"{who} {does}" for who in WHO for does in DOES]


def women(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """A reward: one for each "she" or "her"."""
    return [sum(word.strip(".,;!?\"'") in ("she", "her") for word in text.lower().split()) for text in completions]


def train(out: Path, sampler: str, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Rounds whose pairs are drawn by `sampler`; what was measured before the first and after each."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    policy = Policy(AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32), tokenizer)

    def fit(rows: list[dict[str, Any]], round_number: int, start: Start) -> Mapping[str, float]:
        args = DPOConfig(
            str(start.work), num_train_epochs=2, per_device_train_batch_size=12, learning_rate=3e-4, seed=round_number,
            lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = PreferenceTrainer(
            policy.model, "dpo", ref_model=policy.reference, args=args, train_dataset=rows, processing_class=tokenizer
        )
        return {"loss": trainer.train().training_loss}

    options = RoundOptions(
        sampler=sampler, labels="soft", label_scale=4.0, samples_per_prompt=4, max_new_tokens=16, num_features=8,
        seed=seed,
    )  # fmt: skip
    return OnPolicyRounds(out, policy, fit, PROMPTS, options=options, reward=women).run(rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train twice, and print what each round brought."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the rounds in this directory")
    args = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        for sampler in ("policy", "reference"):
            lines = train((args.out or Path(scratch)) / sampler, sampler, args.rounds, args.seed)
            print(f"\npairs of the {sampler}\n  rounds  labels           reward        KL   wins against the reference")
            for line in lines:
                reward = f"{line['reward']:.3f} ± {line['reward_error']:.3f}"
                low, high = (100 * line[f"win_rate_{end}"] for end in ("low", "high"))
                wins = f"{100 * line['win_rate']:.0f} % ({low:.0f} to {high:.0f} %)"
                print(f"  {line['rounds']:>6}{line.get('rows', 0):>8}{reward:>17}{line['kl']:>10.2f}   {wins}")


if __name__ == "__main__":
    main()
