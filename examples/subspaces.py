"""Does training happen in the few steepest directions of the loss? A network of four classes, on a CPU, in seconds.

A small network is trained by SGD. Then training goes on three times from the same point: as it is, with its updates cut
down to the span of the top four eigenvectors of the Hessian ("dominant"), and with just those cut out ("bulk"). At last
the same gradients are turned into updates of SGD with momentum and of Muon, to see how much of each lies in the bulk::

    python examples/subspaces.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot
from torch.optim import SGD, Optimizer

from burnish.diagnose import (
    ProjectedTraining,
    SignalAndNoise,
    SubspaceRecorder,
    loss_gradient,
    signal_and_noise,
    top_eigenpairs,
    update_of,
)
from burnish.optim import Muon

CLASSES, FEATURES, SAMPLES, BATCH, LR = 4, 16, 1000, 10, 0.2


class Problem:
    """Four overlapping clouds of points, and a network of three layers that tells them apart."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(CLASSES, FEATURES, generator=self.generator)
        labels = torch.arange(SAMPLES) % CLASSES
        self.inputs = centres[labels] + 0.5 * torch.randn(SAMPLES, FEATURES, generator=self.generator)
        self.targets = one_hot(labels, CLASSES).float()
        self.model = nn.Sequential(
            nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)
        )
        for parameter in self.model.parameters():
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=self.generator)

    def loss(self) -> Tensor:
        """The loss over all samples."""
        return mse_loss(self.model(self.inputs), self.targets)

    def batch_loss(self) -> Tensor:
        """The loss over samples drawn at random."""
        drawn = torch.randint(SAMPLES, (BATCH,), generator=self.generator)
        return mse_loss(self.model(self.inputs[drawn]), self.targets[drawn])

    def train(self, optimizer: Optimizer, steps: int) -> float:
        """Train, and give the loss over all samples."""
        for _ in range(steps):
            optimizer.zero_grad()
            self.batch_loss().backward()
            optimizer.step()
        return self.loss().item()


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table."""
    print(f"\n{title}")
    for row in (columns, *rows):
        print("  " + "".join(f"{cell:>14.4g}" if isinstance(cell, float) else f"{cell!s:>14}" for cell in row))


def warm_up(problem: Problem, steps: int, directory: Path | None) -> None:
    """Train by SGD, and watch its gradient and updates; writes `subspace.jsonl` into a directory."""
    optimizer = SGD(problem.model.parameters(), lr=LR)
    recorder = SubspaceRecorder(
        optimizer, problem.loss, problem.model, CLASSES, every=steps // 6, directory=directory, overwrite=True
    )
    with recorder:
        problem.train(optimizer, steps)
    columns = ("step", "sharpness", "chi(gradient)", "chi(update)", "bulk share")
    rows = (
        (seen.step, seen.eigenvalues[0], seen.gradient_alignment, seen.update_alignment, seen.bulk_share)
        for seen in recorder.measurements
    )
    show(f"SGD, and the top {CLASSES} eigenvectors of the Hessian", columns, rows)


def continue_projected(problem: Problem, steps: int) -> dict[str, list[float]]:
    """Losses of three trainings from the same point on the same batches."""
    start, drawn = copy.deepcopy(problem.model.state_dict()), problem.generator.get_state()
    losses: dict[str, list[float]] = {}
    for part in ("whole", "dominant", "bulk"):
        problem.model.load_state_dict(start)
        problem.generator.set_state(drawn)
        optimizer = SGD(problem.model.parameters(), lr=LR)
        if part != "whole":
            ProjectedTraining(optimizer, problem.loss, problem.model, CLASSES, part=part, refresh_every=5, tol=0.01)
        losses[part] = [problem.loss().item(), *(problem.train(optimizer, steps // 4) for _ in range(4))]
    problem.model.load_state_dict(start)
    return losses


def muon_and_momentum(problem: Problem, samples: int) -> dict[str, SignalAndNoise]:
    """The update that each optimizer makes of a batch, over and over at the same point, for the weight matrices."""
    matrices = [parameter for parameter in problem.model.parameters() if parameter.ndim == 2]
    subspace = top_eigenpairs(problem.loss, matrices, CLASSES)

    def updates(optimizer: Optimizer) -> Iterator[Tensor]:
        for _ in range(samples):
            problem.model.zero_grad()
            problem.batch_loss().backward()
            yield update_of(optimizer, matrices)

    optimizers = {
        "SGD momentum": SGD(matrices, lr=0.0, momentum=0.95, nesterov=True),
        "Muon": Muon(matrices, lr=0.0, weight_decay=0.0),
    }
    sizes = [matrix.numel() for matrix in matrices]
    for matrix, gradient in zip(matrices, loss_gradient(problem.loss, matrices).split(sizes), strict=True):
        matrix.grad = gradient.view_as(matrix)
    for optimizer in optimizers.values():
        for _ in range(20):  # without moving: a momentum as after many steps
            optimizer.step()
        optimizer.param_groups[0]["lr"] = LR
    return {name: signal_and_noise(updates(optimizer), subspace) for name, optimizer in optimizers.items()}


def main() -> None:
    """Run it all and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of SGD, and of each training after it")
    parser.add_argument("--samples", type=int, default=200, help="batches for signal and noise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory for subspace.jsonl, which `burnish report` draws")
    args = parser.parse_args()

    problem = Problem(args.seed)
    warm_up(problem, args.steps, args.out)
    values = top_eigenpairs(problem.loss, problem.model, 2 * CLASSES).values
    show(f"the top {2 * CLASSES} eigenvalues after that", range(1, 2 * CLASSES + 1), [values.tolist()])

    losses = continue_projected(problem, args.steps)
    columns = ("updates", *(f"+{args.steps // 4 * quarter} steps" for quarter in range(5)))
    show("loss, going on with a part of each update", columns, ((part, *course) for part, course in losses.items()))

    split = muon_and_momentum(problem, args.samples)
    rows = (
        (name, 1 - seen.signal_alignment**2, seen.signal_alignment, seen.noise_alignment,
         seen.dominant_noise / seen.dominant_signal, seen.bulk_noise / seen.bulk_signal)
        for name, seen in split.items()
    )  # fmt: skip
    columns = ("optimizer", "bulk share", "chi(signal)", "chi(noise)", "n/s dominant", "n/s bulk")
    show("updates of the weight matrices at one point: mean (signal, s) and scatter (noise, n)", columns, rows)


if __name__ == "__main__":
    main()
