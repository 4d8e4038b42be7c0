"""Claims of "Stochastic Gradient Methods with Block Diagonal Matrix Adaptation", arXiv 1905.10757.

The paper (AdaBlock, AISTATS 2022) reports convergence and generalisation on image and language tasks; no numbers could
be recovered, only what the abstracts say. Here it is asked of small networks on Fashion-MNIST, and of a quadratic.
Seeds train side by side, their blocks apart; what was trained stays in the scratch directory.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from burnish.optim import BlockDiagonal, SpectrumClip
from burnish.runs.claims import Claim, Measurement

SEEDS = (0, 1, 2)
STEPS = 400
LONG = 1500
BATCH = 128
WIDTHS = (196, 64, 64, 10)
Found = dict[str, list[float]]


@cache
def neighbour(name: str) -> ModuleType:
    """Another file of claims, whose data and ways of choosing are used again."""
    spec = importlib.util.spec_from_file_location(f"claims_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


@cache
def images(scratch: Path, pool: int) -> dict[str, Tensor]:
    """Fashion-MNIST, averaged over pool x pool: 20,000 images to train, 5,000 to choose by, 10,000 to test."""
    data = neighbour("amuse").fashion_mnist(scratch)

    def rows(pixels: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(pixels.unsqueeze(1) / 255, pool).flatten(1)
        return (pooled - 0.286) / 0.353

    order = torch.randperm(len(data["train-images"]), generator=torch.Generator().manual_seed(0))
    train, valid = order[:20_000], order[20_000:25_000]
    pixels, classes = data["train-images"], data["train-labels"].long()
    return {
        "train": rows(pixels[train]), "train classes": classes[train],
        "valid": rows(pixels[valid]), "valid classes": classes[valid],
        "test": rows(data["t10k-images"]), "test classes": data["t10k-labels"].long(),
    }  # fmt: skip


class Networks(nn.Module):
    """A perceptron for each seed, all weights of one in a row of a flat tensor: a block can hold any neighbours.

    Matrices are stored [in, out], so that neighbours are weights that leave one input.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = list(pairwise(widths))
        rows = []
        for seed in SEEDS:
            draw = torch.Generator().manual_seed(seed)
            pieces = []
            for into, out in self.shapes:
                pieces.append((2 * torch.rand(into * out, generator=draw) - 1) / math.sqrt(into))
                pieces.append(torch.zeros(out))
            rows.append(torch.cat(pieces))
        self.flat = nn.Parameter(torch.stack(rows))  # [seeds, weights]

    def forward(self, inputs: Tensor) -> Tensor:  # [seeds, samples, in] -> [seeds, samples, out]
        sizes = [size for into, out in self.shapes for size in (into * out, out)]
        pieces = torch.split(self.flat, sizes, dim=1)
        for number, (into, out) in enumerate(self.shapes):
            weight, bias = pieces[2 * number].view(-1, into, out), pieces[2 * number + 1].unsqueeze(1)
            inputs = torch.baddbmm(bias, inputs if number == 0 else inputs.relu(), weight)
        return inputs


def perceptrons(widths: tuple[int, ...]) -> nn.Module:
    """As `Networks`, with a stack of matrices [seeds, out, in] for each layer."""
    model: nn.Module = neighbour("amuse").Perceptrons(
        [torch.Generator().manual_seed(seed) for seed in SEEDS], widths, torch.float32
    )
    return model


def stacks_alone(name: str, tensor: Tensor) -> str:
    """A stack [seeds, out, in] is grouped, a stack of biases is not: its columns would mix seeds."""
    return "input" if tensor.ndim == 3 else "diagonal"


def outputs_of_stacks(name: str, tensor: Tensor) -> str:
    return "output" if tensor.ndim == 3 else "diagonal"


def train(scratch: Path, model: nn.Module, optimizer: BlockDiagonal, pool: int, steps: int) -> Found:
    """Train all seeds; losses and accuracies of each at the end, and seconds of one step of the optimizer."""
    data = images(scratch, pool)
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in SEEDS]
    times = []
    for _ in range(steps):
        picked = torch.stack([torch.randint(len(data["train"]), (BATCH,), generator=draw) for draw in draws])
        logits = model(data["train"][picked])
        optimizer.zero_grad()
        # The sum over networks leaves each the gradient of its own mean.
        classes = data["train classes"][picked].flatten()
        (nn.functional.cross_entropy(logits.flatten(0, 1), classes) * len(SEEDS)).backward()
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    found: Found = {"seconds": [statistics.median(times)], "fallbacks": [optimizer.fallbacks]}
    with torch.no_grad():
        for part in ("train", "valid", "test"):
            classes = data[f"{part} classes"].expand(len(SEEDS), -1)
            logits = model(data[part].expand(len(SEEDS), -1, -1))
            losses = nn.functional.cross_entropy(logits.mT, classes, reduction="none").mean(1)
            found[f"{part} loss"] = losses.nan_to_num(nan=math.inf).tolist()
            found[f"{part} accuracy"] = (logits.argmax(-1) == classes).float().mean(1).tolist()
    return found


def remembered(scratch: Path, name: str, measure: Callable[[], Found]) -> Found:
    """What a run found, measured unless an earlier one left it."""
    file = scratch / "block-diagonal" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure()), encoding="utf-8")
    found: Found = json.loads(file.read_text(encoding="utf-8"))
    return found


def best(run: Callable[[float], Found], by: str) -> tuple[float, Found, dict[float, float]]:
    """The learning rate, by halving and doubling, with the lowest mean of a loss; its run, and what was tried."""
    lr, tried = neighbour("amuse").best_rate(lambda lr: statistics.fmean(run(lr)[by]))
    return lr, run(lr), tried


def mlp(scratch: Path, lr: float, size: int, rule: Any = stacks_alone, steps: int = STEPS, **options: Any) -> Found:
    """The perceptron 196-64-64-10."""
    more = "".join(f"-{key}-{value}" for key, value in options.items())
    clip = options.get("clip")
    if clip is not None:
        more = f"-clip-{clip.final_lr:g}-{clip.gamma:g}"

    def measure() -> Found:
        model = perceptrons(WIDTHS)
        optimizer = BlockDiagonal(
            model.named_parameters(), lr, block_size=size, grouping=rule, remainder="smaller", **options
        )
        return train(scratch, model, optimizer, 2, steps)

    return remembered(scratch, f"mlp-{rule.__name__}-{size}-{steps}-{lr:g}{more}", measure)


def tiny(scratch: Path, lr: float, size: int, form: str) -> Found:
    """The perceptron 16-8-16 of 280 weights, in blocks of consecutive ones; 280 is the full matrix."""

    def measure() -> Found:
        model = Networks((16, 8, 16))
        optimizer = BlockDiagonal(
            model.parameters(), lr, block_size=size, grouping="output", remainder="smaller", form=form
        )
        return train(scratch, model, optimizer, 7, STEPS)

    return remembered(scratch, f"tiny-{form}-{size}-{lr:g}", measure)


def compared(
    ways: dict[str, Callable[[float], Found]], by: str
) -> tuple[dict[str, Found], dict[str, Any]]:  # runs, details
    runs, details = {}, {}
    for name, way in ways.items():
        lr, found, tried = best(way, by)
        runs[name] = found
        details[name] = {"lr": lr, "tried": tried, **found}
    return runs, details


def losses(runs: dict[str, Found], by: str) -> str:
    spread = neighbour("amuse").spread
    return "; ".join(f"{name} {spread(found[by], 4)}" for name, found in runs.items())


def below(runs: dict[str, Found], one: str, other: str, by: str = "train loss") -> bool:
    return all(a < b for a, b in zip(runs[one][by], runs[other][by], strict=True))


def full_matrix(scratch: Path) -> Measurement:
    """Train loss of the small network by block size, for all three forms."""
    runs, details = {}, {}
    for form in ("adam", "rmsprop", "adagrad"):
        ways = {f"{form} {size}": partial(tiny, scratch, size=size, form=form) for size in (1, 8, 280)}
        some, more = compared(ways, "train loss")  # type: ignore[arg-type]
        runs |= some
        details |= more
    forms = ("adam", "rmsprop", "adagrad")
    blocks = [below(runs, f"{form} 8", f"{form} 1") for form in forms]
    full = [below(runs, f"{form} 280", f"{form} 8") for form in forms]
    return Measurement(
        neighbour("amuse").verdict(all(blocks) and all(full), blocks[0]),
        f"train loss after {STEPS} steps, by block size: {losses(runs, 'train loss')}",
        {"runs": details, "seeds": SEEDS},
    )


SIZES = (1, 4, 8, 16)


def by_size(scratch: Path) -> tuple[dict[str, Found], dict[str, Any]]:
    ways: dict[str, Callable[[float], Found]] = {
        f"input {size}" if size > 1 else "diagonal": partial(mlp, scratch, size=size) for size in SIZES
    }
    ways["output 8"] = partial(mlp, scratch, size=8, rule=outputs_of_stacks)
    return compared(ways, "train loss")


def convergence(scratch: Path) -> Measurement:
    """Train loss of the larger network by size and kind of block."""
    runs, details = by_size(scratch)
    ahead = [below(runs, name, "diagonal") for name in runs if name != "diagonal"]
    times = {name: found["seconds"][0] / runs["diagonal"]["seconds"][0] for name, found in runs.items()}
    slower = ", ".join(f"{name} {ratio:.0f}" for name, ratio in times.items())
    return Measurement(
        neighbour("amuse").verdict(all(ahead), any(ahead)),
        f"train loss after {STEPS} steps: {losses(runs, 'train loss')}; time of a step over the diagonal's: {slower}",
        {"runs": details, "seeds": SEEDS},
    )


def random_layers(scratch: Path) -> Measurement:
    """One of three layers drawn at each step, against all of them and against none."""
    runs, details = by_size(scratch)
    runs = {name: runs[name] for name in ("diagonal", "input 8")}
    some, more = compared({"1 of 3": partial(mlp, scratch, size=8, layers_per_step=1)}, "train loss")
    runs, details = runs | some, details | more
    # Times of runs of different minutes do not compare: both sides by turns, on the weights of the network.
    ratio = time_ratio({"layers_per_step": 1})
    kept = time_ratio({"update_every": 10})
    return Measurement(
        neighbour("amuse").verdict(
            below(runs, "1 of 3", "diagonal") and ratio <= 0.6, below(runs, "1 of 3", "diagonal") or ratio <= 0.6
        ),
        f"train loss after {STEPS} steps: {losses(runs, 'train loss')}; time over that of all blocks: 1 of 3 layers"
        f" {ratio:.2f}, roots kept for 10 steps {kept:.2f}",
        {"runs": {name: details[name] for name in runs}, "ratio": ratio, "kept": kept, "seeds": SEEDS},
    )


def time_ratio(options: dict[str, Any], rounds: int = 5) -> float:
    """Mean time of thirty steps with options over that without, both by turns; the median of rounds."""

    def make(options: dict[str, Any]) -> BlockDiagonal:
        model = perceptrons(WIDTHS)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return BlockDiagonal(
            model.named_parameters(), block_size=8, grouping=stacks_alone, remainder="smaller", **options
        )

    sides = (make(options), make({}))
    for side in sides:
        for _ in range(20):
            side.step()
    ratios = []
    for _ in range(rounds):
        spent = []
        for side in sides:
            start = time.perf_counter()
            for _ in range(30):
                side.step()
            spent.append(time.perf_counter() - start)
        ratios.append(spent[0] / spent[1])
    return statistics.median(ratios)


def clipping(scratch: Path) -> Measurement:
    """Test accuracy with and without bounds, both chosen by the loss on images kept for that."""
    plain, details = compared({"unclipped": partial(mlp, scratch, size=8, steps=LONG)}, "valid loss")
    lr = details["unclipped"]["lr"]

    def clipped(final_lr: float) -> Found:
        return mlp(scratch, lr, size=8, steps=LONG, clip=SpectrumClip(10 * final_lr, 5e-3))

    # best_rate starts at 0.01: final_lr is ten times what it tries.
    runs, more = compared({"clipped": clipped}, "valid loss")
    diagonal, others = compared({"diagonal": partial(mlp, scratch, size=1, steps=LONG)}, "valid loss")
    runs = {**plain, **runs, **diagonal}
    gains = [a - b for a, b in zip(runs["clipped"]["test accuracy"], runs["unclipped"]["test accuracy"], strict=True)]
    gaps = {
        name: statistics.fmean(found["test loss"]) - statistics.fmean(found["train loss"])
        for name, found in runs.items()
    }
    gap = ", ".join(f"{name} {value:.3f}" for name, value in gaps.items())
    return Measurement(
        neighbour("amuse").verdict(min(gains) > 0, statistics.fmean(gains) > 0),
        f"test accuracy after {LONG} steps: {losses(runs, 'test accuracy')}; test loss less train loss: {gap}",
        {"runs": details | more | others, "gains": gains, "gaps": gaps, "seeds": SEEDS},
    )


QUADRATIC_STEPS = 3000
QUADRATIC_SIZES = (1, 4, 16)


def quadratic(scratch: Path) -> Measurement:
    """Loss on rotated quadratics, one for each seed, by block size."""
    curvatures, starts = [], []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=draw))[0]
        curvatures.append((q * torch.logspace(0, -4, 16, dtype=torch.float64)) @ q.T)
        starts.append(torch.randn(16, dtype=torch.float64, generator=draw))
    curvature, start = torch.stack(curvatures), torch.stack(starts)

    def run(lr: float, size: int) -> Found:
        x = nn.Parameter(start.clone())  # [seeds, 16]
        optimizer = BlockDiagonal([x], lr, block_size=size, grouping="output")
        for _ in range(QUADRATIC_STEPS):
            x.grad = torch.einsum("sij,sj->si", curvature, x.detach())
            optimizer.step()
        return {"train loss": (torch.einsum("si,sij,sj->s", x, curvature, x) / 2).tolist()}

    runs, details = compared(
        {
            f"blocks of {size}": partial(
                lambda lr, size: remembered(scratch, f"quadratic-{size}-{lr:g}", partial(run, lr, size)), size=size
            )
            for size in QUADRATIC_SIZES
        },
        "train loss",
    )
    one, four, full = (runs[f"blocks of {size}"]["train loss"] for size in QUADRATIC_SIZES)
    far = all(c < 0.01 * a for a, c in zip(one, full, strict=True))
    between = all(c < b < a for a, b, c in zip(one, four, full, strict=True))
    number = "; ".join(
        f"{name} {statistics.fmean(found['train loss']):.1e} ({', '.join(f'{x:.0e}' for x in found['train loss'])})"
        for name, found in runs.items()
    )
    return Measurement(
        neighbour("amuse").verdict(far and between, far),
        f"loss after {QUADRATIC_STEPS:,} steps: {number}",
        {"runs": details, "seeds": SEEDS},
    )


CHOSEN = "each at the learning rate with the lowest mean, by halving and doubling"
MLP_SETTING = (
    "perceptron 196-64-64-10 with ReLU on 20,000 images of Fashion-MNIST averaged over 2 x 2, batches of 128, Adam"
    f" form, {CHOSEN}; biases diagonal; seeds 0-2 (start and batches), float32, one thread"
)

CLAIMS = [
    Claim(
        name="rotated-quadratic",
        source="abstract (block-diagonal approximation of the full second moment); the problem is ours",
        statement="The more of the correlated coordinates share a block, the faster; the diagonal is slowest.",
        paper_number="-",
        setting=f"quadratic of 16 dimensions, condition 1e4, rotated at random, {QUADRATIC_STEPS:,} steps without"
        f" noise, Adam form, float64, {CHOSEN}; seeds 0-2 (rotation and start)",
        reproduced_if="one block of all below a hundredth of the diagonal, blocks of 4 between them, every seed; partly"
        " if the first",
        budget="cpu-minutes",
        measure=quadratic,
    ),
    Claim(
        name="block-against-full-matrix",
        source="abstract: better than diagonal methods and than a modified full-matrix one",
        statement="Block-diagonal forms converge faster than the diagonal ones, the full matrix faster still.",
        paper_number="curves",
        setting=f"perceptron 16-8-16 of 280 weights on 20,000 images of Fashion-MNIST averaged over 7 x 7, {STEPS}"
        f" steps of 128, {CHOSEN}; blocks of 1, of 8 weights of one input, of all 280; Adam, RMSprop and Adagrad forms;"
        " train loss over all images, seeds 0-2, one thread",
        reproduced_if="8 below 1 and 280 below 8, every form and seed; partly if 8 below 1 in the Adam form, each seed",
        budget="cpu-minutes",
        measure=full_matrix,
    ),
    Claim(
        name="convergence-by-block-size",
        source="abstract: significantly improves convergence",
        statement="Adam with blocks of input neurons has a lower train loss than Adam at equal steps.",
        paper_number="curves",
        setting=f"{MLP_SETTING}; {STEPS} steps; train loss over all images; blocks of 4, 8, 16 by input, 8 by output",
        reproduced_if="every kind of block below the diagonal, every seed; partly if one kind is",
        budget="cpu-minutes",
        measure=convergence,
    ),
    Claim(
        name="random-layers",
        source="AISTATS 2022 version, the randomised layer-wise variant",
        statement="Decomposing the blocks of a few random layers a step keeps the gain at a fraction of the time.",
        paper_number="-",
        setting=f"{MLP_SETTING}; {STEPS} steps; one of three layers drawn at each; time of optimizer steps by turns",
        reproduced_if="train loss below the diagonal's, every seed, in at most 0.6 of the time of all blocks; partly if"
        " one of the two",
        budget="cpu-minutes",
        measure=random_layers,
    ),
    Claim(
        name="spectrum-clipping-generalises",
        source="abstract: improves out-of-sample generalisation, with clipping of the spectrum",
        statement="Bounds on the eigen-steps that close upon those of SGD raise test accuracy.",
        paper_number="curves",
        setting=f"{MLP_SETTING}, here by the loss on 5,000 other images; {LONG:,} steps (9.6 passes), blocks of 8 by"
        " input; clipped at the same lr with gamma 5e-3 and the final_lr chosen likewise; 10,000 test images",
        reproduced_if="test accuracy above that of the unclipped blocks, every seed; partly if the mean is",
        budget="cpu-minutes",
        measure=clipping,
    ),
]
