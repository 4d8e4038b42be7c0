"""A step of ProxGen against plain AdamW over the tensors of a real model.

One command times all sides in turn in one process on the same tensors, and appends to `results/prox_step.json`::

    python benchmarks/prox_step.py --threads 1
    python benchmarks/prox_step.py --threads 2

Before any time is taken, a step of each penalty is compared with `torch.optim.AdamW` and the map of the penalty on
what that gives. `ProxGen` looks for NaN in the gradients at every step, torch does not; the check is in our times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from burnish.optim import ProxGen
from burnish.penalties import GroupLasso, Lq, Penalty, Wells
from burnish.runs import environment

RESULTS = Path(__file__).parent / "results" / "prox_step.json"
BAR = 1.10
"""Of the time of `torch.optim.AdamW(foreach=True)`, for the sides with l1 and l1/2."""
LR = 1e-5
PENALTIES: dict[str, Penalty | None] = {
    "none": None,
    "l1": Lq(1.0, 1e-4),
    "l1/2": Lq(0.5, 1e-5),
    "l0": Lq(0.0, 1e-6),
    "l2/3": Lq(2 / 3, 1e-5),
    "binary wells": Wells(1e-4),
    "rows": GroupLasso(1e-4),
}


def optim_step() -> ModuleType:
    """The benchmark beside this one, for its tensors."""
    spec = importlib.util.spec_from_file_location("optim_step", Path(__file__).with_name("optim_step.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sides(tensors: list[Tensor]) -> dict[str, Callable[[], Any]]:
    adamw = {"lr": LR, "weight_decay": 0.01}
    found: dict[str, Callable[[], Any]] = {
        "torch-adamw-foreach": torch.optim.AdamW(tensors, foreach=True, **adamw).step,
        "torch-adamw-fused": torch.optim.AdamW(tensors, fused=True, **adamw).step,
    }
    matrices = [tensor for tensor in tensors if tensor.ndim > 1]
    vectors = [tensor for tensor in tensors if tensor.ndim < 2]
    ours = ProxGen([{"params": matrices}, {"params": vectors, "penalty": None}], **adamw)

    def step(penalty: Penalty | None) -> None:
        # One optimizer for all penalties: a state for each would not fit.
        ours.param_groups[0]["penalty"] = None if penalty is None else penalty.to_dict()
        ours.step()

    return found | {f"proxgen, {name}": partial(step, penalty) for name, penalty in PENALTIES.items()}


def check_equal() -> dict[str, float]:
    """Largest difference between a first step of ours and the map on what AdamW gives, over the largest movement."""
    found = {}
    for name, penalty in PENALTIES.items():
        draw = torch.Generator().manual_seed(0)
        start = 0.02 * torch.randn(300, 200, generator=draw)
        gradient = torch.randn(300, 200, generator=draw)
        moved = []
        for kind in (ProxGen, torch.optim.AdamW):
            weight = nn.Parameter(start.clone())
            weight.grad = gradient.clone()
            options = {"penalty": penalty} if kind is ProxGen else {}
            kind([weight], lr=1e-3, weight_decay=0.01, **options).step()
            moved.append(weight.detach())
        expected = moved[1] if penalty is None else penalty.prox(moved[1], 1e-3, gradient.abs() + 1e-8)
        found[name] = float((moved[0] - expected).abs().max() / (expected - start).abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", help="as in optim_step.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: on a busy machine")
    parser.add_argument("--dry", action="store_true", help="print, keep nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    differences = check_equal()
    assert all(value < 1e-4 for value in differences.values()), f"not the map on AdamW's step: {differences}"
    groups = optim_step().groups(arguments.shape, torch.device("cpu"), torch.float32)
    steps = sides([tensor for group in groups for tensor in group["params"]])
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    times: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(arguments.rounds + 1):
        for side in list(steps) if number % 2 == 0 else reversed(steps):
            start = clock()
            steps[side]()
            if number:  # the first round is warmup
                times[side].append(clock() - start)
    ratios = {}
    for side in [side for side in steps if side.startswith("proxgen")]:
        each = [a / b for a, b in zip(times[side], times["torch-adamw-foreach"], strict=True)]
        ratios[side] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    result = {
        "setting": {key: value for key, value in vars(arguments).items() if key != "dry"},
        "bar": BAR,
        "seconds": {side: statistics.median(each) for side, each in times.items()},
        "against_adamw_foreach": ratios,
        "differences": differences,
        "environment": environment(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))
    if not arguments.dry:
        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*earlier, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
