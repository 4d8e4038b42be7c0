"""One zeroth-order step: MeZO as published, ours, and ours on one block at a time.

One command times all sides in turn in one process on one model, measures the memory of each in a process of its own,
and appends to `results/mezo_step.json`::

    python benchmarks/mezo_step.py                                        # SmolLM2-135M's shape, bfloat16, one thread
    python benchmarks/mezo_step.py --dtype float32
    python benchmarks/mezo_step.py --device cuda --shape opt-13b --rows 16 --tokens 400

Weights are random: what a step takes does not depend on them. The published loop is written here from its description:
the global generator is seeded anew for each of four passes over all tensors, and every pass allocates each of them
again. Before any time is taken, ours is compared with it, tensor by tensor, from the same seeds.

A block is a decoder layer; each round times another one, from the lowest to the highest in equal distances, because
what is saved below the block depends on where it lies. "Outside" is the time of a step less that of its forward passes.
On a CPU, seconds are those of the process, so that other programs count little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from burnish.optim.mezo import MeZO
from burnish.optim.mezo_bcd import MeZOBCD
from burnish.runs import environment, peak_rss_bytes

RESULTS = Path(__file__).parent / "results" / "mezo_step.json"
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
    "opt-1.3b": {
        "model_type": "opt", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192,
        "word_embed_proj_dim": 2048, "vocab_size": 50_272,
    },
    "opt-13b": {
        "model_type": "opt", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "ffn_dim": 20_480,
        "word_embed_proj_dim": 5120, "vocab_size": 50_272,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 256,
    },
}  # fmt: skip
LR, EPS = 1e-6, 1e-3
Loss = Callable[[], float]


class Published:
    """MeZO's loop as its code is described: in place by allocating again, with noise of the weights' own dtype.

    Source: arXiv 2305.17333 and descriptions of its trainer; written independently.
    """

    def __init__(self, model: nn.Module, *, lr: float = LR, eps: float = EPS, weight_decay: float = 0.0) -> None:
        self.named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay

    def perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for _, tensor in self.named:
            tensor.data = tensor.data + scale * self.noise(tensor) * self.eps

    @staticmethod
    def noise(tensor: Tensor) -> Tensor:
        return torch.normal(mean=0, std=1, size=tensor.data.size(), device=tensor.data.device, dtype=tensor.data.dtype)

    @torch.no_grad()
    def step(self, loss: Loss, seed: int | None = None) -> None:
        seed = int(numpy.random.randint(1_000_000_000)) if seed is None else seed
        self.perturb(seed, 1)
        ahead = loss()
        self.perturb(seed, -2)
        behind = loss()
        gradient = (ahead - behind) / (2 * self.eps)
        self.perturb(seed, 1)
        torch.manual_seed(seed)
        for name, tensor in self.named:
            change = gradient * self.noise(tensor)
            if not any(part in name for part in ("bias", "layer_norm", "layernorm")):
                change = change + self.weight_decay * tensor.data
            tensor.data = tensor.data - self.lr * change


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape])
    with device, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def loss_of(model: Any, rows: int, tokens: int) -> Loss:
    """Cross-entropy of the next token, on one batch of random tokens."""
    device, vocabulary = model.device, model.config.vocab_size
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)

    @torch.inference_mode()
    def loss() -> float:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return float(nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))

    return loss


def layer_of(model: Any, share: float) -> str:
    """Name pattern of the decoder layer that lies at a share of the way up."""
    return f"*layers.{int(share * model.config.num_hidden_layers)}.*"


def bcd(model: Any, layer: str, *, reuse: bool = False, **options: Any) -> Callable[[Loss], Any]:
    from burnish.tune.prefix import PrefixReuse

    optimizer = MeZOBCD(model, lr=LR, eps=EPS, blocks=[layer], **options)
    prefix = PrefixReuse(model)
    tensors = optimizer.tensors()
    first = prefix.first_moved([tensors[index] for index in optimizer.active_block.tensors]) if reuse else 0

    def step(loss: Loss) -> None:
        with prefix.below(first) if first else nullcontext():
            optimizer.step(loss)

    return step


SIDES: dict[str, Callable[[Any, str], Callable[[Loss], Any]]] = {
    "two-forwards": lambda model, layer: lambda loss: (loss(), loss()),
    "published": lambda model, layer: Published(model).step,
    "mezo": lambda model, layer: MeZO(model, lr=LR, eps=EPS, copy=False).step,
    "mezo-copy": lambda model, layer: MeZO(model, lr=LR, eps=EPS, copy=True).step,
    "bcd": bcd,
    "bcd-redrawn": partial(bcd, keep_noise=False),
    "bcd-in-place": partial(bcd, keep_noise=False, copy=False),
    "bcd-prefix": partial(bcd, reuse=True),
}
"""As published; ours in place, and with a float32 copy of all weights; one block with a float32 copy and kept noise, as
it comes; the noise drawn for each pass; in place; and with the layers below the block run once."""


def check_equal(steps: int = 10) -> float:
    """Steps of ours in place and of the published loop, on one tensor from the same seeds; difference over movement."""
    start = 0.02 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(2, 4096, generator=torch.Generator().manual_seed(1))
    models = [nn.Linear(4096, 2, bias=False) for _ in range(2)]
    for model in models:
        model.load_state_dict({"weight": start})

    def loss(model: nn.Linear) -> float:
        return float((model.weight.detach().double() * gradient).sum())

    ours = MeZO(models[0], lr=LR, eps=EPS, weight_decay=1000.0, copy=False)
    published = Published(models[1], weight_decay=1000.0)
    with torch.random.fork_rng():
        for _ in range(steps):
            record = ours.measure(partial(loss, models[0]), restore=False)
            ours.apply(record)
            published.step(partial(loss, models[1]), seed=record.seed)
    moved = [model.weight.detach().double() - start.double() for model in models]
    return float((moved[0] - moved[1]).norm() / moved[0].norm())


def memory(arguments: argparse.Namespace) -> int:
    """Bytes that the model and two steps of one side take at their peak, in this process."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    # What is imported, and set up for a first step, is not what a step takes.
    warm = build("tiny", device, dtype)
    SIDES[arguments.side](warm, layer_of(warm, 0.5))(loss_of(warm, 1, 8))
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else peak_rss_bytes()
    model = build(arguments.shape, device, dtype)
    loss = loss_of(model, arguments.rows, arguments.tokens)
    step = SIDES[arguments.side](model, layer_of(model, 0.5))
    step(loss), step(loss)
    return (torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()) - before


def memory_apart(side: str, **options: Any) -> int:
    """`memory` of a side in a process of its own; options as on the command line."""
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *flags, "--side", side]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak_bytes"])


def times(model: Any, sides: list[str], rounds: int, rows: int, tokens: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the steps of each side, and of their forward passes; the sides take turns."""
    cuda = model.device.type == "cuda"
    spent = 0.0

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    evaluate = loss_of(model, rows, tokens)

    def loss() -> float:
        nonlocal spent
        start = now()
        found = evaluate()
        spent += now() - start
        return found

    found: dict[str, dict[str, list[float]]] = {side: {"seconds": [], "forward": []} for side in sides}
    for number in range(rounds):
        layer = layer_of(model, (number + 0.5) / rounds)
        for side in sides if number % 2 == 0 else reversed(sides):
            step = SIDES[side](model, layer)
            step(loss)  # which makes what the next steps on this block share
            spent, start = 0.0, now()
            step(loss)
            found[side]["seconds"].append(now() - start)
            found[side]["forward"].append(spent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help="measure the memory of one side in this process")
    parser.add_argument("--dry", action="store_true", help="print, keep nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        print(json.dumps({"peak_bytes": memory(arguments)}))
        return
    difference = check_equal()
    assert difference < 1e-4, f"ours does not take the published step: {difference}"
    model = build(arguments.shape, torch.device(arguments.device), getattr(torch, arguments.dtype))
    found = times(model, arguments.sides, arguments.rounds, arguments.rows, arguments.tokens)
    del model
    options = ("shape", "device", "dtype", "threads", "rows", "tokens")
    setting = {name: getattr(arguments, name) for name in options}
    peaks = {side: memory_apart(side, **setting) for side in arguments.sides}
    rows = {
        side: {
            "seconds": statistics.fmean(columns["seconds"]),
            "outside": statistics.fmean(a - b for a, b in zip(columns["seconds"], columns["forward"], strict=True)),
            "peak_bytes": peaks[side],
        }
        for side, columns in found.items()
    }
    ratios = {}
    for other in ("published", "mezo"):
        for side in arguments.sides:
            if other in found and side not in ("two-forwards", "published", other):
                each = [a / b for a, b in zip(found[other]["seconds"], found[side]["seconds"], strict=True)]
                ratios[f"{other}/{side}"] = {"mean": statistics.fmean(each), "min": min(each), "max": max(each)}
    result = {
        "setting": setting | {"rounds": arguments.rounds},
        "sides": rows,
        "times_faster": ratios,
        "difference_in_place": difference,
    }
    print(json.dumps(result, indent=1))
    if not arguments.dry:
        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*earlier, result | {"environment": environment()}], indent=1) + "\n")


if __name__ == "__main__":
    main()
