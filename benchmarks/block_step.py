"""Time and memory of one step of BlockDiagonal, against SOAP and Shampoo of the `pytorch_optimizer` package.

All sides step the same tensors in one process, by turns; a round is ten steps of each, so that what is renewed every
ten steps is in it once. Memory is the bytes of tensors in the state, and what a side adds to parameters and gradients
at its peak over two steps, in a process of its own. Appends to `results/block_step.json`::

    pip install --target peers --no-deps pytorch_optimizer
    PYTHONPATH=peers python benchmarks/block_step.py --shape conv

Before any time is taken, AdaBound of the same package is compared with blocks of one under a `SpectrumClip`, which take
the same steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from burnish.optim import BlockDiagonal, SpectrumClip
from burnish.runs import environment, peak_rss_bytes

RESULTS = Path(__file__).parent / "results" / "block_step.json"
SHAPES: dict[str, list[tuple[int, ...]]] = {
    # Of an image classifier of three layers,
    "mlp": [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)],
    # of a residual network of eight 3 x 3 convolutions, 64 to 128 wide,
    "conv": [(64, 3, 3, 3), *[(64, 64, 3, 3)] * 3, (128, 64, 3, 3), *[(128, 128, 3, 3)] * 3, *[(128,)] * 8, (10, 128)],
    # and of two layers of a Llama, hidden 256.
    "transformer": [*[(256, 256)] * 8, *[(1024, 256)] * 4, *[(256, 1024)] * 2, *[(256,)] * 5],
}
FREQUENCIES = (1, 10)
WARM = 20
"""Steps before the first round: ours renews the roots of a block of 9 at each of the first 18."""
ROUND = 10

Make = Callable[[list[nn.Parameter]], Optimizer]


def block(every: int) -> Make:
    return lambda values: BlockDiagonal(values, block_size=8, remainder="smaller", update_every=every)


def soap(every: int) -> Make:
    return lambda values: pytorch_optimizer.SOAP(values, precondition_frequency=every)


def shampoo(every: int) -> Make:
    return lambda values: pytorch_optimizer.Shampoo(values, preconditioning_compute_steps=every)


def scalable(every: int) -> Make:
    return lambda values: pytorch_optimizer.ScalableShampoo(
        values, preconditioning_compute_steps=every, start_preconditioning_step=1
    )


SIDES: dict[str, Make] = {
    **{f"block-{every}": block(every) for every in FREQUENCIES},
    **{f"soap-{every}": soap(every) for every in FREQUENCIES},
    **{f"shampoo-{every}": shampoo(every) for every in FREQUENCIES},
    **{f"scalable-shampoo-{every}": scalable(every) for every in FREQUENCIES},
    "adamw-foreach": lambda values: torch.optim.AdamW(values, foreach=True),
}


def tensors(shape: str, device: torch.device) -> list[nn.Parameter]:
    draw = torch.Generator(device).manual_seed(0)
    return [nn.Parameter(0.05 * torch.randn(size, generator=draw, device=device)) for size in SHAPES[shape]]


def draw_gradients(values: list[nn.Parameter], draw: torch.Generator) -> None:
    for value in values:
        value.grad = torch.randn(value.shape, generator=draw, device=value.device)


def held(state: Any) -> Iterator[Tensor]:
    """Tensors anywhere in the state of an optimizer; peers keep them in lists and objects."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from held(value)
    elif hasattr(state, "__dict__"):
        yield from held(vars(state))


def memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Of one side over the first steps, in this process."""
    device = torch.device(arguments.device)
    values = tensors(arguments.shape, device)
    draw = torch.Generator(device).manual_seed(1)
    draw_gradients(values, draw)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_rss_bytes()
    optimizer = SIDES[arguments.side](values)
    for _ in range(2):
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes()
    own = {tensor.data_ptr(): tensor.nbytes for tensor in held(dict(optimizer.state)) if tensor.ndim}
    return {"state_bytes": sum(own.values()), "peak_bytes": peak - before}


def difference_from_adabound() -> float:
    """Twenty steps of both from one start; the largest difference of a weight over the largest movement."""
    moved = []
    for make in (
        lambda values: pytorch_optimizer.AdaBound(values, lr=1e-3, final_lr=0.1, gamma=1e-2, eps=1e-8),
        lambda values: BlockDiagonal(values, block_size=1, clip=SpectrumClip(0.1, 1e-2), eps_form="paper"),
    ):
        values = tensors("transformer", torch.device("cpu"))[:3]
        start = [value.detach().clone() for value in values]
        optimizer, draw = make(values), torch.Generator().manual_seed(2)
        for _ in range(20):
            draw_gradients(values, draw)
            optimizer.step()
        moved.append([value.detach() - first for value, first in zip(values, start, strict=True)])
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*moved, strict=True))


def seconds(optimizer: Optimizer, values: list[nn.Parameter], draw: torch.Generator, steps: int) -> float:
    """Of one step, gradients drawn outside of the clock."""
    spent = 0.0
    for _ in range(steps):
        draw_gradients(values, draw)
        start = time.perf_counter()
        optimizer.step()
        if values[0].is_cuda:
            torch.cuda.synchronize()
        spent += time.perf_counter() - start
    return spent / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mlp")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help="measure the memory of one side in this process")
    parser.add_argument("--dry", action="store_true", help="print, keep nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        print(json.dumps(memory(arguments)))
        return
    difference = difference_from_adabound()
    assert difference < 1e-5, f"blocks of one do not take AdaBound's steps: {difference:.1e}"
    device = torch.device(arguments.device)
    values = {side: tensors(arguments.shape, device) for side in arguments.sides}
    optimizers = {side: SIDES[side](found) for side, found in values.items()}
    draw = torch.Generator(device).manual_seed(1)
    for side, optimizer in optimizers.items():
        seconds(optimizer, values[side], draw, WARM)
    times: dict[str, list[float]] = {side: [] for side in optimizers}
    for number in range(arguments.rounds):
        for side in list(optimizers) if number % 2 == 0 else reversed(optimizers):
            times[side].append(seconds(optimizers[side], values[side], draw, ROUND))
    optimizers.clear()
    bytes_of = {}
    for side in arguments.sides:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        bytes_of[side] = json.loads(output.splitlines()[-1])
    ratios = {}
    for every in FREQUENCIES:
        for peer in (f"soap-{every}", f"shampoo-{every}", f"scalable-shampoo-{every}"):
            if {peer, f"block-{every}"} <= set(times):
                each = [a / b for a, b in zip(times[f"block-{every}"], times[peer], strict=True)]
                ratios[f"block-{every}/{peer}"] = {
                    "median": statistics.median(each),
                    "min": min(each),
                    "max": max(each),
                }
    result = {
        "setting": {key: value for key, value in vars(arguments).items() if key not in ("side", "dry")},
        "parameters": sum(value.numel() for value in tensors(arguments.shape, torch.device("cpu"))),
        "seconds": {side: statistics.median(found) for side, found in times.items()},
        "memory": bytes_of,
        "ratios": ratios,
        "difference_from_adabound": difference,
        "environment": environment(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))
    if not arguments.dry:
        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*earlier, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
