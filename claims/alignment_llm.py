"""Claims about preferences with a real language model: "Alignment as Distribution Learning", arXiv 2506.01523, and
"Coverage Improvement and Fast Convergence of On-policy Preference Learning", arXiv 2601.08421.

SmolLM2-135M-Instruct answers Alpaca's instructions; the reward is four times the sentiment (VADER's compound, -1 to 1)
of an answer, and labels are drawn from its Bradley-Terry model. Every way trains the same adapters by the same number
of steps on as many answers. The papers' models are 50 times larger and their rewards learned: what can be seen here is
the order of the ways. Of the second paper only the abstract could be read.

What is trained is measured once and kept in the scratch directory: `burnish claims run --budget cpu-hours --scratch
DIR` finds it again.
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
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from burnish.align.assess import Observed, assess
from burnish.align.labels import reward_labels
from burnish.align.objectives import Bound, objective
from burnish.align.online import StepSampler
from burnish.align.options import RoundOptions
from burnish.align.policy import Policy
from burnish.align.reward import rewards_of
from burnish.align.sample import text_of
from burnish.align.trees import branch_logps, collate
from burnish.checkpoint import Checkpoint
from burnish.runs.claims import Claim, Measurement, Verdict
from burnish.training.adapters import Lora
from burnish.training.base import load_base

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
ROUNDS = 3
PROMPTS_PACKAGE, LEXICON_PACKAGE = "llamafactory==0.9.5", "vaderSentiment==3.3.2"


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        name: of its results in the scratch directory.
        steps: of each way.
        prompts: in a step.
        tokens: of an answer.
        held_out: prompts that ways are assessed on.
        lr: constant.
        device: "cpu" or "cuda".
    """

    name: str
    steps: int
    prompts: int
    tokens: int
    held_out: int
    lr: float
    device: str

    @property
    def drawing(self) -> dict[str, Any]:
        """How answers are drawn."""
        return {"max_new_tokens": self.tokens, "temperature": 1.0, "top_p": 1.0}


CPU = Scale("cpu", steps=18, prompts=16, tokens=16, held_out=128, lr=1e-3, device="cpu")
H100 = Scale("h100", steps=120, prompts=64, tokens=48, held_out=400, lr=3e-4, device="cuda")


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

    def __init__(self, scratch: Path, scale: Scale, seed: int) -> None:
        directory = model_directory()
        torch.set_num_threads(1)
        self.scratch, self.scale, self.seed = scratch, scale, seed
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        lora = Lora(rank=16, alpha=32, targets=("q_proj", "v_proj"), seed=seed)
        device = torch.device(scale.device)
        self.model = load_base(Checkpoint.open(directory), "bfloat16", device, lora=lora, trust=False)
        self.policy = Policy(self.model, self.tokenizer)
        chats = instructions(scratch)
        self.held_out, rest = chats[-scale.held_out :], chats[: -scale.held_out]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
        self.chats = [rest[place % len(rest)] for place in order[: scale.steps * scale.prompts]]
        self.reward = sentiment(scratch)

    def ids(self, chats: Sequence[list[dict[str, str]]]) -> list[list[int]]:
        return [self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]

    def rows(self, part: slice = slice(None)) -> list[dict[str, Any]]:
        chats = self.chats[part]
        return [{"prompt_ids": ids, "row": place} for place, ids in enumerate(self.ids(chats))]

    def labelled(self, part: slice, seed: int) -> list[dict[str, Any]]:
        """Two answers of the policy as it is to each prompt, with a drawn label."""
        chats, rows = self.chats[part], self.rows(part)
        drawn = self.policy.sample([row["prompt_ids"] for row in rows], num_samples=2, seed=seed, **self.scale.drawing)
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
        options = RoundOptions(labels=labels, samples_per_prompt=2, max_new_tokens=self.scale.tokens)  # type: ignore[arg-type]
        return StepSampler(self.tokenizer, self.chats, options, self.reward)

    def train(self, way: Bound, rows: list[dict[str, Any]], rollout: Any = None, *, steps: int | None = None) -> None:
        from trl import DPOConfig  # not needed to print the board

        from burnish.align.trainer import PreferenceTrainer

        args = DPOConfig(
            str(self.scratch / "trainer"), max_steps=steps or self.scale.steps, learning_rate=self.scale.lr,
            per_device_train_batch_size=self.scale.prompts, lr_scheduler_type="constant",
            use_cpu=self.scale.device == "cpu", bf16=True, gradient_checkpointing=False, report_to=[],
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
            drawn = self.policy.sample(ids, num_samples=1, seed=1234, of_reference=of_reference, **self.scale.drawing)
            trees = [{"prompt_ids": prompt, "branch_ids": found} for prompt, found in zip(ids, drawn, strict=True)]
            logps, known = (self.policy.logps(trees, of_reference=reference) for reference in (False, True))
            ended = [[branch[-1] in self.policy.ends for branch in branches] for branches in drawn]
            lengths = [[len(branch) for branch in branches] for branches in drawn]
            numbers = (torch.tensor(values, dtype=torch.float64) for values in (logps, known))
            seen.append(
                Observed(torch.tensor(lengths), torch.tensor(ended), *numbers, self.rewards(self.held_out, drawn))
            )
        return assess(*seen)


def regressed_on_itself(bench: Bench) -> Callable[..., list[dict[str, Any]]]:
    """REBEL's pairs: the reference is the policy that drew them, and rewards lose 0.05 of its log-ratio to the first
    model."""
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


def outcome_of(name: str, scratch: Path, scale: Scale, seed: int) -> dict[str, float]:
    """One way, trained and assessed."""

    def measure() -> dict[str, float]:
        bench, way = Bench(scratch, scale, seed), WAYS[name]
        if way.rollout is None:
            bench.train(way.objective, with_reference(bench, bench.labelled(slice(None), seed)))
        else:
            bench.train(way.objective, bench.rows(), way.rollout(bench))
        return bench.outcome()

    found: dict[str, float] = kept(scratch / "alignment" / scale.name / f"{name}-{seed}.json", measure)
    return found


def rounds_of(way: str, scratch: Path, scale: Scale, seed: int) -> list[dict[str, float]]:
    """DPO in rounds, on fresh answers of the policy or on those of the reference; assessed after each."""

    def measure() -> list[dict[str, float]]:
        bench, found = Bench(scratch, scale, seed), []
        size = len(bench.chats) // ROUNDS
        parts = [slice(number * size, (number + 1) * size) for number in range(ROUNDS)]
        of_reference = [bench.labelled(part, seed + 10 * number) for number, part in enumerate(parts)]
        for number, part in enumerate(parts):
            fresh = way == "on-policy" and number > 0
            rows = bench.labelled(part, seed + 10 * number) if fresh else of_reference[number]
            bench.train(WAYS["DPO"].objective, with_reference(bench, rows), steps=size // scale.prompts)
            found.append(bench.outcome())
        return found

    found: list[dict[str, float]] = kept(scratch / "alignment" / scale.name / f"{way}-{seed}.json", measure)
    return found


def with_reference(bench: Bench, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the log-probabilities of the first model, which stays the reference whatever was trained before."""
    known = bench.policy.logps(rows, of_reference=True)
    return [row | {"ref_logps": logps} for row, logps in zip(rows, known, strict=True)]


def values(found: list[dict[str, float]], key: str) -> list[float]:
    return [one[key] for one in found]


def mean(found: list[dict[str, float]], key: str) -> float:
    return statistics.fmean(values(found, key))


def shown(found: list[dict[str, float]]) -> str:
    """Win rate, gain in reward and KL: means over seeds, with their range."""

    def one(key: str, form: str) -> str:
        seen = values(found, key)
        return f"{statistics.fmean(seen):{form}} ({min(seen):{form}} to {max(seen):{form}})"

    return f"wins {one('win_rate', '.1%')}, gain {one('gain', '.2f')}, KL {one('kl', '.1f')}"


def by_way(scratch: Path, scale: Scale) -> dict[str, list[dict[str, float]]]:
    return {name: [outcome_of(name, scratch, scale, seed) for seed in SEEDS] for name in WAYS}


def order_of_ways(scratch: Path, scale: Scale) -> Measurement:
    found = by_way(scratch, scale)
    wins = {name: mean(outcomes, "win_rate") for name, outcomes in found.items()}
    beat_offline = all(
        outcome["win_rate"] > offline["win_rate"]
        for name in ("PD", "RKL")
        for outcome, offline in zip(found[name], found["DPO"], strict=True)
    )
    keep_up = min(wins["PD"], wins["RKL"]) >= max(wins["REBEL"], wins["RLHF"]) - 0.03
    return Measurement(
        verdict(beat_offline and keep_up, beat_offline),
        "; ".join(f"{name}: {shown(outcomes)}" for name, outcomes in found.items()),
        {"outcomes": found},
    )


def pmle_stays_near(scratch: Path, scale: Scale) -> Measurement:
    found = by_way(scratch, scale)
    nearer = all(pmle["kl"] < dpo["kl"] for pmle, dpo in zip(found["PMLE"], found["DPO"], strict=True))
    as_good = mean(found["PMLE"], "win_rate") >= mean(found["DPO"], "win_rate") - 0.02
    return Measurement(
        verdict(nearer and as_good, nearer or as_good),
        f"PMLE: {shown(found['PMLE'])}; DPO: {shown(found['DPO'])}",
        {"outcomes": {name: found[name] for name in ("PMLE", "DPO")}},
    )


def on_policy_rounds(scratch: Path, scale: Scale) -> Measurement:
    found = {way: [rounds_of(way, scratch, scale, seed) for seed in SEEDS] for way in ("on-policy", "offline")}
    ends = {way: [course[-1]["reward"] for course in courses] for way, courses in found.items()}
    ahead = all(on > off for on, off in zip(ends["on-policy"], ends["offline"], strict=True))
    in_mean = statistics.fmean(ends["on-policy"]) > statistics.fmean(ends["offline"])
    rising = [statistics.fmean(course[number]["reward"] for course in found["on-policy"]) for number in range(ROUNDS)]
    text = "; ".join(
        f"{way}: "
        + ", ".join(
            f"round {number + 1} reward {mean([course[number] for course in courses], 'reward'):.2f}"
            f" KL {mean([course[number] for course in courses], 'kl'):.1f}"
            for number in range(ROUNDS)
        )
        for way, courses in found.items()
    )
    return Measurement(
        verdict(ahead and rising == sorted(rising), in_mean),
        f"{text}; last rewards by seed {[round(end, 2) for end in ends['on-policy']]} against"
        f" {[round(end, 2) for end in ends['offline']]}",
        {"rounds": found},
    )


def setting(scale: Scale) -> str:
    return (
        f"SmolLM2-135M-Instruct, LoRA of rank 16 on queries and values, Adam at {scale.lr:g}, {scale.steps} steps of"
        f" {scale.prompts} prompts with two answers of {scale.tokens} tokens at temperature 1, bfloat16;"
        f" {scale.held_out} held-out prompts; seeds {', '.join(map(str, SEEDS))}"
    )


def claims_of(scale: Scale, budget: Any, suffix: str = "") -> list[Claim]:
    return [
        Claim(
            name=f"order-of-objectives{suffix}",
            source="arXiv 2506.01523, tables 2 and 3",
            statement="PD and RKL are as good as REBEL and RLHF, and far better than DPO on pairs of the first model.",
            paper_number="TL;DR 2.8B: PD 73.8 %, RKL 73.0, RLHF 72.0, REBEL 71.0, PMLE 49.1, DPO 47.3",
            setting=setting(scale)
            + "; PD gamma 0.1, kl 0.05; RKL 0.01, 0.05; RLHF (leave-one-out, not PPO) and REBEL kl 0.05; PMLE gamma"
            " 0.01, DPO beta 0.05 on pairs that the first model drew; wins against the first model's answer under the"
            " reward",
            reproduced_if="PD and RKL win more than DPO on every seed, and in the mean at most 3 points less than the"
            " better of REBEL and RLHF; partly if the first",
            budget=budget,
            measure=partial(order_of_ways, scale=scale),
        ),
        Claim(
            name=f"pmle-stays-near{suffix}",
            source="arXiv 2506.01523, table 2",
            statement="PMLE stays nearer to the reference than DPO and is no worse.",
            paper_number="KL 31.4 against 64.4, wins 49.1 % against 47.3 % (2.8B)",
            setting=setting(scale) + "; as order-of-objectives",
            reproduced_if="a smaller KL on every seed, and wins in the mean at most 2 points less; partly if one",
            budget=budget,
            measure=partial(pmle_stays_near, scale=scale),
        ),
        Claim(
            name=f"on-policy-beats-offline{suffix}",
            source="arXiv 2601.08421, abstract",
            statement="On-policy DPO with a fixed reference beats offline DPO at equal labels, gaining every round.",
            paper_number="not known",
            setting=setting(scale) + f"; the same steps in {ROUNDS} rounds, DPO beta 0.05, fresh pairs, warm start",
            reproduced_if="a larger last reward than offline on every seed, and a mean reward that rises from round to"
            " round; partly if larger in the mean",
            budget=budget,
            measure=partial(on_policy_rounds, scale=scale),
        ),
    ]


CLAIMS = [*claims_of(CPU, "cpu-hours"), *claims_of(H100, "h100-10min", "-h100")]
