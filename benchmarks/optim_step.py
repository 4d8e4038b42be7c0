"""One optimizer step over the tensors of a real model: ours against torch and schedulefree.

One command times all sides in turn in one process, measures the memory of each in a process of its own, and appends to
`results/optim_step.json`::

    python benchmarks/optim_step.py                                    # SmolLM2-135M's shapes, float32, two threads
    python benchmarks/optim_step.py --device cuda --shape 1b --dtype bfloat16

`torch.optim.Muon` takes matrices alone, so that its side steps the other tensors with `torch.optim.AdamW(foreach)`, as
its users do. Before any time is taken the steps of both sides are compared. The orthogonalisation error of each form is
the root mean square distance of the singular values from 1, on random matrices of the real shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.optim import AMUSE, AdamWScheduleFree, Muon, NorMuon, orthogonalize
from burnish.runs import environment, peak_rss_bytes

RESULTS = Path(__file__).parent / "results" / "optim_step.json"
SHAPES = {
    "smollm2-135m": {"layers": 30, "hidden": 576, "ffn": 1536, "kv": 192, "vocab": 49_152},
    "1b": {"layers": 16, "hidden": 2048, "ffn": 8192, "kv": 512, "vocab": 128_256},
    "tiny": {"layers": 2, "hidden": 64, "ffn": 160, "kv": 32, "vocab": 512},
}
# (ours, peer): at most so many times the peer's time.
BARS = {
    "cpu": {
        ("muon", "torch-muon"): 0.9,
        ("muon-gram", "torch-muon"): 0.9,
        ("amuse", "muon"): 1.15,
        ("adamw-schedule-free", "schedulefree"): 1.0,
    },
    "cuda": {
        ("muon", "torch-muon"): 0.6,
        ("muon-gram", "torch-muon"): 0.6,
        ("amuse", "muon"): 1.15,
        ("adamw-schedule-free", "schedulefree"): 1.0,
    },
}

Groups = list[dict[str, Any]]


def groups(shape: str, device: torch.device, dtype: torch.dtype) -> Groups:
    """Tensors of a Llama of a size with a tied head, with gradients, as groups for the matrix rule and the others."""
    of = SHAPES[shape]
    hidden, ffn, kv = of["hidden"], of["ffn"], of["kv"]
    layer = [
        (hidden, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, hidden),
        (ffn, hidden),
        (ffn, hidden),
        (hidden, ffn),
    ]
    generator = torch.Generator(device).manual_seed(0)

    def tensor(*size: int) -> nn.Parameter:
        parameter = nn.Parameter(0.02 * torch.randn(size, generator=generator, device=device).to(dtype))
        parameter.grad = torch.randn(size, generator=generator, device=device).to(dtype)
        return parameter

    matrices = [tensor(*size) for _ in range(of["layers"]) for size in layer]
    others = [tensor(of["vocab"], hidden), *(tensor(hidden) for _ in range(2 * of["layers"] + 1))]
    return [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]


def torch_muon(found: Groups) -> Callable[[], None]:
    """`torch.optim.Muon` for the matrices and AdamW for the others."""
    muon = torch.optim.Muon(found[0]["params"], lr=1e-3)
    adamw = torch.optim.AdamW(found[1]["params"], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def schedulefree(found: Groups) -> Callable[[], None]:
    """The `schedulefree` package, foreach (its default)."""
    from schedulefree import AdamWScheduleFree as Peer

    optimizer = Peer([tensor for group in found for tensor in group["params"]], lr=1e-3, weight_decay=0.1)
    optimizer.train()
    return optimizer.step


def plain(found: Groups) -> list[Tensor]:
    return [tensor for group in found for tensor in group["params"]]


SIDES: dict[str, Callable[[Groups], Callable[[], Any]]] = {
    "muon": lambda found: Muon(found, lr=1e-3).step,
    "torch-muon": torch_muon,
    "muon-gram": lambda found: Muon(found, lr=1e-3, orthogonalization="gram").step,
    "muon-polar-express-4": lambda found: Muon(found, lr=1e-3, orthogonalization="polar-express", steps=4).step,
    "normuon": lambda found: NorMuon(found, lr=1e-3).step,
    "amuse": lambda found: AMUSE(found, lr=1e-3, warmup_steps=10, weight_decay=0.1).step,
    "adamw-schedule-free": lambda found: AdamWScheduleFree(plain(found), lr=1e-3, weight_decay=0.1).step,
    "schedulefree": schedulefree,
    "torch-adamw-foreach": lambda found: torch.optim.AdamW(plain(found), lr=1e-3, foreach=True).step,
    "torch-adamw-fused": lambda found: torch.optim.AdamW(plain(found), lr=1e-3, fused=True).step,
}


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Of one step."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check_equal(arguments: argparse.Namespace, ours: str, peer: str) -> float:
    """Two steps of both sides from one start; the largest difference over the largest movement, tensor by tensor."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    start, moved = groups("tiny", device, dtype), []
    for side in (ours, peer):
        found = groups("tiny", device, dtype)
        step = SIDES[side](found)
        for _ in range(2):
            for tensor, source in zip(plain(found), plain(start), strict=True):
                # A peer may overwrite gradients.
                tensor.grad = source.grad.clone() if source.grad is not None else None
            step()
        moved.append([(b - a).detach().float() for a, b in zip(plain(start), plain(found), strict=True)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*moved, strict=True))


def orthogonality(arguments: argparse.Namespace) -> dict[str, float]:
    """Root mean square distance of the singular values from 1, for each form, on gradients of the real shapes."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    from torch.optim._muon import _zeropower_via_newtonschulz

    of = SHAPES[arguments.shape]
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((of["hidden"], of["hidden"]), (of["kv"], of["hidden"]), (of["ffn"], of["hidden"]))
    matrices = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]

    def error(form: Callable[[Tensor], Tensor]) -> float:
        singular = torch.cat([torch.linalg.svdvals(form(matrix).float()) for matrix in matrices])
        return float((singular - 1).square().mean().sqrt())

    return {
        "torch-muon": error(lambda matrix: _zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)),
        "muon": error(orthogonalize),
        "muon-gram": error(lambda matrix: orthogonalize(matrix, method="gram")),
        "muon-polar-express-4": error(lambda matrix: orthogonalize(matrix, method="polar-express", steps=4)),
    }


def memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Bytes that one side adds to parameters and gradients at its peak, over two steps, in this process."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_num_threads(arguments.threads)
    found = groups(arguments.shape, device, dtype)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else peak_rss_bytes()
    step = SIDES[arguments.side](found)
    step(), step()
    return {"peak_bytes": (torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help="measure the memory of one side in this process")
    parser.add_argument("--dry", action="store_true", help="print, keep nothing")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(memory(arguments)))
        return
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    bars = {pair: bar for pair, bar in BARS[device.type].items() if set(pair) <= set(arguments.sides)}
    differences = {f"{ours}/{peer}": check_equal(arguments, ours, peer) for ours, peer in bars if ours != "amuse"}
    assert all(value < 5e-2 for value in differences.values()), f"the sides do not take the same step: {differences}"
    # All sides move the same tensors: a copy for each would not fit.
    found = groups(arguments.shape, device, getattr(torch, arguments.dtype))
    steps = {side: SIDES[side]([dict(group) for group in found]) for side in arguments.sides}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(arguments.rounds):
        for side in list(steps) if number % 2 == 0 else reversed(steps):
            times[side].append(seconds(steps[side], device))
    steps.clear()
    del found
    peaks = {}
    for side in () if arguments.dry else arguments.sides:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[side] = json.loads(output.splitlines()[-1])["peak_bytes"]
    ratios = {}
    for (ours, peer), bar in bars.items():
        each = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
        ratios[f"{ours}/{peer}"] = {"median": statistics.median(each), "min": min(each), "max": max(each), "bar": bar}
    result = {
        "setting": {key: value for key, value in vars(arguments).items() if key not in ("side", "dry")},
        "seconds": {side: statistics.median(found) for side, found in times.items()},
        "peak_bytes": peaks,
        "ratios": ratios,
        "differences": differences,
        "orthogonalisation_error": orthogonality(arguments),
        "environment": environment(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))
    if not arguments.dry:
        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*earlier, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
