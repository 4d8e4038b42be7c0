"""On-policy rounds: sample, label, fit, and again from the better policy, always against the same reference.

What a round does is a sequence of steps on disk. Each writes one file (or the directory of the weights), whole or not
at all, and is computed only where that is not there: a run that was killed goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from burnish.align.assess import Observed, assess, described, finite, variance_unit
from burnish.align.coverage import sample_covariance
from burnish.align.labels import Question, ask, reward_labels
from burnish.align.observe import Observer, Prompt, as_observed, encoded_prompts
from burnish.align.options import RoundOptions
from burnish.align.pairs import Pair, Row, about_pairs, choose_pairs, is_equal, pair_rows, rewards_of_pairs, tree
from burnish.align.policy import Policy
from burnish.align.reward import Reward
from burnish.checkpoint import Staging
from burnish.checkpoint.staging import differences, hash_file, remove_traces
from burnish.data.examples import Messages
from burnish.data.preferences import Preference
from burnish.errors import DataError, OutputError, ResumeMismatchError
from burnish.runs import Progress, write_json
from burnish.runs.environment import package_versions
from burnish.runs.resources import write_text

RUN_FILE, LINES_FILE, ROUND_FILE = "rounds.json", "rounds.jsonl", "round.json"
SAMPLES_FILE, SCORES_FILE, PAIRS_FILE, ROWS_FILE = "samples.jsonl", "scores.jsonl", "pairs.jsonl", "rows.jsonl"
DESIGN_FILE, FIT_FILE, PROJECTION_FILE, WEIGHTS = "design.json", "fit.json", "projection.safetensors", "weights"
EVALUATED_SAMPLES = 2
"""Completions of each evaluation prompt: with fewer, covariances within a prompt could not be seen."""
FORMAT = "burnish.rounds/1"


@dataclass(frozen=True)
class Start:
    """Where a fit begins.

    Attributes:
        weights: directory of the weights that the policy has now; None for those at the start of the run.
        work: for checkpoints of the fit: it is there again when a fit that was killed is called again.
    """

    weights: Path | None
    work: Path


class Fit(Protocol):
    """Trains the policy in place."""

    def __call__(self, rows: list[Row], round_number: int, start: Start) -> Mapping[str, float]:
        """Train on rows, and give metrics that depend on nothing but them (no times).

        Args:
            rows: `prompt_ids`, `branch_ids`, `ref_logps`; `label` for pairs, `rewards` where there is a reward.
            round_number: from 0.
            start: the policy has these weights when it is called.
        """


class OnPolicyRounds:
    """Rounds of sampling, labelling and fitting, each an artefact on disk.

    In the directory: `rounds.json` (whose run this is), `rounds.jsonl` (diagnostics before the first round and after
    each, which `burnish report` draws), and for each round a directory `round-000` with its samples, rewards, labels,
    rows and weights, its evaluation and `round.json`. Equal inputs give equal bytes, also after a kill.

    Args:
        out: the directory; unfinished rounds of the same run in it go on.
        policy: what is trained, with the reference that stays.
        fit: trains it.
        prompts: strings, messages, or rows of `burnish.data.preferences.load_prompts`.
        options: how.
        reward: of completions; may be None for labels that people give.
        eval_prompts: what the policy is assessed on; None takes the first `options.eval_prompts` of the prompts.
        fingerprint: what else determines the outcome: files of the models, the reward, options of the fit.
        overwrite: remove what another run left there.
        progress: where progress is shown; silent by default.

    Raises:
        ValueError: labels need a reward, or a prompt is too long for the model.
        ResumeMismatchError: the directory holds rounds of another run; names the fields and both values.
        OutputError: it holds something else.

    Source: arXiv 2601.08421, on-policy DPO with a reference that stays (read in its abstract and in notes about it);
        the samplers by design, the diagnostics and the artefacts are ours.
    """

    def __init__(
        self,
        out: Path,
        policy: Policy,
        fit: Fit,
        prompts: Sequence[str | Messages | Preference],
        *,
        options: RoundOptions | None = None,
        reward: Reward | None = None,
        eval_prompts: Sequence[str | Messages | Preference] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.out, self.policy, self.fit = out, policy, fit
        self.options = options or RoundOptions()
        if reward is None and self.options.labels != "ask":
            raise ValueError(f"labels={self.options.labels!r} needs a reward: give one, or choose labels='ask'")
        self.prompts = encoded_prompts(policy, prompts, self.options.max_new_tokens)
        self.eval_prompts = self.prompts[: self.options.eval_prompts]
        if eval_prompts is not None:
            self.eval_prompts = encoded_prompts(policy, eval_prompts, self.options.max_new_tokens)
        self.observer = Observer(policy, reward, self.options, out / PROJECTION_FILE)
        self.progress = progress or Progress(quiet=True)
        self._current: tuple[Path | None, ...] = ()
        self._claim(dict(fingerprint or {}), overwrite=overwrite)

    def run(self, num_rounds: int) -> list[dict[str, Any]]:
        """Do what is missing of so many rounds, and leave the policy with the weights of the last.

        Returns:
            The lines of `rounds.jsonl`, see `assess`: `rounds` is how many the policy had, `fit` what its fit told.

        Raises:
            LabelsNeededError: people have to label pairs first; run again after that.
            DataError: a reward is not a finite number, or all pairs of a round are of equal completions.
            ValueError: fewer than 1 round.
        """
        if num_rounds < 1:
            raise ValueError(f"rounds={num_rounds}: expected 1 or more")
        # Directions that are fitted to some completions flatter these: so not to those that are assessed.
        self.observer.fit_projection(self._samples(0, self._directory(0)))
        reference = self._assessed(self.out / "reference", None, of_reference=True)
        before = self._assessed(self.out / "start", None)
        lines = [finite({"rounds": 0, **assess(before, reference)})]
        self._tell(lines)
        rows: list[Row] = []
        for number in range(num_rounds):
            directory = self._directory(number)
            fresh = self._rows(number, directory)
            rows = [*rows, *fresh] if self.options.accumulate else fresh
            metrics = self._fitted(number, directory, rows)
            policy = self._assessed(directory / "evaluation", directory / WEIGHTS)
            line = assess(policy, reference, before) | self._about_pairs(directory, reference)
            lines.append(finite({"rounds": number + 1, "rows": len(rows), **line}) | {"fit": metrics})
            self._close(number, directory, lines[-1])
            self._tell(lines)
            before = policy
        self._restore(directory / WEIGHTS)
        return lines

    def _rows(self, number: int, directory: Path) -> list[Row]:
        """What a round brings to train on."""

        def make() -> list[Row]:
            samples = self._samples(number, directory)
            scores = _kept(directory / SCORES_FILE, lambda: self.observer.scored(samples))
            if self.options.labels == "scores":
                places = range(self.options.samples_per_prompt)
                return [tree(sample, score, places) for sample, score in zip(samples, scores, strict=True)]
            chosen = self._pairs(number, directory, samples, scores)
            pairs = [pair for pair in chosen if not is_equal(pair, samples)]
            if not pairs:
                raise DataError(
                    f"round {number}: all {len(chosen)} pairs are of equal completions, which say nothing: raise"
                    " temperature or max_new_tokens"
                )
            return pair_rows(pairs, self._labels(number, directory, pairs, samples, scores), samples, scores)

        return _kept(directory / ROWS_FILE, make)

    def _directory(self, number: int) -> Path:
        """Of a round."""
        directory = self.out / f"round-{number:03}"
        directory.mkdir(exist_ok=True)
        return directory

    def _samples(self, number: int, directory: Path) -> list[Row]:
        """The completions of a round."""

        def draw() -> list[Row]:
            self._restore(self._weights(number))
            return self.observer.drawn(
                [self.prompts[place] for place in self._places(number)],
                num_samples=self.options.samples_per_prompt,
                seed=self._seed("round", number),
                of_reference=self.options.sampler_of(number) == "reference",
            )

        return _kept(directory / SAMPLES_FILE, draw)

    def _pairs(self, number: int, directory: Path, samples: list[Row], scores: list[Row]) -> list[Pair]:
        """Which completions are compared."""

        def make() -> list[Row]:
            options, generator = self.options, self._generator("design", number)
            sampler = options.sampler_of(number)
            pairs, design = choose_pairs(sampler, options.labels, scores, options.samples_per_prompt, generator)
            if design is not None:
                size = len(scores[0]["features"][0])
                told = {"support": len(design.support), "rank": design.rank, "features": size,
                        "leverage": design.leverage, "log_det": design.logdet}  # fmt: skip
                write_json(directory / DESIGN_FILE, told)
                if design.rank < size:
                    self.progress.say(f"round {number}: features span {design.rank} of {size} directions")
            return [{"pair": list(pair)} for pair in pairs]

        return _read_pairs(_kept(directory / PAIRS_FILE, make))

    def _labels(
        self, number: int, directory: Path, pairs: list[Pair], samples: list[Row], scores: list[Row]
    ) -> list[float]:
        """The probability that the first of each pair is preferred."""
        options = self.options
        if options.labels != "ask":
            first, second = rewards_of_pairs(pairs, scores)
            generator = self._generator("labels", number)
            found: list[float] = reward_labels(
                options.labels, first, second, scale=options.label_scale, generator=generator
            ).tolist()
            return found
        different = list(dict.fromkeys(pairs))  # a design may hold a pair more than once
        questions = []
        for at, pair in enumerate(different):
            sample = samples[pair.prompt]
            texts = sample["texts"][pair.first], sample["texts"][pair.second]
            questions.append(Question(f"{number}-{at}", sample["prompt"], *texts))
        answers = dict(zip(different, ask(directory, questions).tolist(), strict=True))
        return [answers[pair] for pair in pairs]

    def _fitted(self, number: int, directory: Path, rows: list[Row]) -> dict[str, Any]:
        """Train, and keep the weights; gives the metrics of the fit."""
        weights = directory / WEIGHTS
        if not weights.is_dir():
            begin = self._weights(number) if self.options.warm_start else None
            staging = Staging(weights, {"rows": xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())})
            self._restore(begin)
            self._current = ()
            metrics = self.fit(rows, number, Start(begin, staging.work))
            shutil.rmtree(staging.files)  # what an earlier try did not finish
            staging.files.mkdir()
            with staging.explaining(WEIGHTS):
                self.policy.save(staging.files)
                write_json(staging.files / FIT_FILE, finite({name: float(value) for name, value in metrics.items()}))
                staging.publish()
        remove_traces(weights)
        told: dict[str, Any] = json.loads((weights / FIT_FILE).read_bytes())
        return told

    def _assessed(self, directory: Path, weights: Path | None, *, of_reference: bool = False) -> Observed:
        """What is seen of the policy with these weights, or of the reference, on the evaluation prompts."""
        directory.mkdir(exist_ok=True)

        def draw() -> list[Row]:
            self._restore(weights)
            # All policies draw with the same random numbers, the reference with others.
            seed = self._seed("reference" if of_reference else "evaluation")
            return self.observer.drawn(
                self.eval_prompts, num_samples=EVALUATED_SAMPLES, seed=seed, of_reference=of_reference
            )

        def score() -> list[Row]:
            scores = self.observer.scored(samples)
            if of_reference:
                return [score | {"logps": score["ref_logps"]} for score in scores]
            self._restore(weights)
            return [row | {"logps": logps} for row, logps in zip(scores, self.policy.logps(samples), strict=True)]

        samples = _kept(directory / SAMPLES_FILE, draw)
        return as_observed(samples, _kept(directory / SCORES_FILE, score))

    def _about_pairs(self, directory: Path, reference: Observed) -> dict[str, float]:
        """What is told of the pairs of a round."""
        if not (directory / PAIRS_FILE).exists():
            return {}
        samples, scores, rows, pairs = (
            _read(directory / name) for name in (SAMPLES_FILE, SCORES_FILE, ROWS_FILE, PAIRS_FILE)
        )
        features = reference.features
        unit = None if features is None else variance_unit(sample_covariance(features))
        told = about_pairs(_read_pairs(pairs), [row["label"] for row in rows], samples, scores, unit)
        if (directory / DESIGN_FILE).exists():
            design = json.loads((directory / DESIGN_FILE).read_bytes())
            told |= {"design_log_det": design["log_det"], "design_rank": float(design["rank"])}
        return told

    def _close(self, number: int, directory: Path, line: dict[str, Any]) -> None:
        """Mark a round as complete."""
        record = {
            "format": FORMAT,
            "round": number,
            "run": hash_file(self.out / RUN_FILE),
            "diagnostics": line,
            "files": {name: hash_file(directory / name) for name in (SAMPLES_FILE, SCORES_FILE, ROWS_FILE)},
        }
        if not (directory / ROUND_FILE).exists():
            write_json(directory / ROUND_FILE, record)

    def _tell(self, lines: list[dict[str, Any]]) -> None:
        """Add the last line to those on disk, unless it is there."""
        file, text = self.out / LINES_FILE, _json_lines(lines)
        if file.exists() and file.read_text(encoding="utf-8").startswith(text):
            return
        write_text(file, text)
        self.progress.say(f"{lines[-1]['rounds']} rounds: {described(lines[-1])}")

    def _places(self, number: int) -> list[int]:
        """Places of the prompts of a round: all of them in turn, in another random order each time."""
        total, size = len(self.prompts), self.options.prompts_per_round or len(self.prompts)
        orders = (
            torch.randperm(total, generator=self._generator("order", turn)).tolist() for turn in itertools.count()
        )
        return list(itertools.islice(itertools.chain.from_iterable(orders), number * size, (number + 1) * size))

    def _weights(self, rounds: int) -> Path | None:
        """Those of the policy after so many rounds."""
        return self.out / f"round-{rounds - 1:03}" / WEIGHTS if rounds else None

    def _restore(self, weights: Path | None) -> None:
        if self._current != (weights,):
            self.policy.restore(weights)
            self._current = (weights,)

    def _seed(self, *purpose: object) -> int:
        return xxhash.xxh3_64_intdigest(repr((self.options.seed, *purpose)).encode()) >> 1

    def _generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*purpose))

    def _claim(self, fingerprint: dict[str, Any], *, overwrite: bool) -> None:
        """Make the directory this run's, or see that it is."""
        wanted = {
            "format": FORMAT,
            "burnish": package_versions()["burnish"],
            "options": asdict(self.options),
            "prompts": _hash(self.prompts),
            "eval_prompts": _hash(self.eval_prompts),
            **fingerprint,
        }
        wanted = json.loads(json.dumps(wanted))
        file = self.out / RUN_FILE
        stored = json.loads(file.read_bytes()) if file.exists() else None
        if stored == wanted:
            return
        if self.out.exists() and overwrite:
            shutil.rmtree(self.out)
        elif stored is not None:
            raise ResumeMismatchError(
                f"{self.out}: holds rounds of another run: {differences(stored, wanted)}: choose another directory, or"
                " pass --overwrite to start anew"
            )
        elif self.out.is_file() or (self.out.is_dir() and any(not _is_partial(path) for path in self.out.iterdir())):
            raise OutputError(f"{self.out}: exists already and holds no rounds: choose another name")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)


def _kept(file: Path, make: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a file, which is made where it is not there."""
    if not file.exists():
        write_text(file, _json_lines(make()))
    return _read(file)


def _read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _json_lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _read_pairs(rows: list[Row]) -> list[Pair]:
    return [Pair(*row["pair"]) for row in rows]


def _hash(prompts: Sequence[Prompt]) -> str:
    return xxhash.xxh3_128_hexdigest(repr([prompt.ids for prompt in prompts]).encode())


def _is_partial(path: Path) -> bool:
    return path.name.endswith(".partial")
