"""Claims of "AMUSE: Anytime MUon with Stable gradient Evaluation", arXiv 2605.22432.

The paper trains Llama models of 124M to 1.3B parameters and vision models. Its curves give few numbers: 1.51 times
fewer steps than cosine Muon needs for its final loss (720M), 1.34 times (ResNet-50), 2.57 times (fine-tuning a ViT),
as others quote them. Here the same comparison runs on a perceptron that learns from a noisy teacher, on a language
model of a million parameters, and, where there is a GPU, on one of 27 million and on a vision transformer.

What is trained stays in the scratch directory, so that claims share their runs:
`burnish claims run --budget cpu-hours --scratch DIR` finds its finished runs again.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from burnish.data import bundled_model, bundled_text
from burnish.data.text import token_stream
from burnish.distill import distill
from burnish.optim import AMUSE, AdamWScheduleFree, Muon, split_parameters
from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.table import OPTIMIZERS
from burnish.runs.claims import Claim, Measurement, Verdict

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Way:
    """How to train.

    Attributes:
        optimizer: called with groups, a learning rate and `options`.
        cosine: the rate falls to zero at the end; otherwise it stays as it is after warmup.
        options: of the optimizer.
    """

    optimizer: Callable[..., Optimizer]
    cosine: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is learnt, by one model or by several side by side.

    Attributes:
        groups: of parameters, for an optimizer.
        loss: of the batch of a step, counted from 1.
        held_out: loss of each model with the parameters as they are.
    """

    groups: list[dict[str, Any]]
    loss: Callable[[int], Tensor]
    held_out: Callable[[], list[float]]


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        steps: of the whole run.
        warmup: steps of linear warmup, for every optimizer; the averaged ones need it at construction.
        every: steps between two observations; a quarter of the run is a multiple of it.
        clip: largest norm of the gradient, or None.
    """

    steps: int
    warmup: int
    every: int
    clip: float | None = None


def group_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def learning_rate_factor(step: int, length: Length, *, cosine: bool) -> float:
    """What multiplies the learning rate of a step, counted from 1: linear warmup, then constant or half a cosine."""
    if step <= length.warmup or not cosine:
        return min(1.0, step / length.warmup)
    return 0.5 + 0.5 * math.cos(math.pi * (step - length.warmup) / (length.steps - length.warmup))


def loss_to_ship(optimizer: Optimizer, task: Task) -> list[float]:
    """Held-out loss of the model that a user would save now: the average, where there is one."""
    if isinstance(optimizer, AveragedOptimizer):
        with optimizer.averaged():
            return task.held_out()
    return task.held_out()


def train(
    task: Task,
    way: Way,
    lr: float,
    length: Length,
    observe: Callable[[Optimizer, Task], Any] = loss_to_ship,
) -> dict[int, Any]:
    """Train a task; what was observed, by step."""
    averages = way.optimizer in (AMUSE, AdamWScheduleFree)
    options = way.options | ({"warmup_steps": length.warmup} if averages else {})
    optimizer = way.optimizer(task.groups, lr, **options)
    factor = partial(learning_rate_factor, length=length, cosine=way.cosine)
    schedule = None if averages else LambdaLR(optimizer, lambda done: factor(done + 1))
    parameters = group_parameters(optimizer)
    course = {}
    for step in range(1, length.steps + 1):
        optimizer.zero_grad()
        task.loss(step).backward()
        if length.clip is not None:
            nn.utils.clip_grad_norm_(parameters, length.clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if step % length.every == 0:
            course[step] = observe(optimizer, task)
    return course


def steps_to(course: dict[int, float], loss: float) -> float:
    """First observed step at which a loss was reached; infinite if never."""
    return next((step for step, value in course.items() if value <= loss), math.inf)


class Perceptrons(nn.Module):
    """One perceptron for each seed, their weights in stacks of matrices: each is orthogonalised on its own."""

    def __init__(self, draws: list[torch.Generator], widths: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        layers = [
            [(2 * torch.rand(rows, cols + 1, generator=draw, dtype=dtype) - 1) / math.sqrt(cols) for draw in draws]
            for cols, rows in pairwise(widths)
        ]
        stacks = [torch.stack(layer) for layer in layers]  # [models, out, in and bias], uniform as nn.Linear has them
        self.weights = nn.ParameterList(stack[..., :-1].contiguous() for stack in stacks)
        self.biases = nn.ParameterList(stack[..., -1].contiguous() for stack in stacks)

    def forward(self, inputs: Tensor) -> Tensor:  # [models, samples, in] -> [models, samples, classes]
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(bias.unsqueeze(1), inputs if number == 0 else inputs.relu(), weight.mT)
        return inputs

    def groups(self) -> list[dict[str, Any]]:
        """Hidden layers to the matrix rule; the output layer and biases to the auxiliary rule."""
        *hidden, head = self.weights
        return [
            {"params": hidden, "use_muon": True, "layout": "batch"},
            {"params": [head, *self.biases], "use_muon": False},
        ]


class Teachers:
    """A wide tanh network for each seed whose classes are drawn, not taken at their largest."""

    def __init__(self, draws: list[torch.Generator], inputs: int, classes: int, dtype: torch.dtype) -> None:
        self.draws, self.inputs, self.dtype = draws, inputs, dtype
        hidden = 2 * inputs
        self.first = self._normal(hidden, inputs) / math.sqrt(inputs)
        self.second = self._normal(classes, hidden) * (8 / math.sqrt(hidden))

    def _normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=draw, dtype=self.dtype) for draw in self.draws])

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs [models, count, in] and log-probabilities of the classes [models, count, classes]."""
        inputs = self._normal(count, self.inputs)
        return inputs, ((inputs @ self.first.mT).tanh() @ self.second.mT).log_softmax(-1)

    def classes(self, log_probabilities: Tensor) -> Tensor:
        """One class drawn for each sample, [models, count]."""
        drawn = [
            torch.multinomial(rows.exp(), 1, generator=draw)
            for rows, draw in zip(log_probabilities, self.draws, strict=True)
        ]
        return torch.stack(drawn).squeeze(-1)


def expected_cross_entropy(logits: Tensor, log_probabilities: Tensor) -> Tensor:
    """Mean over samples and over the classes that a teacher could have drawn, [models]."""
    return -(log_probabilities.exp() * logits.log_softmax(-1)).sum(-1).mean(-1)


def perceptron_task(dtype: torch.dtype = torch.float32) -> Task:
    """All seeds side by side: a seed draws its own teacher, its own start and its own samples, never one twice."""
    draws = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    teachers = Teachers(draws, 32, 10, dtype)
    held_inputs, held_targets = teachers.sample(8192)
    model = Perceptrons(draws, (32, 64, 64, 10), dtype)

    def loss(step: int) -> Tensor:
        inputs, log_probabilities = teachers.sample(64)
        found = model(inputs).flatten(0, 1)
        # The sum over models leaves each the gradient of its own mean.
        return nn.functional.cross_entropy(found, teachers.classes(log_probabilities).flatten()) * len(draws)

    @torch.no_grad()
    def held_out() -> list[float]:
        return expected_cross_entropy(model(held_inputs), held_targets).tolist()

    return Task(model.groups(), loss, held_out)


@dataclass(frozen=True)
class LanguageModel:
    """Shape of a Llama and of its batches."""

    name: str
    hidden: int
    layers: int
    heads: int
    rows: int
    tokens: int
    held_out_rows: int
    length: Length
    device: str = "cpu"


MINIATURE = LanguageModel(
    "language", hidden=128, layers=4, heads=4, rows=16, tokens=64, held_out_rows=256, length=Length(1200, 150, 50, 1.0)
)
H100 = LanguageModel(
    "language-27m", hidden=512, layers=8, heads=8, rows=32, tokens=512, held_out_rows=64,
    length=Length(1200, 150, 50, 1.0), device="cuda",
)  # fmt: skip


def language_task(scratch: Path, shape: LanguageModel, seed: int, steps: int) -> Task:
    """A Llama with tied embeddings on the text that the bundled miniature was trained on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = blocks(neighbour("moe_to_dense")._training_text(scratch), shape.tokens)
    held = blocks(bundled_text("heldout"), shape.tokens)
    held = held[:: len(held) // shape.held_out_rows][: shape.held_out_rows]
    draw = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * shape.rows / len(text))
    order = torch.cat([torch.randperm(len(text), generator=draw) for _ in range(passes)])
    config = LlamaConfig(
        vocab_size=2048, hidden_size=shape.hidden, intermediate_size=11 * shape.hidden // 4,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=shape.tokens, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(shape.device)

    def of(ids: Tensor) -> Tensor:
        ids = ids.to(shape.device)
        with torch.autocast(shape.device, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def loss(step: int) -> Tensor:
        return of(text[order[(step - 1) * shape.rows : step * shape.rows]])

    @torch.no_grad()
    def held_out() -> list[float]:
        batches = held.split(shape.rows)
        return [statistics.fmean(float(of(batch)) for batch in batches)]

    return Task(split_parameters(model).param_groups(), loss, held_out)


@cache
def blocks(file: Path, length: int) -> Tensor:
    """A text as rows of tokens of the bundled model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    # Documents of all kinds come by turns.
    ids = [token for _, tokens in token_stream(tokenizer, file, seed=0) for token in tokens]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def neighbour(name: str) -> ModuleType:
    """Another file of claims, whose runs and texts are used again."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Runs:
    """One way of training, at its best learning rate.

    Attributes:
        lr: chosen from `tried`.
        tried: loss by learning rate, of the runs that chose.
        courses: for each seed, held-out loss by step.
    """

    lr: float
    tried: dict[float, float]
    courses: list[dict[int, float]]

    def finals(self) -> list[float]:
        """Loss of each seed at the end."""
        return [course[max(course)] for course in self.courses]

    def to_dict(self) -> dict[str, Any]:
        """For the record; losses to five digits, which is finer than any difference that counts."""
        courses = [{step: round(loss, 5) for step, loss in course.items()} for course in self.courses]
        return {"lr": self.lr, "tried": self.tried, "courses": courses}


def best_rate(loss: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The learning rate with the lowest loss, and the loss of all that were tried.

    Half or twice the best is tried until the best lies between two others: no way is held back by a grid.
    """
    tried = {lr: loss(lr) for lr in (0.005, 0.01)}
    while True:
        best = min(tried, key=tried.__getitem__)
        if min(tried) < best < max(tried):
            return best, tried
        further = best / 2 if best == min(tried) else best * 2
        tried[further] = loss(further)


def remembered(file: Path, measure: Callable[[], dict[int, Any]]) -> dict[int, Any]:
    """A course, measured unless an earlier run left it."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure()), encoding="utf-8")
    return {int(step): found for step, found in json.loads(file.read_text(encoding="utf-8")).items()}


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def runs_by_seed(
    scratch: Path, name: str, ways: dict[str, Way], length: Length, task: Callable[[int, int], Task]
) -> dict[str, Runs]:
    """A run of each way and seed at the learning rate that ends lowest, on the first seed, in a quarter of the steps.

    The ways alternate, so that all meet the same disturbances.
    """

    def course(key: str, lr: float, seed: int, length: Length) -> dict[int, float]:
        file = scratch / "amuse" / f"{name}-{slug(key)}-{lr:g}-{length.steps}-{seed}.json"
        found = remembered(file, lambda: train(task(seed, length.steps), ways[key], lr, length))
        return {step: loss for step, (loss,) in found.items()}

    probe = replace(length, steps=length.steps // 4, warmup=length.warmup // 4)

    def end(key: str, lr: float) -> float:
        return course(key, lr, SEEDS[0], probe)[probe.steps]

    runs = {}
    for key in ways:
        lr, tried = best_rate(partial(end, key))
        runs[key] = Runs(lr, tried, [])
    for seed in SEEDS:
        for key, found in runs.items():
            found.courses.append(course(key, found.lr, seed, length))
    return runs


WAYS = {
    "AMUSE": Way(AMUSE, options={"beta1": 0.4, "rho": 0.8, "weight_decay": 0.1}),
    "cosine Muon": Way(Muon, cosine=True, options={"scale": "match_rms_adamw", "weight_decay": 0.1}),
    "schedule-free AdamW": Way(AdamWScheduleFree, options={"weight_decay": 0.1}),
    "cosine AdamW": Way(torch.optim.AdamW, cosine=True, options={"weight_decay": 0.1, "betas": (0.9, 0.95)}),
}
"""AMUSE as the paper's 720M run has it, with its warmup of an eighth of the run, for all."""


def language_runs(scratch: Path, shape: LanguageModel) -> dict[str, Runs]:
    """Courses of all ways on a language model."""
    return runs_by_seed(
        scratch, shape.name, WAYS, shape.length, lambda seed, steps: language_task(scratch, shape, seed, steps)
    )


def compared(runs: dict[str, Runs], ours: Iterable[str], **more: Any) -> dict[str, Any]:
    """Details that every comparison keeps."""
    return {"ours": list(ours), "runs": {name: found.to_dict() for name, found in runs.items()}, "seeds": SEEDS, **more}


def verdict(whole: bool, part: bool) -> Verdict:
    return "reproduced" if whole else "partly" if part else "not reproduced"


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and its 95 % interval over the seeds (Student's t with two degrees of freedom)."""
    half = 4.303 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def joined(losses: Iterable[float]) -> str:
    return "/".join(f"{loss:.3f}" for loss in losses)


def frontier(scratch: Path, get: Callable[[Path], dict[str, Runs]], ours: tuple[str, ...]) -> Measurement:
    """Loss at a quarter, at half and at the end of the run; how far below every other way ours is, by seed."""
    runs = get(scratch)
    last = max(runs[ours[0]].courses[0])
    checkpoints = (last // 4, last // 2, last)
    leads = {
        f"{mine} before {other} at {step}": [
            theirs[step] - own[step] for own, theirs in zip(runs[mine].courses, runs[other].courses, strict=True)
        ]
        for mine in ours
        for other in runs
        if not other.startswith("AMUSE")
        for step in checkpoints
    }
    whole = all(min(lead) > 0 for lead in leads.values())
    part = any(
        all(statistics.mean(lead) > 0 for name, lead in leads.items() if name.startswith(f"{mine} before"))
        for mine in ours
    )
    means = {
        name: joined(statistics.fmean(course[step] for course in found.courses) for step in checkpoints)
        for name, found in runs.items()
    }
    number = f"loss at {', '.join(map(str, checkpoints))}: " + "; ".join(f"{name} {row}" for name, row in means.items())
    return Measurement(verdict(whole, part), number, compared(runs, ours, leads=leads))


def speed_up(scratch: Path, get: Callable[[Path], dict[str, Runs]], ours: tuple[str, ...], least: float) -> Measurement:
    """Steps of cosine Muon over those after which ours first is at its final loss, by seed; below 1 if never."""
    runs = get(scratch)
    goals = runs["cosine Muon"].finals()
    last = max(runs["cosine Muon"].courses[0])
    ratios = {
        name: [last / steps_to(course, goal) for course, goal in zip(found.courses, goals, strict=True)]
        for name, found in runs.items()
        if name != "cosine Muon"
    }
    mine = [ratio for name in ours for ratio in ratios[name]]
    number = ", ".join(
        f"{name} {', '.join(f'{ratio:.2f}' if ratio else 'never' for ratio in found)}" for name, found in ratios.items()
    )
    return Measurement(
        verdict(min(mine) >= least, statistics.mean(mine) > 1),
        f"times fewer steps than cosine Muon, seeds {', '.join(map(str, SEEDS))}: {number}",
        compared(runs, ours, ratios=ratios, goals=goals),
    )


TOY = Length(steps=3000, warmup=100, every=50)
HORIZONS = (750, 1500, 3000)
RHO = (0.0, 0.2, 0.4, 0.8)
TOY_WAYS = {
    **{f"AMUSE rho {rho:g}": Way(AMUSE, options={"beta1": 0.6, "rho": rho}) for rho in RHO},
    "cosine Muon": Way(Muon, cosine=True, options={"scale": "match_rms_adamw", "weight_decay": 0.0}),
    "constant Muon": Way(Muon, options={"scale": "match_rms_adamw", "weight_decay": 0.0}),
    "schedule-free AdamW": Way(AdamWScheduleFree),
    "cosine AdamW": Way(torch.optim.AdamW, cosine=True, options={"weight_decay": 0.0}),
}


def toy_course(scratch: Path, name: str, lr: float, length: Length = TOY) -> dict[int, list[float]]:
    """Held-out loss of all seeds by step of one way at one learning rate."""
    return remembered(
        scratch / "amuse" / f"toy-{slug(name)}-{lr:g}-{length.steps}.json",
        lambda: train(perceptron_task(), TOY_WAYS[name], lr, length),
    )


def toy_runs(scratch: Path, length: Length = TOY, names: Iterable[str] = TOY_WAYS) -> dict[str, Runs]:
    """Courses of all ways on the perceptron, each at the learning rate with the lowest mean loss at the end."""

    def end(name: str, lr: float) -> float:
        return statistics.fmean(toy_course(scratch, name, lr, length)[length.steps])

    found = {}
    for name in names:
        lr, tried = best_rate(partial(end, name))
        course = toy_course(scratch, name, lr, length)
        by_seed = [{step: losses[row] for step, losses in course.items()} for row in range(len(SEEDS))]
        found[name] = Runs(lr, tried, by_seed)
    return found


def planned_horizon(scratch: Path) -> Measurement:
    """AMUSE along one run against Muon in runs whose cosine ends there, each at its own best learning rate."""
    mine = ("AMUSE rho 0.2", "AMUSE rho 0.4")
    ours = {name: toy_runs(scratch, names=[name])[name] for name in mine}
    planned = {
        steps: toy_runs(scratch, replace(TOY, steps=steps), ["cosine Muon"])["cosine Muon"] for steps in HORIZONS
    }
    leads = {
        f"{name} before Muon planned for {steps}": [
            theirs - own[steps] for own, theirs in zip(ours[name].courses, muon.finals(), strict=True)
        ]
        for name in mine
        for steps, muon in planned.items()
    }
    held = [min(lead) > 0 for lead in leads.values()]
    rows = {name: [statistics.fmean(run[step] for run in ours[name].courses) for step in HORIZONS] for name in mine}
    rows["Muon planned for each"] = [statistics.fmean(muon.finals()) for muon in planned.values()]
    return Measurement(
        verdict(all(held), any(held)),
        f"loss at {', '.join(map(str, HORIZONS))}: " + "; ".join(f"{name} {joined(row)}" for name, row in rows.items()),
        {
            "leads": leads,
            "amuse": {name: run.to_dict() for name, run in ours.items()},
            "planned": {steps: muon.to_dict() for steps, muon in planned.items()},
            "seeds": SEEDS,
        },
    )


def growing_beta(scratch: Path) -> Measurement:
    """Loss at the average by rho, against rho 0."""
    names = [f"AMUSE rho {rho:g}" for rho in RHO]
    runs = toy_runs(scratch, names=names)
    fixed = runs[names[0]].courses
    leads = {
        name: {step: [a[step] - b[step] for a, b in zip(fixed, runs[name].courses, strict=True)] for step in HORIZONS}
        for name in names[1:]
    }
    whole = any(all(min(lead) > 0 for lead in by_step.values()) for by_step in leads.values())
    part = any(min(by_step[TOY.steps]) > 0 for by_step in leads.values())
    number = "; ".join(
        f"rho {rho:g} " + joined(statistics.fmean(run[step] for run in runs[name].courses) for step in HORIZONS)
        for rho, name in zip(RHO, names, strict=True)
    )
    steps = ", ".join(map(str, HORIZONS))
    return Measurement(verdict(whole, part), f"loss at {steps}: {number}", compared(runs, names[1:], leads=leads))


def losses_of_sequences(optimizer: Optimizer, task: Task) -> dict[str, list[float]]:
    """Held-out loss at the average x, at y where gradients are taken, and at the fast sequence z."""
    assert isinstance(optimizer, AveragedOptimizer)
    found = {"x": loss_to_ship(optimizer, task), "y": task.held_out()}
    parameters = group_parameters(optimizer)
    with torch.no_grad():
        kept = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.copy_(optimizer.state[parameter]["z"])
        found["z"] = task.held_out()
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)
    return found


def usable_throughout(scratch: Path) -> Measurement:
    """Loss at x, y and z every 50 steps after warmup, and how far the loss at x ever rises above its lowest before."""
    shares: dict[str, dict[str, float]] = {}
    rises: dict[str, list[float]] = {}
    courses = {}
    for rho in (0.4, 0.8):
        name = f"AMUSE rho {rho:g}"
        lr = toy_runs(scratch, names=[name])[name].lr
        course = remembered(
            scratch / "amuse" / f"toy-sequences-{rho:g}-{lr:g}.json",
            partial(train, perceptron_task(), TOY_WAYS[name], lr, TOY, losses_of_sequences),
        )
        after = [losses for step, losses in course.items() if step > TOY.warmup]
        shares[name] = {
            other: statistics.fmean(
                mine < theirs for row in after for mine, theirs in zip(row["x"], row[other], strict=True)
            )
            for other in ("y", "z")
        }
        rises[name] = [largest_rise([row["x"][number] for row in after]) for number in range(len(SEEDS))]
        courses[name] = course
    muon = toy_runs(scratch, names=["constant Muon"])["constant Muon"]
    rises["constant Muon"] = [
        largest_rise([loss for step, loss in run.items() if step > TOY.warmup]) for run in muon.courses
    ]
    steady = all(max(rises[name]) <= 0.01 for name in shares)
    below = all(share == 1 for found in shares.values() for share in found.values())
    number = "; ".join(
        f"{name} below y at {found['y']:.0%} and below z at {found['z']:.0%} of the looks, largest rise"
        f" {max(rises[name]):.3f}"
        for name, found in shares.items()
    )
    return Measurement(
        verdict(below and steady, steady and all(found["z"] == 1 for found in shares.values())),
        f"{number}; constant Muon's largest rise {max(rises['constant Muon']):.3f}",
        {"shares": shares, "rises": rises, "courses": courses, "seeds": SEEDS},
    )


def largest_rise(losses: list[float]) -> float:
    """How far a course ever is above its lowest point before."""
    return max(loss - lowest for loss, lowest in zip(losses, accumulate(losses, min), strict=True))


def window(steps: int, warmup: int, *, beta1: float, rho: float) -> float:
    """Steps over which x averages the points where gradients were taken: 1/r of x' = (1 - r) x + r y'.

    1 + (1 - beta_1) (W_0 - 1)^rho (W_t - 1)^(1 - rho), W the sum of squared learning rates over the last one: the
    linear warmup of T_0 steps gives W_0 = (T_0 + 1)(2 T_0 + 1) / (6 T_0). Ours, from the definitions.
    """
    start = (warmup + 1) * (2 * warmup + 1) / (6 * warmup)
    return 1 + (1 - beta1) * (start - 1) ** rho * (start + steps - warmup - 1) ** (1 - rho)


def window_identity(scratch: Path, steps: int = 1000, warmup: int = 100) -> Measurement:
    """How x moves towards y in a run in float64, step by step, against the closed form."""
    beta1, worst, last = 0.6, 0.0, {}
    for rho in (0.0, 0.4, 0.8, 1.0):
        way = Way(AMUSE, options={"beta1": beta1, "rho": rho})
        before: list[Tensor] = []

        def measured(optimizer: Optimizer, task: Task, before: list[Tensor] = before) -> float:
            assert isinstance(optimizer, AveragedOptimizer)
            y = nn.utils.parameters_to_vector(group_parameters(optimizer)).detach()
            with optimizer.averaged():
                x = nn.utils.parameters_to_vector(group_parameters(optimizer)).detach()
            old = before.pop() if before else x
            before.append(x)
            return float((y - old) @ (y - old) / ((x - old) @ (y - old)))

        found = train(perceptron_task(torch.float64), way, 0.01, Length(steps, warmup, 1), measured)
        for step in range(warmup, steps + 1):
            expected = window(step, warmup, beta1=beta1, rho=rho)
            worst = max(worst, abs(found[step] / expected - 1))
        last[rho] = found[steps]
    number = ", ".join(f"{steps:.1f} steps at rho {rho:g}" for rho, steps in last.items())
    return Measurement(
        verdict(worst <= 1e-6, worst <= 1e-3),
        f"largest relative deviation {worst:.0e}; window after {steps:,} steps: {number}",
        {"deviation": worst, "windows": last, "seeds": SEEDS},
    )


def fashion_mnist(scratch: Path) -> dict[str, Tensor]:
    """Images [count, 28, 28] and labels, as bytes; fetched once (needs `apt-get` and `dpkg-deb`)."""
    folder = scratch / "fashion-mnist"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=temporary, check=True)
            package = next(Path(temporary).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=temporary, check=True)
            shutil.copytree(Path(temporary) / "unpacked" / "usr/share/datasets/fashion-mnist", folder)
    found = {}
    for part in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz") as stream:
                values = torch.frombuffer(bytearray(stream.read()[header:]), dtype=torch.uint8)
            found[f"{part}-{kind[:6]}"] = values.view(-1, 28, 28) if header == 16 else values
    return found


VIT = Length(steps=2400, warmup=300, every=50, clip=1.0)
VIT_SHAPE = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}


def vision_task(
    scratch: Path, seed: int, shape: dict[str, int] = VIT_SHAPE, rows: int = 256, device: str = "cuda"
) -> Task:
    """A vision transformer on Fashion-MNIST, mirrored at random."""
    from transformers import ViTConfig, ViTForImageClassification

    data = {name: values.to(device) for name, values in fashion_mnist(scratch).items()}
    draw = torch.Generator().manual_seed(seed)
    config = ViTConfig(image_size=28, patch_size=4, num_channels=1, num_labels=10, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTForImageClassification(config).to(device)

    def of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(images.unsqueeze(1) / 127.5 - 1).logits
        return nn.functional.cross_entropy(logits.float(), labels.long())

    def loss(step: int) -> Tensor:
        picked = torch.randint(len(data["train-labels"]), (rows,), generator=draw).to(device)
        mirrored = (torch.rand(rows, 1, 1, generator=draw) < 0.5).to(device)
        images = data["train-images"][picked]
        return of(torch.where(mirrored, images.flip(-1), images), data["train-labels"][picked])

    @torch.no_grad()
    def held_out() -> list[float]:
        batches = zip(data["t10k-images"].split(500), data["t10k-labels"].split(500), strict=True)
        return [statistics.fmean(float(of(*batch)) for batch in batches)]

    return Task(split_parameters(model).param_groups(), loss, held_out)


def vision_runs(scratch: Path) -> dict[str, Runs]:
    """Courses of all ways on Fashion-MNIST."""
    return runs_by_seed(scratch, "vit", WAYS, VIT, lambda seed, steps: vision_task(scratch, seed))


DISTILLED = {
    "amuse": ("amuse", {"rho": 0.8}),
    "amuse-rho-0.2": ("amuse", {"rho": 0.2}),
    "amuse-rho-0": ("amuse", {"rho": 0.0}),
    "muon": ("muon", {}),
}
"""Optimizers by their names in `burnish distill`, and options in place of those that it gives them."""


def distilled(scratch: Path, name: str, lr: float, seed: int, tokens: int) -> dict[str, list[Any]]:
    """Held-out KL by tokens of one distillation of the miniature; a finished one is read again."""
    earlier = neighbour("moe_to_dense")
    out = scratch / "amuse" / f"distilled-{name}-{lr:g}-{tokens}-{seed}"
    if not out.exists():
        student, teacher = earlier._students(scratch, seed)["experts"]
        setting = earlier.DISTILLATION | {"tokens": tokens, "eval_every": earlier.TOKENS // 16}
        optimizer, options = DISTILLED[name]
        known = OPTIMIZERS[optimizer]
        with mock.patch.dict(OPTIMIZERS, {optimizer: replace(known, options=known.options | options)}):
            distill(
                student, out, teacher=teacher, dataset=earlier._training_text(scratch),
                eval_dataset=bundled_text("heldout"), optimizer=optimizer, lr=lr, warmup=0.1, seed=seed, **setting,
            )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    course = [(line["tokens"], line["eval_kl"]) for line in lines if "eval_kl" in line]
    return {"tokens": [at for at, _ in course], "kl": [kl for _, kl in course]}


def distillation(scratch: Path) -> Measurement:
    """Tokens with AdamW and a cosine over those after which AMUSE and Muon are where it ends."""
    earlier = neighbour("moe_to_dense")

    def end(name: str, lr: float) -> float:
        return float(distilled(scratch, name, lr, SEEDS[0], earlier.TOKENS // 4)["kl"][-1])

    chosen, tried = {}, {}
    ratios: dict[str, list[float]] = {name: [] for name in DISTILLED}
    runs: dict[str, list[Any]] = {"adamw": [], **{name: [] for name in DISTILLED}}
    for name in ratios:
        chosen[name], tried[name] = best_rate(partial(end, name))
    for seed in SEEDS:
        start = earlier._students(scratch, seed)["experts"]
        runs["adamw"].append(earlier._distilled(scratch, "experts", *start, seed))
        for name, lr in chosen.items():
            runs[name].append(distilled(scratch, name, lr, seed, earlier.TOKENS))
            goal = runs["adamw"][-1]["kl"][-1]
            ratios[name].append(earlier.TOKENS / earlier._tokens_to(runs[name][-1], goal))
    number = "; ".join(
        f"{name} {', '.join(f'{ratio:.2f}x fewer' if ratio else 'never' for ratio in ratios[name])}"
        f" (KL {spread([run['kl'][-1] for run in runs[name]])})"
        for name in ratios
    )
    adamw = spread([run["kl"][-1] for run in runs["adamw"]])
    return Measurement(
        verdict(min(ratios["amuse"]) > 1, statistics.mean(ratios["amuse"]) > 1),
        f"tokens to AdamW's final KL ({adamw}), seeds {', '.join(map(str, SEEDS))}: {number}",
        {"runs": runs, "ratios": ratios, "learning_rates": chosen, "tried": tried, "seeds": SEEDS},
    )


TOY_SETTING = (
    "perceptron 32-64-64-10 with ReLU, endless samples whose classes a tanh network of width 64 draws (its own entropy"
    " about 0.6), 3,000 steps of 64, warmup 100 for all, no decay, output layer and biases to the auxiliary rule;"
    " AMUSE beta1 0.6; each way at the lr with the lowest mean loss at the end, by halving and doubling; cross-entropy"
    " against the teacher's probabilities on 8,192 held-out samples, seeds 0-2 (teacher, start and samples)"
)
LANGUAGE_SETTING = (
    "Llama of 1.1M parameters (hidden 128, 4 layers, tied), 1,200 steps of 16 x 64 tokens of the miniature's training"
    " text, none seen twice, bfloat16 autocast, warmup 150 steps for all, weight decay 0.1, gradients clipped at 1;"
    " AMUSE beta1 0.4, rho 0.8 (the paper's 720M run); lr of each by halving and doubling, the best at the end of"
    " a run of 300 steps of seed 0; held-out loss on 16,384 tokens of unseen documents, seeds 0-2"
)
H100_SETTING = (
    "Llama of 27M parameters (hidden 512, 8 layers, tied), 1,200 steps of 32 x 512 tokens of the miniature's training"
    " text (four passes), otherwise as language-frontier with 32,768 held-out tokens"
)
VIT_SETTING = (
    "vision transformer of 2.7M parameters (hidden 192, 6 layers, patches of 4) from scratch on Fashion-MNIST, mirrored"
    " at random, 2,400 steps of 256, warmup 300, otherwise as language-frontier; cross-entropy on 10,000 test images"
)
BEST = "AMUSE has the best performance-versus-iteration frontier against AdamW, schedule-free AdamW and Muon."
FASTER = "AMUSE needs fewer steps to the final loss of Muon with a cosine schedule."
BELOW = "below each other way at a quarter, half and the end of the run, every seed; partly if the means are"
AT_LEAST = "at least 1.2 times fewer, every seed; partly if the mean ratio is above 1"
TOY_OURS = ("AMUSE rho 0.2", "AMUSE rho 0.4")

CLAIMS = [
    Claim(
        name="window-identity",
        source="definitions of beta and c in the released code; the closed form is ours",
        statement="The average moves over a window of evaluation points that grows as t^(1 - rho), and not at all at"
        " rho 1.",
        paper_number="1 + (1 - beta1)(W0 - 1)^rho (Wt - 1)^(1 - rho)",
        setting="perceptron 32-64-64-10 in float64, 1,000 steps, warmup 100, beta1 0.6, rho 0, 0.4, 0.8 and 1; every"
        " step from the end of warmup on, seeds 0-2 in one",
        reproduced_if="measured windows within 1e-6 of the closed form at every step; partly if within 1e-3",
        budget="cpu-minutes",
        measure=window_identity,
    ),
    Claim(
        name="toy-frontier",
        source="abstract",
        statement=BEST,
        paper_number="best (curves)",
        setting=TOY_SETTING,
        reproduced_if=f"rho 0.2 and rho 0.4 {BELOW} for one rho",
        budget="cpu-minutes",
        measure=partial(frontier, get=toy_runs, ours=TOY_OURS),
    ),
    Claim(
        name="toy-speed-up",
        source="abstract",
        statement=FASTER,
        paper_number="1.51x (720M Llama), 1.34x (ResNet-50), 2.57x (fine-tuning a ViT)",
        setting=TOY_SETTING + "; looked at every 50 steps",
        reproduced_if=f"rho 0.2 and rho 0.4 {AT_LEAST}",
        budget="cpu-minutes",
        measure=partial(speed_up, get=toy_runs, ours=TOY_OURS, least=1.2),
    ),
    Claim(
        name="no-horizon-to-choose",
        source="title (anytime); this comparison is ours",
        statement="AMUSE at any step is as good as Muon whose cosine was planned to end there.",
        paper_number="-",
        setting=TOY_SETTING + "; Muon in runs of 750, 1,500 and 3,000 steps",
        reproduced_if="rho 0.2 and rho 0.4 below Muon at all three ends, every seed; partly if one of them is at one"
        " end, every seed",
        budget="cpu-minutes",
        measure=planned_horizon,
    ),
    Claim(
        name="growing-beta",
        source="abstract (beta_t grows from beta_1 to 1); the released settings have rho 0.2 to 0.8",
        statement="Moving the point where gradients are taken towards the average helps: rho > 0 beats rho 0.",
        paper_number="rho 0.2 to 0.8 (no number)",
        setting=TOY_SETTING,
        reproduced_if="some rho of 0.2, 0.4 and 0.8 below rho 0 at 750, 1,500 and 3,000 steps, every seed; partly if at"
        " the end",
        budget="cpu-minutes",
        measure=growing_beta,
    ),
    Claim(
        name="usable-at-every-step",
        source="title (anytime); abstract",
        statement="The average is a usable model at any checkpoint.",
        paper_number="-",
        setting=TOY_SETTING + "; rho 0.4 and 0.8, looked at every 50 steps after warmup",
        reproduced_if="loss at x below that at y and at z at every look, and never more than 0.01 above its lowest"
        " before, every seed; partly if below z only",
        budget="cpu-minutes",
        measure=usable_throughout,
    ),
    Claim(
        name="language-frontier",
        source="abstract; README of the released code (124M to 1.3B Llama models)",
        statement=BEST,
        paper_number="best (curves)",
        setting=LANGUAGE_SETTING,
        reproduced_if=BELOW,
        budget="cpu-hours",
        measure=partial(frontier, get=partial(language_runs, shape=MINIATURE), ours=("AMUSE",)),
    ),
    Claim(
        name="language-speed-up",
        source="abstract (720M Llama)",
        statement=FASTER,
        paper_number="1.51x",
        setting=LANGUAGE_SETTING + "; looked at every 50 steps",
        reproduced_if=AT_LEAST,
        budget="cpu-hours",
        measure=partial(speed_up, get=partial(language_runs, shape=MINIATURE), ours=("AMUSE",), least=1.2),
    ),
    Claim(
        name="tokens-of-distillation",
        source="abstract, applied to distillation (not in the paper)",
        statement="AMUSE, without a schedule, is where AdamW with a cosine ends in fewer tokens.",
        paper_number="1.34x to 2.57x (other tasks)",
        setting="the miniature's student of 1.2M parameters, 524,288 tokens, as in tokens-to-a-given-kl; AdamW at its"
        " best rate with warmup 2%; AMUSE (beta1 0.6, rho 0.8; beside it 0.2 and 0) and cosine Muon with warmup 10%, lr"
        " by halving and doubling, the best at the end of a run of 131,072 tokens of seed 0; seeds 0-2",
        reproduced_if="AMUSE is there in fewer tokens, every seed; partly if its mean ratio is above 1",
        budget="cpu-hours",
        measure=distillation,
    ),
    Claim(
        name="language-27m-frontier",
        source="abstract (720M Llama)",
        statement=BEST,
        paper_number="best (curves)",
        setting=H100_SETTING,
        reproduced_if=BELOW,
        budget="h100-10min",
        measure=partial(frontier, get=partial(language_runs, shape=H100), ours=("AMUSE",)),
    ),
    Claim(
        name="language-27m-speed-up",
        source="abstract (720M Llama)",
        statement=FASTER,
        paper_number="1.51x",
        setting=H100_SETTING + "; looked at every 50 steps",
        reproduced_if=AT_LEAST,
        budget="h100-10min",
        measure=partial(speed_up, get=partial(language_runs, shape=H100), ours=("AMUSE",), least=1.2),
    ),
    Claim(
        name="vit-frontier",
        source="abstract; image experiments (fine-tuning there, from scratch here)",
        statement=BEST,
        paper_number="best (curves)",
        setting=VIT_SETTING,
        reproduced_if=BELOW,
        budget="h100-10min",
        measure=partial(frontier, get=vision_runs, ours=("AMUSE",)),
    ),
    Claim(
        name="vit-speed-up",
        source="abstract; image experiments (fine-tuning there, from scratch here)",
        statement=FASTER,
        paper_number="2.57x (fine-tuning a ViT), 1.34x (ResNet-50)",
        setting=VIT_SETTING + "; looked at every 50 steps",
        reproduced_if=AT_LEAST,
        budget="h100-10min",
        measure=partial(speed_up, get=vision_runs, ours=("AMUSE",), least=1.2),
    ),
]
