"""The chunked distillation loss against the plain one: peak memory and time at a real vocabulary.

One command runs both sides in turn, each in a process of its own, and appends to `results/distill_loss.json`::

    python benchmarks/distill_loss.py                       # vocab 151,936, 2,048 tokens, hidden 1,024, two threads
    python benchmarks/distill_loss.py --device cuda --dtype bfloat16

The plain side is what a user writes first: both models' whole logits, `log_softmax`, `kl_div`, `backward`. Both sides
start from the same hidden states and heads and end with the gradients of the student's states and head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from burnish.distill import chunked_loss, forward_kl
from burnish.runs import environment, peak_rss_bytes

RESULTS = Path(__file__).parent / "results" / "distill_loss.json"
BAR = {"memory": 0.25, "time": 1.15}


def plain(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Forward KL over whole logits."""
    with torch.no_grad():
        log_p = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
    log_q = (hidden @ weight.T).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def ours(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The same, chunk by chunk."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            log_p = (teacher_hidden[rows] @ teacher_weight.T).float().log_softmax(-1)
        total = forward_kl(log_p, logits.float().log_softmax(-1)).sum()
        return total, total[None]

    return chunked_loss(hidden, weight, None, loss)[0]


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory over the inputs, and the median time, of one side in this process."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    hidden, teacher_hidden = (random(arguments.tokens, arguments.hidden) for _ in range(2))
    weight, teacher_weight = (random(arguments.vocab, arguments.hidden, scale=0.05) for _ in range(2))
    hidden.requires_grad_(), weight.requires_grad_()
    side = {"plain": plain, "ours": ours}[arguments.side]
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else peak_rss_bytes()
    seconds = []
    for _ in range(arguments.repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss = side(hidden, weight, teacher_hidden, teacher_weight)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "peak_bytes": peak - before,
        "seconds": min(seconds),
        "loss": float(loss.detach()),
        "grad_hidden": float(hidden.grad.float().norm()),
        "grad_weight": float(weight.grad.float().norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--hidden", type=int, default=1_024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="in each process; the first warms up")
    parser.add_argument("--side", choices=["plain", "ours"], help="measure one side in this process")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        found = {}
        for side in ("plain", "ours") if number % 2 == 0 else ("ours", "plain"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[side] = json.loads(output.splitlines()[-1])
        for key in ("loss", "grad_hidden", "grad_weight"):
            a, b = found["plain"][key], found["ours"][key]
            assert abs(a - b) <= 1e-2 * abs(a), f"{key}: {a} and {b}: the two sides do not compute the same"
        rounds.append(found)
        print(json.dumps(found))
    memory = [one["ours"]["peak_bytes"] / one["plain"]["peak_bytes"] for one in rounds]
    seconds = [one["ours"]["seconds"] / one["plain"]["seconds"] for one in rounds]
    result = {
        "setting": {key: value for key, value in vars(arguments).items() if key != "side"},
        "rounds": rounds,
        "memory_ratio": {"median": statistics.median(memory), "min": min(memory), "max": max(memory)},
        "time_ratio": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "bar": BAR,
        "environment": environment(),
    }
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*earlier, result], indent=1) + "\n")
    print(f"memory {result['memory_ratio']}, time {result['time_ratio']}, bar {BAR}")


if __name__ == "__main__":
    main()
