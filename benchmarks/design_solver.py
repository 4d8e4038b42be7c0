"""A preferential G-optimal design over many pairs: our two solvers against the plain forms of both algorithms.

Every side gets the same differences and stops at the same certificate, the largest leverage over the rank, which is
then computed anew from its weights. Each run is a process of its own; peak memory is what it adds to the differences::

    python benchmarks/design_solver.py
    python benchmarks/design_solver.py --pairs 20000 --rounds 1 --dry

The results are appended to `results/design_solver.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.align.design import g_optimal_design, pair_differences
from burnish.runs import environment

RESULTS = Path(__file__).parent / "results" / "design_solver.json"
BAR = 10.0
"""Seconds on two cores to within 1 % of the optimum, 100,000 pairs of 64 features."""
TOLERANCE = 0.01
CLOCKS = ("seconds", "processor_seconds")
"""On a busy machine the second says more: time of all threads, without that of other processes."""
CANDIDATES = 8


def gaussian(pairs: int, dimension: int, draw: torch.Generator) -> Tensor:
    return torch.randn(pairs, dimension, dtype=torch.float64, generator=draw)


def sphere(pairs: int, dimension: int, draw: torch.Generator) -> Tensor:
    """All pairs are equally long, so that thousands of them matter."""
    return torch.nn.functional.normalize(gaussian(pairs, dimension, draw), dim=1)


def prompts(pairs: int, dimension: int, draw: torch.Generator) -> Tensor:
    """All pairs of 8 candidates a prompt; features fall off over two decades, prompts differ in how varied they are."""
    number = -(-pairs // (CANDIDATES * (CANDIDATES - 1) // 2))
    features = gaussian(number * CANDIDATES, dimension, draw).view(number, CANDIDATES, dimension)
    features *= torch.logspace(0, -2, dimension, dtype=torch.float64)
    features *= torch.exp(0.5 * gaussian(number, 1, draw)).unsqueeze(2)
    return pair_differences(features)[0][:pairs].contiguous()


PROBLEMS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "prompts": prompts,
    "gaussian": gaussian,
    "sphere": sphere,
}


def leverages(differences: Tensor, weights: Tensor) -> Tensor:
    factor = torch.linalg.cholesky((differences * weights[:, None]).mT @ differences)
    return ((differences @ torch.cholesky_inverse(factor)) * differences).sum(1)


def plain_multiplicative(differences: Tensor, limit: float) -> tuple[Tensor, int]:
    """weights <- weights lev / d, from uniform ones."""
    rank, start, steps = differences.shape[1], time.process_time(), 0
    weights = torch.full((len(differences),), 1 / len(differences), dtype=torch.float64)
    while time.process_time() - start < limit:
        found = leverages(differences, weights) / rank
        if float(found.max()) <= 1 + TOLERANCE:
            break
        weights, steps = weights * found, steps + 1
    return weights, steps


def plain_frank_wolfe(differences: Tensor, limit: float) -> tuple[Tensor, int]:
    """Towards the pair of largest leverage by (lev / d - 1) / (lev - 1), from uniform weights."""
    rank, start, steps = differences.shape[1], time.process_time(), 0
    weights = torch.full((len(differences),), 1 / len(differences), dtype=torch.float64)
    while time.process_time() - start < limit:
        found = leverages(differences, weights)
        best = int(found.argmax())
        level = float(found[best])
        if level <= (1 + TOLERANCE) * rank:
            break
        size = (level / rank - 1) / (level - 1)
        weights *= 1 - size
        weights[best] += size
        steps += 1
    return weights, steps


def ours(solver: str) -> Callable[[Tensor, float], tuple[Tensor, int]]:
    def run(differences: Tensor, limit: float) -> tuple[Tensor, int]:
        design = g_optimal_design(differences, solver=solver, tolerance=TOLERANCE)
        return design.weights, design.steps

    return run


SIDES: dict[str, Callable[[Tensor, float], tuple[Tensor, int]]] = {
    "ours, multiplicative": ours("multiplicative"),
    "ours, frank-wolfe": ours("frank-wolfe"),
    "plain multiplicative": plain_multiplicative,
    "plain frank-wolfe": plain_frank_wolfe,
}


def one(problem: str, side: str, pairs: int, dimension: int, threads: int, limit: float) -> dict[str, Any]:
    torch.set_num_threads(threads)
    differences = PROBLEMS[problem](pairs, dimension, torch.Generator().manual_seed(0))
    small = differences[:500]
    SIDES[side](small.clone(), 0.1)  # loads and plans what the libraries load and plan once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    weights, steps = SIDES[side](differences, limit)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "seconds": wall,
        "processor_seconds": processor,
        "steps": steps,
        "support": int((weights > 0).sum()),
        "leverage_over_rank": float(leverages(differences, weights).max()) / dimension,
        "added_mb": added / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of our sides; the plain ones run once")
    parser.add_argument(
        "--limit", type=float, default=120, help="processor seconds after which a plain side is stopped"
    )
    parser.add_argument("--dry", action="store_true", help="print, keep nothing")
    parser.add_argument("--one", nargs=2, metavar=("PROBLEM", "SIDE"), help="a single run in this process")
    arguments = parser.parse_args()
    size = (arguments.pairs, arguments.dimension, arguments.threads, arguments.limit)
    if arguments.one:
        print(json.dumps(one(*arguments.one, *size)))
        return
    options = [f"--{name}={getattr(arguments, name)}" for name in ("pairs", "dimension", "threads", "limit")]
    found: dict[str, dict[str, Any]] = {}
    for number in range(arguments.rounds):
        for problem in PROBLEMS:
            for side in SIDES:
                if number and side.startswith("plain"):
                    continue
                command = [sys.executable, __file__, *options, "--one", problem, side]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                run = json.loads(done.stdout.splitlines()[-1])
                kept = found.setdefault(problem, {}).setdefault(side, run | {clock: [] for clock in CLOCKS})
                for clock in CLOCKS:
                    kept[clock].append(run[clock])
    for by_side in found.values():
        for kept in by_side.values():
            kept["median"] = {clock: statistics.median(kept[clock]) for clock in CLOCKS}
    result = {
        "setting": {key: value for key, value in vars(arguments).items() if key not in ("dry", "one")},
        "bar": BAR,
        "problems": found,
        "environment": environment(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))
    if not arguments.dry:
        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*earlier, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
