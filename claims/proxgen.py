"""Claims of "A General Family of Stochastic Proximal Gradient Methods for Deep Learning", arXiv 2007.07484.

The paper trains ResNet-34 and VGG-16 on CIFAR-10; its body could not be read, so that its numbers are not here, only
what its abstract and its code state. Here the same comparisons run on Fashion-MNIST with the perceptron of 300 and 100
hidden units that pruning papers use, 1,000 steps of 128 images, AdamW's metric without decay.

Strengths and rates are chosen on 5,000 training images that are held back; what is reported is of the test images. What
is trained stays in the scratch directory, so that claims share their runs.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.optim import ProxGen
from burnish.penalties import Lq, Wells, sparsity
from burnish.runs.claims import Claim, Measurement, Verdict

SEEDS = (0, 1, 2)
STEPS, ROWS, LR = 1000, 128, 1e-3
ZEROS = 0.9
"""Share of weights that are to be zero."""
STRENGTHS: dict[str, tuple[float, tuple[float, ...]]] = {
    "l1": (1.0, (3e-4, 6e-4, 1.2e-3)),
    "l2/3": (2 / 3, (3e-5, 7e-5, 1.5e-4)),
    "l1/2": (0.5, (2e-5, 4e-5, 8e-5)),
    "l0": (0.0, (1e-4, 3e-4, 1e-3)),
}
"""q, and strengths beside the mean loss that end on both sides of that share; found on a seed that is not used."""

QUANT_STEPS, QUANT_LR, FREEZE = 1200, 1e-2, 0.75
LEVELS: dict[str, tuple[float, ...]] = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0)}
RATES = {"revised": (1e-5, 1e-4, 1e-3), "original": (1e-3, 1e-2, 1e-1)}
"""The strength at the end of its linear growth; kappa is lr times it, divided by d in the revised form."""


@cache
def images(scratch: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [count, 784], standardised, and labels; fetched once (needs `apt-get` and `dpkg-deb`)."""
    folder = scratch / "fashion-mnist"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=temporary, check=True)
            package = next(Path(temporary).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=temporary, check=True)
            shutil.copytree(Path(temporary) / "unpacked" / "usr/share/datasets/fashion-mnist", folder)

    def read(kind: str, header: int) -> Tensor:
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz") as stream:
            return torch.frombuffer(bytearray(stream.read()[header:]), dtype=torch.uint8)

    pixels = read("images-idx3", 16).view(-1, 784).float().div_(255).sub_(0.2860).div_(0.3530)
    return pixels, read("labels-idx1", 8).long()


class Data:
    """Batches for training, images held back from it, test images."""

    def __init__(self, scratch: Path, seed: int) -> None:
        pixels, labels = images(scratch, "train")
        self.draw = torch.Generator().manual_seed(seed)
        self.train = pixels[:-5000], labels[:-5000]
        self.held = pixels[-5000:], labels[-5000:]
        self.test = images(scratch, "t10k")

    def loss(self, model: nn.Module) -> Tensor:
        picked = torch.randint(len(self.train[1]), (ROWS,), generator=self.draw)
        return nn.functional.cross_entropy(model(self.train[0][picked]), self.train[1][picked])

    @torch.no_grad()
    def accuracies(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        parts = {"held": self.held, "test": self.test}
        return {name: float((model(x).argmax(1) == y).float().mean()) for name, (x, y) in parts.items()}


def perceptron(seed: int, *, batch_norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for rows, columns in ((784, 300), (300, 100)):
            layers += [nn.Linear(rows, columns), *([nn.BatchNorm1d(columns)] if batch_norm else []), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(100, 10))


def prune(model: nn.Module, zeros: float) -> None:
    """Zero the smallest weights of all matrices together, until this share of them is zero."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    flat = torch.cat([p.detach().abs().flatten() for p in weights])
    bound = flat.kthvalue(max(1, math.ceil(zeros * flat.numel()))).values
    with torch.no_grad():
        for weight in weights:
            weight.masked_fill_(weight.abs() <= bound, 0.0)


def sparse_run(scratch: Path, way: str, kind: str, strength: float, seed: int) -> dict[str, Any]:
    """Train with a penalty by its map ("prox"), or in the loss ("subgradient")."""
    q = STRENGTHS[kind][0]
    model, data = perceptron(seed), Data(scratch, seed)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    penalty = Lq(q, strength) if way == "prox" else None
    optimizer = ProxGen(
        [{"params": weights, "penalty": penalty}, {"params": others, "penalty": None}], LR, weight_decay=0.0
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR if step < 0.6 * STEPS else 0.1 * LR
        loss = data.loss(model)
        if way == "subgradient":
            # As in the authors' code, which keeps the root away from zero.
            away = 0.0 if q == 1 else 1e-6
            loss = loss + strength * sum(((weight.abs() + away) ** q).sum() for weight in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found: dict[str, Any] = {"zeros": sparsity(model).share, "accuracy": data.accuracies(model)}
    prune(model, ZEROS)
    return found | {"pruned": data.accuracies(model), "pruned_zeros": sparsity(model).share}


def quantized_run(scratch: Path, form: str, kind: str, rate: float, seed: int) -> dict[str, Any]:
    """Train hidden weights towards levels, the strength growing; round at three quarters; train the rest on."""
    model, data = perceptron(seed, batch_norm=True), Data(scratch, seed)
    hidden = [module.weight for module in model if isinstance(module, nn.Linear)][:-1]
    others = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    metric = "preconditioner" if form == "revised" else "euclidean"
    wells = {"params": hidden, "penalty": Wells(rate, LEVELS[kind], clip=True), "metric": metric}
    optimizer = ProxGen([wells, {"params": others, "penalty": None}], QUANT_LR, weight_decay=0.0)
    distance = math.nan
    for step in range(QUANT_STEPS):
        progress = step / (FREEZE * QUANT_STEPS)
        if progress < 1:
            optimizer.scale_strength(progress)
        elif math.isnan(distance):
            before = [weight.detach().clone() for weight in hidden]
            optimizer.freeze()
            pairs = zip(before, hidden, strict=True)
            distance = statistics.fmean(float((a - b.detach()).abs().mean()) for a, b in pairs)
        optimizer.zero_grad()
        data.loss(model).backward()
        optimizer.step()
    return {"accuracy": data.accuracies(model), "distance_at_rounding": distance}


def remembered(scratch: Path, run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A run, trained unless an earlier claim left it."""
    name = "-".join(str(one).replace("/", ":") for one in (run.__name__, *arguments))
    file = scratch / "proxgen" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run(scratch, *arguments)), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def sparse_runs(scratch: Path, way: str, kind: str) -> list[dict[float, dict[str, Any]]]:
    """For each seed, runs by strength."""
    return [
        {strength: remembered(scratch, sparse_run, way, kind, strength, seed) for strength in STRENGTHS[kind][1]}
        for seed in SEEDS
    ]


def at_most(runs: dict[float, dict[str, Any]]) -> float:
    """Test accuracy with at most a tenth of the weights, at the strength that is best on images held back."""
    return float(max(runs.values(), key=lambda run: run["pruned"]["held"])["pruned"]["test"])


def spread(values: list[float], digits: int = 2, scale: float = 100) -> str:
    """Mean, and its 95 % interval over the seeds (Student's t with two degrees of freedom)."""
    half = 4.303 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * half:.{digits}f}"


def verdict(whole: bool, part: bool) -> Verdict:
    return "reproduced" if whole else "partly" if part else "not reproduced"


def exact_zeros(scratch: Path) -> Measurement:
    """Zeros of both ways at every strength."""
    kinds = ("l1", "l2/3", "l1/2")
    runs = {way: {kind: sparse_runs(scratch, way, kind) for kind in kinds} for way in ("prox", "subgradient")}

    def every(way: str, key: Callable[[dict[str, Any]], float], place: int) -> list[float]:
        return [key(list(seed.values())[place]) for kind in kinds for seed in runs[way][kind]]

    zeros = {way: every(way, lambda run: run["zeros"], -1) for way in runs}
    most = max(value for place in range(3) for value in every("subgradient", lambda run: run["zeros"], place))
    least = min(zeros["prox"])
    lost = [
        a - b
        for place in range(3)
        for a, b in zip(
            every("subgradient", lambda run: run["accuracy"]["test"], place),
            every("prox", lambda run: run["accuracy"]["test"], place),
            strict=True,
        )
    ]
    number = (
        f"exact zeros at the largest strengths: {least:.1%} or more with the map, {most:.2%} or less without; accuracy"
        f" {100 * statistics.fmean(lost):+.2f} points lost at equal strengths"
    )
    whole = most < 1e-3 and least > 0.5
    return Measurement(verdict(whole and statistics.fmean(lost) < 0.01, whole), number, {"runs": runs, "seeds": SEEDS})


def accuracy_at_zeros(scratch: Path) -> Measurement:
    """Of the four penalties by their maps."""
    runs = {kind: sparse_runs(scratch, "prox", kind) for kind in STRENGTHS}
    found = {kind: [at_most(seed) for seed in of_kind] for kind, of_kind in runs.items()}
    ahead = {kind: [a - b for a, b in zip(found[kind], found["l1"], strict=True)] for kind in ("l2/3", "l1/2", "l0")}
    paper = ("l2/3", "l1/2")
    number = ", ".join(f"{kind} {spread(values)}" for kind, values in found.items())
    return Measurement(
        verdict(all(min(ahead[kind]) > 0 for kind in paper), all(statistics.fmean(ahead[kind]) > 0 for kind in paper)),
        f"test accuracy with 90 % zeros: {number}",
        {"accuracy": found, "ahead_of_l1": ahead, "runs": runs, "seeds": SEEDS},
    )


def gap_by_penalty(scratch: Path) -> Measurement:
    """Map against subgradient, the latter pruned by magnitude to the same number of weights."""
    kinds = ("l1", "l2/3", "l1/2")
    gaps = {}
    for kind in kinds:
        ours, theirs = ([at_most(seed) for seed in sparse_runs(scratch, way, kind)] for way in ("prox", "subgradient"))
        gaps[kind] = [a - b for a, b in zip(ours, theirs, strict=True)]
    means = {kind: statistics.fmean(values) for kind, values in gaps.items()}
    whole = min(min(values) for values in gaps.values()) > 0 and min(means["l2/3"], means["l1/2"]) > means["l1"]
    number = ", ".join(f"{kind} {spread(values)}" for kind, values in gaps.items())
    return Measurement(
        verdict(whole, min(means.values()) > 0),
        f"points of accuracy ahead of the subgradient, pruned to 90 % zeros: {number}",
        {"gaps": gaps, "seeds": SEEDS},
    )


def revised_proxquant(scratch: Path) -> Measurement:
    """Each form at its best rate."""
    found: dict[str, dict[str, list[float]]] = {}
    chosen: dict[str, Any] = {}
    for kind in LEVELS:
        found[kind] = {}
        for form, rates in RATES.items():
            tried = {rate: remembered(scratch, quantized_run, form, kind, rate, SEEDS[0]) for rate in rates}
            best = max(tried, key=lambda rate: tried[rate]["accuracy"]["held"])
            runs = [remembered(scratch, quantized_run, form, kind, best, seed) for seed in SEEDS]
            found[kind][form] = [run["accuracy"]["test"] for run in runs]
            chosen[f"{kind}, {form}"] = {"rate": best, "tried": tried, "runs": runs}
    ahead = {kind: [a - b for a, b in zip(of["revised"], of["original"], strict=True)] for kind, of in found.items()}
    number = "; ".join(
        f"{kind}: {spread(of['revised'])} against {spread(of['original'])}" for kind, of in found.items()
    )
    return Measurement(
        verdict(min(map(min, ahead.values())) > 0, min(map(statistics.fmean, ahead.values())) > 0),
        f"test accuracy, revised against original, {number}",
        {"accuracy": found, "ahead": ahead, "chosen": chosen, "seeds": SEEDS},
    )


SETTING = (
    "Fashion-MNIST, 784-300-100-10 perceptron, 1,000 steps of 128 images, lr 1e-3 and a tenth of it from 60 % on, three"
    " strengths each, seeds 0-2"
)
CLAIMS = [
    Claim(
        "prox-exact-zeros",
        "arXiv 2007.07484, abstract and released code",
        "The proximal map sets weights to zero while training; a penalty in the loss leaves none at zero.",
        "-",
        SETTING + "; l1, l2/3, l1/2",
        "subgradient: under 0.1 % exact zeros in every run; map: over 50 % at the largest strengths in every run; at"
        " most 1 point of accuracy lost in the mean at equal strengths (without the last: partly)",
        "cpu-minutes",
        exact_zeros,
    ),
    Claim(
        "nonconvex-against-l1",
        "arXiv 2007.07484, section 5 as its code runs it",
        "At equal sparsity non-convex penalties (l2/3, l1/2) cost less accuracy than l1.",
        "-",
        SETTING + "; at most 10 % of the weights kept, strength chosen on images held back",
        "l2/3 and l1/2 above l1 for every seed; partly if above in the mean",
        "cpu-minutes",
        accuracy_at_zeros,
    ),
    Claim(
        "prox-against-subgradient",
        "arXiv 2007.07484, abstract",
        "The map beats subgradients, by more where the penalty is not convex.",
        "-",
        SETTING + "; subgradient runs pruned by magnitude to 10 % of the weights, each way at its best strength",
        "ahead for l1, l2/3 and l1/2 and every seed, and the mean gap of l2/3 and l1/2 above that of l1; partly if"
        " ahead in the mean for all three",
        "cpu-minutes",
        gap_by_penalty,
    ),
    Claim(
        "revised-proxquant",
        "arXiv 2007.07484, abstract",
        "ProxQuant's map in the metric of the preconditioner gives better quantised networks than its original form.",
        "-",
        "Fashion-MNIST, the same perceptron with batch norm, hidden weights on (-1, 1) or (-1, 0, 1), Adam lr 0.01,"
        " 1,200 steps of 128 images, strength growing linearly, rounded at 75 %, three rates each, seeds 0-2",
        "revised above original for every seed, binary and ternary; partly if above in the mean for both",
        "cpu-minutes",
        revised_proxquant,
    ),
]
