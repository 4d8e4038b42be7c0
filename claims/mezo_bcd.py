"""Claims of "Elucidating Subspace Perturbation in Zeroth-Order Optimization: Theory and Practice at Scale",
arXiv 2501.19099 (MeZO-BCD), and of MeZO, arXiv 2305.17333.

The abstract and the authors' development code are what is known of the first; its theory is reconstructed in
`burnish.diagnose.directions`. The paper tunes OPT-13B for 20,000 steps; here SmolLM2-135M learns to tell two novelists
apart in hundreds of steps, and what a step takes is measured at the shapes of both.

What is tuned stays in the scratch directory: `burnish claims run --budget cpu-hours --scratch DIR` finds it again.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from burnish.diagnose.directions import Alignment, expected_alignment, quadratic_course
from burnish.optim.mezo import MeZO
from burnish.optim.mezo_bcd import MeZOBCD
from burnish.optim.perturbation import Gaussian, LowRank, Perturbation, Rademacher, Sparse, Subspace
from burnish.runs.claims import Claim, Measurement, Verdict

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)


def verdict(whole: bool, part: bool) -> Verdict:
    return "reproduced" if whole else "partly" if part else "not reproduced"


@cache
def neighbour(name: str, folder: str = "claims") -> ModuleType:
    """Another script of this checkout, whose models, texts or sides are used again."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Course:
    """One tuning, looked at every so many steps.

    Attributes:
        steps: at which it was looked at; 0 is the start.
        seconds: of processor time spent in steps until then.
        losses: on held-out passages.
        accuracies: on the same.
    """

    steps: list[int]
    seconds: list[float]
    losses: list[float]
    accuracies: list[float]

    def time_to(self, loss: float) -> float:
        """Seconds until a loss was first seen; infinite if never."""
        return next((time for time, found in zip(self.seconds, self.losses, strict=True) if found <= loss), math.inf)

    def steps_to(self, loss: float) -> float:
        """Steps until a loss was first seen; infinite if never."""
        return next((step for step, found in zip(self.steps, self.losses, strict=True) if found <= loss), math.inf)


@dataclass(frozen=True)
class Way:
    """How to tune.

    Attributes:
        optimizer: called with the model, a learning rate and a seed.
        steps: of a run.
        every: steps between two looks at the held-out loss.
        lr: the first one that is tried.
    """

    optimizer: Callable[..., MeZO]
    steps: int
    every: int
    lr: float


WAYS = {
    "MeZO": Way(MeZO, steps=100, every=10, lr=3e-5),
    "MeZO-BCD": Way(partial(MeZOBCD, interval=10), steps=300, every=20, lr=1e-3),
}
ROWS, LENGTH, HELD_OUT = 8, 32, 128
QUESTION, ANSWERS = "\nThe author is", (" Jane", " Herman")


@dataclass(frozen=True)
class Passages:
    """Passages of two novelists, each followed by the question who wrote it.

    Attributes:
        texts: for each author, tokens to draw passages from.
        question: its tokens.
        answers: Tensor `[2]`, the token that names each author.
    """

    texts: tuple[Tensor, Tensor]
    question: Tensor
    answers: Tensor

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many passages of each: tokens [rows, LENGTH], and the author [rows]."""
        authors = torch.arange(rows) % 2
        size = LENGTH - len(self.question)
        found = []
        for author in authors.tolist():
            text = self.texts[author]
            start = int(torch.randint(len(text) - size, (1,), generator=generator))
            found.append(torch.cat([text[start : start + size], self.question]))
        return torch.stack(found), authors


@cache
def passages(scratch: Path) -> tuple[Passages, Passages]:
    """To learn from, and of other chapters."""
    from transformers import AutoTokenizer

    lora = neighbour("muon_lora")
    lora._novels(scratch)
    tokenizer = AutoTokenizer.from_pretrained(lora._smollm2())

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    answers = torch.cat([tokens(answer) for answer in ANSWERS])
    assert len(answers) == 2
    folder = scratch / "texts"
    chapters = [sorted((folder / "austen").glob("*.txt")), sorted((folder / "moby-dick").glob("*.txt"))]
    held_out = [
        {path for path in chapters[0] if path.name.startswith("northanger")},
        set(chapters[1][-len(chapters[1]) // 5 :]),
    ]

    def part(held: bool) -> Passages:
        texts = [
            tokens("\n".join(path.read_text(encoding="utf-8") for path in paths if (path in kept) == held))
            for paths, kept in zip(chapters, held_out, strict=True)
        ]
        return Passages((texts[0], texts[1]), tokens(QUESTION), answers)

    return part(False), part(True)


def tune(scratch: Path, name: str, lr: float, seed: int) -> Course:
    """One tuning of SmolLM2-135M in bfloat16 on one thread; a finished one is read again."""
    file = scratch / "mezo-bcd" / f"{name.lower()}-{lr:g}-{WAYS[name].steps}-{seed}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(vars(_tuned(scratch, WAYS[name], lr, seed))), encoding="utf-8")
    return Course(**json.loads(file.read_text(encoding="utf-8")))


def _tuned(scratch: Path, way: Way, lr: float, seed: int) -> Course:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    train, held_out = passages(scratch)
    source = neighbour("muon_lora")._smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def answer(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, 0, train.answers].float()

    examined, authors = held_out.draw(HELD_OUT, torch.Generator().manual_seed(0))

    def look() -> tuple[float, float]:
        found = torch.cat([answer(ids) for ids in examined.split(32)])
        return float(nn.functional.cross_entropy(found, authors)), float((found.argmax(-1) == authors).float().mean())

    draw = torch.Generator().manual_seed(seed)
    optimizer = way.optimizer(model, lr=lr, seed=seed)
    course, spent = Course([], [], [], []), 0.0
    for step in range(way.steps + 1):
        if step % way.every == 0:
            for column, value in zip(vars(course).values(), (step, spent, *look()), strict=True):
                column.append(value)
        if step < way.steps:
            ids, wanted = train.draw(ROWS, draw)
            start = time.process_time()
            optimizer.step(lambda: float(nn.functional.cross_entropy(answer(ids), wanted)))  # noqa: B023
            spent += time.process_time() - start
    return course


def best_rate(loss: Callable[[float], float], first: float) -> tuple[float, dict[float, float]]:
    """The learning rate with the lowest loss, and all that were tried: thrice more or less, until it is in between."""
    tried = {lr: loss(lr) for lr in (first, 3 * first)}
    while True:
        best = min(tried, key=tried.__getitem__)
        if min(tried) < best < max(tried):
            return best, tried
        further = float(f"{best / 3 if best == min(tried) else best * 3:.3g}")
        tried[further] = loss(further)


def tunings(scratch: Path) -> dict[str, tuple[float, dict[float, float], list[Course]]]:
    """Each way at its best learning rate: that, the loss of all that were tried, and the course of each seed.

    A rate is tried on seed 0 and goes by the mean of its last three looks.
    """

    def end(name: str, lr: float) -> float:
        return statistics.fmean(tune(scratch, name, lr, SEEDS[0]).losses[-3:])

    found = {}
    for name, way in WAYS.items():
        lr, tried = best_rate(partial(end, name), way.lr)
        found[name] = (lr, tried, [tune(scratch, name, lr, seed) for seed in SEEDS])
    return found


def tuned(found: dict[str, tuple[float, dict[float, float], list[Course]]], **more: Any) -> dict[str, Any]:
    """Details that both comparisons keep."""
    ways = {
        name: {"lr": lr, "tried": tried, "courses": [vars(course) for course in courses]}
        for name, (lr, tried, courses) in found.items()
    }
    return {"ways": ways, "seeds": SEEDS, **more}


def goals(found: dict[str, tuple[float, dict[float, float], list[Course]]]) -> list[float]:
    """Where MeZO ends, by seed: the mean of its last three looks."""
    return [statistics.fmean(course.losses[-3:]) for course in found["MeZO"][2]]


def wall_clock(scratch: Path) -> Measurement:
    """Processor time until the loss where MeZO ends is first seen: MeZO's over MeZO-BCD's, by seed."""
    found = tunings(scratch)
    pairs = list(zip(goals(found), *(found[name][2] for name in WAYS), strict=True))
    ratios = [mezo.time_to(goal) / ours.time_to(goal) for goal, mezo, ours in pairs]
    times = [f"{mezo.time_to(goal):.0f}/{ours.time_to(goal):.0f}" for goal, mezo, ours in pairs]
    number = (
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} times faster (seconds {', '.join(times)}) to the loss"
        f" {', '.join(f'{goal:.3f}' for goal in goals(found))}; lr {', '.join(f'{found[name][0]:g}' for name in WAYS)}"
    )
    return Measurement(
        verdict(min(ratios) >= 2, statistics.fmean(ratios) > 1), number, tuned(found, ratios=ratios, goals=goals(found))
    )


def iteration_complexity(scratch: Path) -> Measurement:
    """Steps until the loss where MeZO ends is first seen: MeZO's over MeZO-BCD's, by seed; 0 if never."""
    found = tunings(scratch)
    pairs = list(zip(goals(found), *(found[name][2] for name in WAYS), strict=True))
    ratios = [mezo.steps_to(goal) / ours.steps_to(goal) for goal, mezo, ours in pairs]
    steps = ", ".join(f"{mezo.steps_to(goal):.0f} and {ours.steps_to(goal):.0f}" for goal, mezo, ours in pairs)
    return Measurement(
        verdict(min(ratios) >= 1 / 2, min(ratios) >= 1 / 4),
        f"MeZO and MeZO-BCD need {steps} steps",
        tuned(found, ratios=ratios, goals=goals(found)),
    )


def time_of_a_step(
    scratch: Path, *, shape: str, device: str = "cpu", rows: int = 8, tokens: int = 32, rounds: int = 6
) -> Measurement:
    """Seconds of a step of MeZO, as published and ours, over those of a step on one block; blocks low to high."""
    torch.set_num_threads(1)
    step = neighbour("mezo_step", "benchmarks")
    model = step.build(shape, torch.device(device), torch.bfloat16)
    times = step.times(model, ["published", "mezo", "bcd", "bcd-prefix"], rounds, rows, tokens)
    seconds = {side: columns["seconds"] for side, columns in times.items()}
    ratios = {
        f"{slow} / {fast}": [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        for slow in ("published", "mezo")
        for fast in ("bcd", "bcd-prefix")
    }
    outside = {side: 1 - sum(columns["forward"]) / sum(columns["seconds"]) for side, columns in times.items()}
    number = ", ".join(
        f"{name} {statistics.fmean(found):.2f} ({min(found):.2f}-{max(found):.2f})" for name, found in ratios.items()
    )
    number += "; outside of the forwards: " + ", ".join(f"{side} {share:.0%}" for side, share in outside.items())
    least = [min(ratios[f"{slow} / bcd"]) for slow in ("published", "mezo")]
    return Measurement(
        verdict(min(least) >= 2, min(least) > 1), number, {"ratios": ratios, "times": times, "outside": outside}
    )


def memory(
    scratch: Path, *, shape: str, device: str = "cpu", rows: int = 8, tokens: int = 32, repeats: int = 3
) -> Measurement:
    """Peak of model and two steps over that of two forward passes, each in processes of their own."""
    step = neighbour("mezo_step", "benchmarks")
    options = {"shape": shape, "device": device, "dtype": "bfloat16", "rows": rows, "tokens": tokens}
    sides = ("two-forwards", "published", "mezo", "bcd", "bcd-in-place")
    peaks = {side: [step.memory_apart(side, **options) for _ in range(repeats)] for side in sides}
    ratios = {
        side: [peak / base for peak, base in zip(found, peaks["two-forwards"], strict=True)]
        for side, found in peaks.items()
    }
    ours = [*ratios["mezo"], *ratios["bcd"]]
    number = ", ".join(f"{side} {min(found):.2f}-{max(found):.2f}" for side, found in list(ratios.items())[1:])
    return Measurement(
        verdict(max(ours) <= 1.15, max(ours) <= 1.5),
        f"times the peak of two forward passes ({max(peaks['two-forwards']) / 1e9:.2f} GB): {number}",
        {"peaks": peaks, "ratios": ratios},
    )


LAYERS = 4


def moved(dtype: torch.dtype, lr: float, seed: int, *, one_block: bool, size: int = 4096, steps: int = 1000) -> Tensor:
    """Where prescribed projected gradients of N(0, 25) take weights of 0.02 N(0, 1), [LAYERS, size], each for `steps`.

    All layers at once and in place, as published, or one layer for 100 steps after the other from its float32 copy.
    """
    draw = torch.Generator().manual_seed(seed)
    start = [(0.02 * torch.randn(size, generator=draw)).to(torch.bfloat16).to(torch.float16) for _ in range(LAYERS)]
    weights = [layer.to(dtype, copy=True) for layer in start]
    named = [(f"layers.{number}.weight", layer) for number, layer in enumerate(weights)]
    eps = 1e-3
    optimizer = (
        MeZOBCD(named, lr, eps=eps, interval=100, seed=seed)
        if one_block
        else MeZO(named, lr, eps=eps, copy=False, seed=seed)
    )
    for gradient in (5 * torch.randn(steps * (LAYERS if one_block else 1), generator=draw)).tolist():
        losses = iter((gradient * eps, -gradient * eps))
        optimizer.step(lambda losses=losses: next(losses))
    return torch.stack([after.double() - before.double() for after, before in zip(weights, start, strict=True)])


HALVES = ((torch.bfloat16, 1e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-7), (torch.float16, 1e-6))


def half_precision(scratch: Path, **shape: int) -> Measurement:
    """Cosine of what half-precision weights move with what float32 weights move, and the ratio of lengths."""
    cosines: dict[str, list[float]] = {}
    lengths: dict[str, list[float]] = {}
    for one_block, way in ((False, "in place"), (True, "block copy")):
        for dtype, lr in HALVES:
            key = f"{str(dtype).removeprefix('torch.')} {lr:g} {way}"
            for seed in SEEDS:
                intended, found = (
                    moved(kind, lr, seed, one_block=one_block, **shape) for kind in (torch.float32, dtype)
                )
                product = float((found * intended).sum() / (found.norm() * intended.norm()))
                cosines.setdefault(key, []).append(product)
                lengths.setdefault(key, []).append(float(found.norm() / intended.norm()))
    smallest = [f"{kind} {lr}" for kind, lr in (("bfloat16", "1e-06"), ("float16", "1e-07"))]
    lost = all(max(cosines[f"{key} in place"]) < 0.1 for key in smallest)
    kept = all(min(cosines[f"{key} block copy"]) > 0.7 for key in smallest)
    number = ", ".join(
        f"{key} {statistics.fmean(found):.3f} ({statistics.fmean(lengths[key]):.2f}x)" for key, found in cosines.items()
    )
    return Measurement(verdict(lost and kept, lost), number, {"cosines": cosines, "lengths": lengths, "seeds": SEEDS})


SIDE = 16
KINDS: dict[str, tuple[Perturbation, bool]] = {
    "full": (Gaussian(), False),
    "signs": (Rademacher(), False),
    "block": (Gaussian(), True),
    "low rank 4": (LowRank(4, interval=1), False),
    "subspace 4": (Subspace(4, interval=1), False),
    "random mask 0.25": (Sparse(0.25, "random"), False),
}
"""Ways to look at LAYERS matrices of SIDE x SIDE; a block is one of them, another one each step."""


def course_of(name: str, curvatures: list[Tensor], lr: float, seed: int, steps: int) -> list[float]:
    """Losses on a quadratic of one way."""
    kind, by_block = KINDS[name]

    def build(named: list[tuple[str, Tensor]]) -> MeZO:
        if by_block:
            return MeZOBCD(named, lr, interval=1, perturbation=kind, seed=seed)
        return MeZO(named, lr, perturbation=kind, seed=seed)

    return quadratic_course(build, curvatures, steps, seed=seed)


def theory(name: str) -> Alignment:
    kind, by_block = KINDS[name]
    gradients = [torch.ones(SIDE, SIDE) for _ in range(LAYERS)]
    return expected_alignment(kind, gradients, blocks=[[index] for index in range(LAYERS)] if by_block else None)


def alignment_and_convergence(scratch: Path, steps: int = 3000) -> Measurement:
    """Rate of convergence on a round quadratic at the best learning rate, over alpha^2 / s."""
    curvatures = [torch.ones(SIDE, SIDE, dtype=torch.float64) for _ in range(LAYERS)]
    ratios = {}
    for name in KINDS:
        expected = theory(name)
        ratios[name] = []
        for seed in SEEDS:
            losses = course_of(name, curvatures, expected.best_step, seed, steps)
            each = [1 - after / before for before, after in itertools.pairwise(losses)]
            ratios[name].append(statistics.fmean(each) / expected.efficiency)
    off = {name: max(abs(ratio - 1) for ratio in found) for name, found in ratios.items()}
    means = {name: abs(statistics.fmean(found) - 1) for name, found in ratios.items()}
    number = ", ".join(
        f"{name} {statistics.fmean(found):.3f} of 1/{1 / theory(name).efficiency:.0f}" for name, found in ratios.items()
    )
    return Measurement(
        verdict(max(off.values()) <= 0.1, max(means.values()) <= 0.1), number, {"ratios": ratios, "seeds": SEEDS}
    )


def similar_convergence(scratch: Path, steps: int = 4000) -> Measurement:
    """Nats that the loss of an ill-conditioned quadratic falls by, each way at its best learning rate."""
    # Curvatures 1, 1/2, 1/3 .. over all numbers, in an order that mixes them.
    count = LAYERS * SIDE * SIDE
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    curvatures = list((1 / (1 + order.double())).view(LAYERS, SIDE, SIDE))

    def fall(name: str, lr: float, seed: int) -> float:
        losses = course_of(name, curvatures, lr, seed, steps)
        return math.log(losses[0] / losses[-1]) if math.isfinite(losses[-1]) else -math.inf

    rates, falls = {}, {}
    for name in KINDS:
        rates[name], _ = best_rate(lambda lr, name=name: -fall(name, lr, SEEDS[0]), 10 * theory(name).best_step)
        falls[name] = [fall(name, rates[name], seed) for seed in SEEDS]
    shares = {
        name: [mine / full for mine, full in zip(found, falls["full"], strict=True)] for name, found in falls.items()
    }
    worst = max(abs(share - 1) for found in shares.values() for share in found)
    number = ", ".join(
        f"{name} {statistics.fmean(found):.2f} at {rates[name] / rates['full']:.2g} times the lr"
        for name, found in shares.items()
        if name != "full"
    )
    return Measurement(
        verdict(worst <= 0.25, worst <= 0.5),
        f"fall of the loss over MeZO's ({statistics.fmean(falls['full']):.2f} nats): {number}",
        {"falls": falls, "rates": rates, "shares": shares, "seeds": SEEDS},
    )


TUNING = (
    f"SmolLM2-135M-Instruct in bfloat16, {ROWS} passages of {LENGTH} tokens a step, by Jane Austen or Herman Melville;"
    " cross-entropy of the next token between both first names; eps 1e-3; MeZO (float32 copy of all weights) 100 steps,"
    " looked at every 10; MeZO-BCD (a layer a block, interval 10, random order) 300 steps, every 20; lr by factors of"
    f" 3, the best mean of the last three looks on seed 0; {HELD_OUT} passages of other chapters; one thread of a"
    " shared CPU, processor time of steps; seeds 0-2"
)
QUADRATIC = (
    f"{LAYERS} matrices of {SIDE} x {SIDE}, float64; full, signs, random block of one matrix, low rank 4 and subspace"
    " of rank 4 anew each step, random mask of a quarter; the package's own optimizers; seeds 0-2"
)
DEVELOPMENT = "the reading of the theory is ours: the paper's text was not at hand"

CLAIMS = [
    Claim(
        name="wall-clock-to-equal-loss",
        source="abstract (v2)",
        statement="MeZO-BCD is up to 2.77 times faster than MeZO in wall-clock time at equal quality (OPT-13B).",
        paper_number="2.77x",
        setting=TUNING,
        reproduced_if="where MeZO ends (mean of its last three looks) is first seen at least 2 times sooner, every"
        " seed; partly if sooner in the mean",
        budget="cpu-hours",
        measure=wall_clock,
    ),
    Claim(
        name="iteration-complexity",
        source="abstract (v2)",
        statement="MeZO-BCD needs comparably many steps as MeZO.",
        paper_number="comparable",
        setting=TUNING,
        reproduced_if="at most 2 times as many steps to where MeZO ends, every seed; partly if at most 4 times",
        budget="cpu-hours",
        measure=iteration_complexity,
    ),
    Claim(
        name="time-of-a-step",
        source="abstract (v1: up to 2.09 times per iteration)",
        statement="A step on one block is about twice as fast as a step of MeZO.",
        paper_number="2.09x",
        setting="SmolLM2-135M's shape, random weights, bfloat16, 8 x 32 tokens, loss of all tokens; one thread,"
        " processor time; six layers from low to high, sides in turn; published loop and ours in place against ours on"
        " a block, and with the layers below the block run once",
        reproduced_if="at least 2 times against both, in every round; partly if above 1",
        budget="cpu-minutes",
        measure=partial(time_of_a_step, shape="smollm2-135m"),
    ),
    Claim(
        name="memory-of-inference",
        source="abstract; MeZO, arXiv 2305.17333, abstract",
        statement="Fine-tuning takes the memory of inference.",
        paper_number="the same",
        setting="SmolLM2-135M's shape, bfloat16, 8 x 32 tokens; peak resident memory of model and two steps over what"
        " the process had before, in a process of its own, three times each",
        reproduced_if="MeZO in place and MeZO-BCD with its float32 copy and noise at most 1.15 times two forward"
        " passes; partly if at most 1.5 times",
        budget="cpu-minutes",
        measure=partial(memory, shape="smollm2-135m"),
    ),
    Claim(
        name="half-precision",
        source="ours: the published settings (float16, lr 1e-7; bfloat16, lr 1e-6) looked at as numbers",
        statement="In half precision, moving weights there and back in place is mostly rounding noise; a float32 copy"
        " of the active block cures it.",
        paper_number="-",
        setting=f"{LAYERS} layers of 4,096 weights of 0.02 N(0, 1), eps 1e-3, projected gradients N(0, 25), 1,000 steps"
        " on each layer; cosine with what the same steps do in float32 (and ratio of lengths); all at once in place,"
        " and blocks of interval 100 with a copy; seeds 0-2",
        reproduced_if="at bfloat16 1e-6 and float16 1e-7 cosines in place below 0.1 and with a copy above 0.7, every"
        " seed; partly if the former",
        budget="cpu-minutes",
        measure=half_precision,
    ),
    Claim(
        name="alignment-and-convergence",
        source=f"abstract (subspace alignment); {DEVELOPMENT}",
        statement="How well a perturbation's estimates align with the gradient says how fast it converges.",
        paper_number="-",
        setting=f"sum x^2 / 2 over {QUADRATIC}; 3,000 steps at lr alpha / s; mean share by which a step lowers the"
        " loss, over alpha^2 / s in closed form",
        reproduced_if="within 10% for every kind and seed; partly if for every kind's mean",
        budget="cpu-minutes",
        measure=alignment_and_convergence,
    ),
    Claim(
        name="similar-convergence",
        source=f"abstract (a broad class of subspace perturbations converges at a similar rate); {DEVELOPMENT}",
        statement="Sparse, low-rank and block perturbations converge at a rate similar to MeZO's.",
        paper_number="similar",
        setting=f"curvatures 1, 1/2, 1/3 .. in mixed order over {QUADRATIC}; 4,000 steps, lr by factors of 3 on seed 0;"
        " nats by which the loss falls, over those of full perturbations",
        reproduced_if="within 25% for every kind and seed; partly if within 50%",
        budget="cpu-minutes",
        measure=similar_convergence,
    ),
    Claim(
        name="time-of-a-step-opt-13b",
        source="abstract (v1: up to 2.09 times per iteration; v2: up to 2.77 in wall-clock time)",
        statement="A step on one block of OPT-13B is two to three times as fast as a step of MeZO.",
        paper_number="2.09x to 2.77x",
        setting="OPT-13B's shape, random weights, bfloat16, 16 x 256 tokens on one GPU; ten layers from low to high,"
        " otherwise as time-of-a-step",
        reproduced_if="at least 2 times against both, in every round; partly if above 1",
        budget="h100-10min",
        measure=partial(time_of_a_step, shape="opt-13b", device="cuda", rows=16, tokens=256, rounds=10),
    ),
    Claim(
        name="memory-of-inference-opt-13b",
        source="abstract; MeZO, arXiv 2305.17333, abstract",
        statement="Fine-tuning OPT-13B takes the memory of inference.",
        paper_number="the same",
        setting="OPT-13B's shape, bfloat16, 16 x 256 tokens; peak of the GPU's allocator, once each",
        reproduced_if="MeZO in place and MeZO-BCD with its float32 copy and noise at most 1.15 times two forward"
        " passes; partly if at most 1.5 times",
        budget="h100-10min",
        measure=partial(memory, shape="opt-13b", device="cuda", rows=16, tokens=256, repeats=1),
    ),
]
