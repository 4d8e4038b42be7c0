"""Every row of the table of optimizers is what its name, its fields and its description say."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from burnish import optim
from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.base import RoutedOptimizer
from burnish.optim.mezo import MeZO
from burnish.optim.table import OPTIMIZERS, OptimizerInfo

GRADIENT = [name for name, info in OPTIMIZERS.items() if not info.forward_only]
EACH = pytest.mark.parametrize("name", OPTIMIZERS)
WITH_GRADIENT = pytest.mark.parametrize("name", GRADIENT)
SHARED = {"lr": 0.01, "weight_decay": 0.1}
"""What a command sets for all of them."""


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))


def options_of(info: OptimizerInfo, **changes: Any) -> dict[str, Any]:
    return {**SHARED, **info.options, **({"warmup_steps": max(2, info.least_warmup)} if info.warmup else {}), **changes}


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    inputs = torch.randn(6, 12, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


@EACH
def test_the_class_loads_and_is_public(name: str) -> None:
    cls = OPTIMIZERS[name].load()
    assert issubclass(cls, MeZO if OPTIMIZERS[name].forward_only else RoutedOptimizer)
    assert getattr(optim, cls.__name__) is cls
    assert cls.__name__.lower() == name.replace("-", "")
    assert OPTIMIZERS[name].description and OPTIMIZERS[name].source
    assert cls.__doc__ is not None and "Args:" in cls.__doc__


def test_every_public_optimizer_has_a_row() -> None:
    public = {getattr(optim, name) for name in optim.__all__}
    optimizers = {cls for cls in public if isinstance(cls, type) and issubclass(cls, Optimizer)}
    assert optimizers == {info.load() for info in OPTIMIZERS.values()}


@WITH_GRADIENT
def test_the_constructor_takes_the_options_of_the_row_and_knows_the_others(name: str) -> None:
    info = OPTIMIZERS[name]
    optimizer = info.load()(toy().parameters(), **options_of(info))
    for group in optimizer.param_groups:
        assert {key: group[key] for key in options_of(info)} == options_of(info)
        assert ("scheduler" in group) == info.averaged
        assert ("orthogonalization" in group) == info.matrix_rule
    assert info.warmup == ("warmup_steps" in inspect.signature(info.load()).parameters)


@pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.warmup])
def test_the_least_warmup_is_the_least(name: str) -> None:
    info = OPTIMIZERS[name]
    info.load()(toy().parameters(), **options_of(info, warmup_steps=info.least_warmup))
    with pytest.raises(ValueError, match="warmup_steps"):
        info.load()(toy().parameters(), **options_of(info, warmup_steps=info.least_warmup - 1))


@WITH_GRADIENT
def test_u7_5_averaged_means_that_the_model_to_keep_is_the_average_of_the_fast_sequence(name: str) -> None:
    info, model = OPTIMIZERS[name], toy()
    optimizer = info.load()(model, **options_of(info))
    assert isinstance(optimizer, AveragedOptimizer) == info.averaged == hasattr(optimizer, "averaged")
    if not isinstance(optimizer, AveragedOptimizer):
        return
    weight = model[0].weight
    group = next(one for one in optimizer.param_groups if any(weight is tensor for tensor in one["params"]))
    fast, weights = [], []
    for number in range(12):
        before = group["weight_sum"]
        step(model, optimizer, number)
        fast.append(optimizer.state[weight]["z"].double())
        weights.append(group["weight_sum"] - before)
    expected = sum(share * z for share, z in zip(weights, fast, strict=True)) / sum(weights)
    training = weight.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)
        assert (weight - training).abs().max() > 1e-5
    torch.testing.assert_close(weight.detach(), training, rtol=0, atol=1e-6)


@WITH_GRADIENT
def test_matrix_rule_means_that_a_step_has_full_rank_and_equal_singular_values(name: str) -> None:
    """The gradient has rank 1, plus noise; an orthogonalised step does not."""
    info = OPTIMIZERS[name]
    weight = nn.Parameter(torch.zeros(8, 12))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 12, generator=generator)
    steep = torch.outer(torch.ones(8), torch.ones(12))
    exact = {"orthogonalization": "svd", "dtype": torch.float32} if info.matrix_rule else {}
    options = options_of(info, weight_decay=0.0, **exact)
    optimizer = info.load()([weight], **options)
    for _ in range(8):  # RAdam waits for its second moment
        weight.grad = steep + 0.01 * noise
        optimizer.step()
    moved = optimizer.state[weight]["z"] if info.averaged else weight.detach()
    values = torch.linalg.svdvals(moved)
    equal = {"normuon": 1.6}.get(name, 1.001)  # rows brought to one length are no longer quite orthogonal
    assert (values[0] / values[-1] < equal) == info.matrix_rule, values
    if not info.matrix_rule:
        assert values[0] / values[-1] > 10


@pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.matrix_rule])
def test_u7_6_the_command_s_options_make_steps_as_long_as_adamw_s(name: str) -> None:
    """RMS 0.2 lr, whatever the shape: what lr and decay of AdamW carry over to."""
    info = OPTIMIZERS[name]
    for shape in ((64, 16), (16, 64), (32, 32)):
        weight = nn.Parameter(torch.zeros(shape))
        options = options_of(info, weight_decay=0.0, orthogonalization="svd", dtype=torch.float32)
        optimizer = info.load()([weight], **options)
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        moved = optimizer.state[weight]["z"] if info.averaged else weight.detach()
        lr = options["lr"] / (options["warmup_steps"] if info.warmup else 1)
        assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * lr, rel=1e-3)


@EACH
def test_the_rows_can_be_sent_to_another_process(name: str) -> None:
    assert pickle.loads(pickle.dumps(OPTIMIZERS[name])) == OPTIMIZERS[name]


def table() -> str:
    """The optimizers as docs/optimizers.md shows them."""
    lines = ["| name | class | what it is | gradients | averages | orthogonalises | source |", "|" + 7 * "---|"]
    for name, info in OPTIMIZERS.items():
        facts = (not info.forward_only, info.averaged, info.matrix_rule)
        signs = " | ".join("yes" if fact else "no" for fact in facts)
        lines.append(f"| `{name}` | `{info.load().__name__}` | {info.description} | {signs} | {info.source} |")
    return "\n".join(lines)


def test_u16_2_the_table_in_the_docs_is_the_one_of_the_code() -> None:
    page = Path(__file__).parents[2] / "docs" / "optimizers.md"
    assert table() in page.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
