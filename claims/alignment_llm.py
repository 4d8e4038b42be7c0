"""Claims of arXiv 2506.01523 ("Alignment as Distribution Learning") and arXiv 2601.08421 ("Coverage Improvement and Fast
Convergence of On-policy Preference Learning") with a real language model.

SmolLM2-135M-Instruct answers Alpaca's instructions in 16 tokens; the reward is four times the sentiment (VADER's
compound, -1 to 1) of the answer, and labels are drawn from its Bradley-Terry model. Every way trains the same LoRA
adapters by the same number of steps on as many answers. The papers' models are 50 times larger, their rewards learned;
what can be seen here is the order of ways.

What is trained is measured once and kept in the scratch directory: `burnish claims run --budget cpu-hours --scratch DIR`
finds it again.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig

from burnish.align.assess import Observed, assess
from burnish.align.labels import reward_labels
from burnish.align.objectives import Bound, objective
from burnish.align.online import StepSampler
from burnish.align.options import RoundOptions
from burnish.align.policy import Policy
from burnish.align.reward import rewards_of
from burnish.align.sample import text_of
from burnish.align.trainer import PreferenceTrainer
from burnish.align.trees import branch_logps, collate
from burnish.checkpoint import Checkpoint
from burnish.runs.claims import Claim, Measurement, Verdict
from burnish.training.adapters import Lora
from burnish.training.base import load_base

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
STEPS, PROMPTS, TOKENS, LR = 20, 8, 16, 1e-3
ROUNDS = 3
HELD_OUT = 96
PROMPTS_PACKAGE, LEXICON_PACKAGE = "llamafactory==0.9.5", "vaderSentiment==3.3.2"


def verdict(whole: bool, part: bool) -> Verdict:
    return "reproduced" if whole else "partly" if part else "not reproduced"


def fetched(package: str, scratch: Path, *options: str) -> Path:
    """A file of the registry, downloaded once."""
    name, _, version = package.partition("==")
    found = [*scratch.glob(f"{name}-{version}*")]
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(scratch)]
        subprocess.run([*command, package], check=True)
        found = [*scratch.glob(f"{name}-{version}*")]
    return found[0]


@cache
def instructions(scratch: Path) -> list[list[dict[str, str]]]:
    """Short instructions of Alpaca as chats; the last HELD_OUT are not trained on."""
    source = fetched(PROMPTS_PACKAGE, scratch, "--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(source) as archive:
        file = archive.extractfile("llamafactory-0.9.5/data/alpaca_en_demo.json")
        assert file is not None
        rows = json.load(file)
    texts = [row["instruction"] + ("\n\n" + row["input"] if row["input"] else "") for row in rows]
    return [[{"role": "user", "content": text}] for text in texts if len(text) < 160]


@cache
def sentiment(scratch: Path) -> Callable[[Sequence[Any], Sequence[str]], list[float]]:
    """The reward of answers."""
    folder = scratch / "vader"
    if not folder.exists():
        with zipfile.ZipFile(fetched(LEXICON_PACKAGE, scratch)) as archive:
            archive.extractall(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    analyzer = importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    return lambda prompts, texts: [4 * analyzer.polarity_scores(text)["compound"] for text in texts]


@cache
def model_directory() -> Path:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    found = importlib.import_module("tests.smollm2").original()
    if isinstance(found, str):
        raise SystemExit(found)
    return Path(found)


class Bench:
    """What all ways share: the model with fresh adapters, prompts, reward, and how the outcome is seen."""

    def __init__(self, scratch: Path, seed: int) -> None:
        directory = model_directory()
        torch.set_num_threads(1)
        self.scratch, self.seed = scratch, seed
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        lora = Lora(rank=16, alpha=32, targets=("q_proj", "v_proj"), seed=seed)
        device = torch.device("cpu")
        self.model = load_base(Checkpoint.open(directory), "bfloat16", device, lora=lora, trust=False)
        self.policy = Policy(self.model, self.tokenizer)
        chats = instructions(scratch)
        self.held_out = chats[-HELD_OUT:]
        order = torch.randperm(len(chats) - HELD_OUT, generator=torch.Generator().manual_seed(seed)).tolist()
        self.chats = [chats[place] for place in order[: STEPS * PROMPTS]]
        self.reward = sentiment(scratch)

    def ids(self, chats: Sequence[list[dict[str, str]]]) -> list[list[int]]:
        return [self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]

    def rows(self, part: slice = slice(None)) -> list[dict[str, Any]]:
        chats = self.chats[part]
        return [{"prompt_ids": ids, "row": place} for place, ids in enumerate(self.ids(chats))]

    def labelled(self, part: slice, seed: int) -> list[dict[str, Any]]:
        """Two answers of the policy as it is to each prompt, with a drawn label."""
        chats, rows = self.chats[part], self.rows(part)
        drawn = self.policy.sample([row["prompt_ids"] for row in rows], num_samples=2, seed=seed, **DRAWING)
        rewards = self.rewards(chats, drawn)
        generator = torch.Generator().manual_seed(seed)
        labels = reward_labels("sampled", rewards[:, 0], rewards[:, 1], scale=1.0, generator=generator)
        return [
            row | {"branch_ids": branches, "label": label}
            for row, branches, label in zip(rows, drawn, labels.tolist(), strict=True)
        ]

    def rewards(self, chats: Sequence[Any], drawn: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        flat = [(chat, list(branch)) for chat, branches in zip(chats, drawn, strict=True) for branch in branches]
        texts = [text_of(self.tokenizer, branch) for _, branch in flat]
        return rewards_of(self.reward, [chat for chat, _ in flat], texts).view(len(drawn), -1).double()

    def sampler(self, labels: str) -> StepSampler:
        options = RoundOptions(labels=labels, samples_per_prompt=2, max_new_tokens=TOKENS)  # type: ignore[arg-type]
        return StepSampler(self.tokenizer, self.chats, options, self.reward)

    def train(self, way: Bound, rows: list[dict[str, Any]], rollout: Any = None, *, steps: int = STEPS) -> None:
        args = DPOConfig(
            str(self.scratch / "trainer"), max_steps=steps, per_device_train_batch_size=PROMPTS, learning_rate=LR,
            lr_scheduler_type="constant", use_cpu=True, bf16=True, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, seed=self.seed, data_seed=self.seed,
        )  # fmt: skip
        PreferenceTrainer(
            self.model, way, args=args, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer,
            rollout=rollout,
        ).train()  # fmt: skip
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def outcome(self) -> dict[str, float]:
        """Reward, win rate against the reference's answers, KL to the reference; on held-out prompts."""
        ids = self.ids(self.held_out)
        seen = []
        for of_reference in (False, True):
            drawn = self.policy.sample(ids, num_samples=1, seed=1234, of_reference=of_reference, **DRAWING)
            trees = [{"prompt_ids": prompt, "branch_ids": branches} for prompt, branches in zip(ids, drawn, strict=True)]
            logps, known = (self.policy.logps(trees, of_reference=reference) for reference in (False, True))
            ended = [[branch[-1] in self.policy.ends for branch in branches] for branches in drawn]
            lengths = [[len(branch) for branch in branches] for branches in drawn]
            numbers = (torch.tensor(values, dtype=torch.float64) for values in (logps, known))
            seen.append(
                Observed(torch.tensor(lengths), torch.tensor(ended), *numbers, self.rewards(self.held_out, drawn))
            )
        return assess(*seen)


DRAWING = {"max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 1.0}


def regressed_on_itself(bench: Bench) -> Callable[..., list[dict[str, Any]]]:
    """REBEL's pairs: rewards less 0.05 of the log-ratio to the first model, and the policy that drew them as reference."""
    sampler = bench.sampler("soft")

    @torch.no_grad()
    def drawn(policy: Any, rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        found = sampler(policy, rows, seed)
        batch = collate(found, "padded", pad=bench.policy.ends[0])
        logps = branch_logps(policy, batch).view(len(found), -1)
        with policy.disable_adapter():
            first = branch_logps(policy, batch).view(len(found), -1)
        rewards = torch.tensor([row["rewards"] for row in found]) - 0.05 * (logps - first)
        return [
            row | {"ref_logps": own, "rewards": held}
            for row, own, held in zip(found, logps.tolist(), rewards.tolist(), strict=True)
        ]

    return drawn


@dataclass(frozen=True)
class Way:
    """An objective with the paper's options, and where its answers come from."""

    objective: Bound
    rollout: Callable[[Bench], Any] | None


WAYS = {
    "PD": Way(objective("pd", gamma=0.1, kl=0.05), lambda bench: bench.sampler("soft")),
    "RKL": Way(objective("rkl", gamma=0.01, beta=0.05), lambda bench: bench.sampler("scores")),
    "REBEL": Way(objective("rebel", eta=1.0), regressed_on_itself),
    "RLHF": Way(objective("rlhf", beta=0.05), lambda bench: bench.sampler("scores")),
    "PMLE": Way(objective("pmle", gamma=0.01), None),
    "DPO": Way(objective("dpo", beta=0.05), None),
}


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """What was measured, from a file where it was already."""
    if not file.exists():
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def outcome_of(name: str, scratch: Path, seed: int) -> dict[str, float]:
    """One way, trained and assessed."""

    def measure() -> dict[str, float]:
        bench, way = Bench(scratch, seed), WAYS[name]
        if way.rollout is None:
            bench.train(way.objective, with_reference(bench, bench.labelled(slice(None), seed)))
        else:
            bench.train(way.objective, bench.rows(), way.rollout(bench))
        return bench.outcome()

    found: dict[str, float] = kept(scratch / "alignment" / f"{name}-{seed}.json", measure)
    return found


def rounds_of(way: str, scratch: Path, seed: int) -> list[dict[str, float]]:
    """DPO in rounds, on fresh answers of the policy or on those of the reference; assessed after each."""

    def measure() -> list[dict[str, float]]:
        bench, found = Bench(scratch, seed), []
        size = len(bench.chats) // ROUNDS
        parts = [slice(number * size, (number + 1) * size) for number in range(ROUNDS)]
        of_reference = [bench.labelled(part, seed + 10 * number) for number, part in enumerate(parts)]
        for number, part in enumerate(parts):
            fresh = way == "on-policy" and number > 0
            rows = bench.labelled(part, seed + 10 * number) if fresh else of_reference[number]
            bench.train(WAYS["DPO"].objective, with_reference(bench, rows), steps=size // PROMPTS)
            found.append(bench.outcome())
        return found

    found: list[dict[str, float]] = kept(scratch / "alignment" / f"{way}-{seed}.json", measure)
    return found


def with_reference(bench: Bench, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the log-probabilities of the first model, which stays the reference whatever was trained before."""
    known = bench.policy.logps(rows, of_reference=True)
    return [row | {"ref_logps": logps} for row, logps in zip(rows, known, strict=True)]
