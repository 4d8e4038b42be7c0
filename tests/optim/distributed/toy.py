"""A small model whose tensors are cut in every awkward way, and all optimizers, for one process or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from burnish.optim import AMUSE, AdamWScheduleFree, Muon, NorMuon, ProxGen, RAdamScheduleFree, SGDScheduleFree
from burnish.optim.base import RoutedOptimizer
from burnish.optim.exchange import chunk
from burnish.penalties import GroupLasso, Lq

WIDTH = 6


class Experts(nn.Module):
    """Three matrices in one tensor, all of them used."""

    num_experts = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(self.num_experts, 4, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,eoi->bso", x, self.weight)


class Toy(nn.Module):
    """Over 4 ranks it has even, uneven and empty shards; a stack, a kernel, fused and repeated shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        # 18 x 6, fused. The bias of the keys has no gradient but rounding, which Adam would blow up to whole steps.
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, bias=False)
        self.first = nn.Linear(WIDTH, 10)
        self.kernel = nn.Conv1d(10, 5, 3, padding=1)  # 5 x 10 x 3
        self.middle = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.experts = Experts()
        self.narrow = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(3, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.kernel(self.first(x).mT).mT)
        for layer in self.middle:
            x = x + torch.tanh(layer(x))
        return self.head(self.narrow(self.experts(x)))


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def backward(model: nn.Module, step: int) -> None:
    """Leave the gradients of a loss over the same data on any number of ranks; those of `unused` at step 2 alone."""
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        if step == 2 and "unused" in name:
            parameter.grad = torch.full_like(parameter, 0.1)


MATRIX: dict[str, Any] = {"dtype": torch.float32, "weight_decay": 0.1}
AVERAGE: dict[str, Any] = {"weight_decay": 0.1, "warmup_steps": 2}
Build = Callable[..., RoutedOptimizer]

# `shared` goes to those that orthogonalise: a process group of data-parallel ranks.
OPTIMIZERS: dict[str, Build] = {
    "Muon": lambda model, **shared: Muon(model, lr=0.02, **MATRIX, **shared),
    "Muon, gram, cautious, SGD": lambda model, **shared: Muon(
        model, lr=0.02, cautious=True, auxiliary="sgd", orthogonalization="gram", scale="spectral", **MATRIX, **shared
    ),
    "NorMuon": lambda model, **shared: NorMuon(model, lr=0.02, **MATRIX, **shared),
    "NorMuon, heads and columns": lambda model, **shared: NorMuon(by_hand(model), lr=0.02, **MATRIX, **shared),
    "AMUSE": lambda model, **shared: AMUSE(model, lr=0.02, warmup_steps=2, **MATRIX, **shared),
    "AMUSE, official": lambda model, **shared: AMUSE(
        model, lr=0.02, warmup_steps=2, interpolation="official", auxiliary="sgd", **MATRIX, **shared
    ),
    "SGDScheduleFree": lambda model, **shared: SGDScheduleFree(model, lr=0.2, **AVERAGE),
    "AdamWScheduleFree": lambda model, **shared: AdamWScheduleFree(model, lr=0.01, **AVERAGE),
    "RAdamScheduleFree": lambda model, **shared: RAdamScheduleFree(
        model, lr=0.01, weight_decay=0.1, silent_sgd_phase=False
    ),
    "ProxGen, lasso": lambda model, **shared: ProxGen(model, lr=0.01, penalty=Lq(1, 0.002), eps=1e-3),
    "ProxGen, rows": lambda model, **shared: ProxGen(
        model, lr=0.1, penalty=GroupLasso(0.05), preconditioner="momentum", weight_decay=0.1
    ),
}


def by_hand(model: nn.Module) -> list[dict[str, Any]]:
    """Groups that the model does not ask for: heads, and matrices stored [in, out]."""
    tensors = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    heads = ["attention.in_proj_weight"]
    columns = ["experts.weight", "first.weight", *(f"middle.{index}.weight" for index in range(3))]
    others = [name for name in tensors if name not in (*heads, *columns)]
    rows = [({"heads": 6}, heads), ({"transposed": True}, columns)]
    return [{"params": [(name, tensors[name]) for name in names], "use_muon": True, **keys} for keys, names in rows] + [
        {"params": [(name, tensors[name]) for name in others], "use_muon": False}
    ]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model, by name, whole."""
    return {name.removeprefix("module."): whole(parameter) for name, parameter in model.named_parameters()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of an element."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def without_share_of(gradient: Tensor, ranks: int, rank: int) -> Tensor:
    """A gradient that is zero where one rank's shard of dimension 0 lies."""
    lengths = [chunk(len(gradient), ranks, index) for index in range(ranks)]
    pieces: Sequence[Tensor] = gradient.split(lengths)
    return torch.cat([piece * (index != rank) for index, piece in enumerate(pieces)])
