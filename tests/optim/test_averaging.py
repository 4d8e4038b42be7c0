"""The two modes of averaged optimizers: entering, leaving, saving; and the exact average of half-precision weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.optim import AMUSE, AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from burnish.optim.averaging import AveragedOptimizer, Mix, advance, advance_stored
from tests.optim.reference import tensors

TABLE: dict[str, Callable[[Any], AveragedOptimizer]] = {
    "amuse": lambda params: AMUSE(params, lr=0.05, warmup_steps=3),
    "amuse-official": lambda params: AMUSE(params, lr=0.05, warmup_steps=3, interpolation="official"),
    "amuse-sgd": lambda params: AMUSE(params, lr=0.05, warmup_steps=3, auxiliary="sgd", weight_decay_at_y=0.1),
    "sgd": lambda params: SGDScheduleFree(params, lr=0.05, warmup_steps=3, weight_decay=0.1),
    "adamw": lambda params: AdamWScheduleFree(params, lr=0.05),
    "radam": lambda params: RAdamScheduleFree(params, lr=0.05, silent_sgd_phase=False),
}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(value.to(dtype)) for value in tensors((4, 6), (3, 5, 4), (7,), seed=seed)]


def train(optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    values = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(start, start + steps):
        for index, p in enumerate(values):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + index)).to(p.dtype)
        optimizer.step()


def copies(values: list[nn.Parameter]) -> list[Tensor]:
    return [value.detach().clone() for value in values]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def close(ones: list[Any], others: list[Any], tolerance: float) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", TABLE)
def test_u7_5_inside_is_the_average_and_outside_what_it_was(kind: str) -> None:
    values = parameters(torch.float64)
    optimizer = TABLE[kind](values)
    train(optimizer, 8)
    y, beta = copies(values), optimizer.param_groups[0]["beta"]
    z = [optimizer.state[p]["z"].clone() for p in values]
    with optimizer.averaged():
        assert {group["mode"] for group in optimizer.param_groups} == {"averaged"}
        x = [fast + (slow - fast) / beta for fast, slow in zip(z, y, strict=True)]
        close(values, x, 1e-14)
        assert not torch.allclose(values[0], y[0], atol=1e-4)
    close(values, y, 1e-14)
    assert {group["mode"] for group in optimizer.param_groups} == {"training"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exception_inside_is_passed_on_and_the_parameters_come_back(dtype: torch.dtype) -> None:
    values = parameters(dtype)
    optimizer = TABLE["amuse"](values)
    train(optimizer, 6)
    y = copies(values)
    with pytest.raises(KeyError, match="evaluation"), optimizer.averaged():
        raise KeyError("evaluation")
    close(values, y, 1e-6)
    train(optimizer, 1)


@pytest.mark.parametrize("kind", TABLE)
def test_nested_blocks_and_repeated_calls_change_nothing_more(kind: str) -> None:
    values = parameters()
    optimizer = TABLE[kind](values)
    train(optimizer, 6)
    with optimizer.averaged():
        x = copies(values)
        with optimizer.averaged():
            assert equal(copies(values), x)
        assert equal(copies(values), x), "the inner block must leave the average to the outer one"
        optimizer.eval()
        assert equal(copies(values), x)
    y = copies(values)
    optimizer.train()
    assert equal(copies(values), y)
    optimizer.eval()
    with optimizer.averaged():
        assert equal(copies(values), x)
    assert equal(copies(values), x), "a block entered in averaged mode leaves in averaged mode"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TABLE)
def test_before_the_first_step_the_average_is_the_start(kind: str, dtype: torch.dtype) -> None:
    values, others = parameters(dtype), parameters(dtype)
    optimizer, plain = TABLE[kind](values), TABLE[kind](others)
    start = copies(values)
    with optimizer.averaged():
        assert equal(copies(values), start)
    assert equal(copies(values), start)
    train(optimizer, 3)
    train(plain, 3)
    assert equal(copies(values), copies(others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TABLE)
def test_weights_loaded_after_construction_are_what_it_starts_from(kind: str, dtype: torch.dtype) -> None:
    late, early = parameters(dtype), parameters(dtype, seed=9)
    optimizer = TABLE[kind](late)
    with torch.no_grad():
        for value, loaded in zip(late, early, strict=True):
            value.copy_(loaded)
    if kind == "sgd":  # also where an evaluation comes in between
        with optimizer.averaged():
            assert equal(copies(late), copies(early))
    other = TABLE[kind](early)
    train(optimizer, 5)
    train(other, 5)
    with optimizer.averaged(), other.averaged():
        assert equal(copies(late), copies(early))


@pytest.mark.parametrize("kind", TABLE)
def test_u7_5_a_step_inside_is_refused_and_changes_nothing(kind: str) -> None:
    values = parameters()
    optimizer = TABLE[kind](values)
    train(optimizer, 4)
    with optimizer.averaged():
        x, step = copies(values), optimizer.param_groups[0]["step"]
        with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\) first.*averaged\(\)"):
            optimizer.step(lambda: pytest.fail("the closure was called"))
        assert equal(copies(values), x) and optimizer.param_groups[0]["step"] == step


def test_a_group_added_inside_belongs_to_the_same_mode() -> None:
    values, late = parameters(), nn.Parameter(torch.ones(3))
    optimizer = TABLE["sgd"](values)
    train(optimizer, 4)
    with optimizer.averaged():
        optimizer.add_param_group({"params": [late]})
        assert {group["mode"] for group in optimizer.param_groups} == {"averaged"}
    assert {group["mode"] for group in optimizer.param_groups} == {"training"}
    train(optimizer, 2)
    assert torch.equal(late, torch.ones(3)) is False


@pytest.mark.parametrize("beta", [0.1, 0.6, 0.98])
def test_a_thousand_swaps_of_float32_do_not_add_up(beta: float) -> None:
    """One swap rounds by 6e-8 / beta of the entries (up to 3); the next ones come back to the same numbers, so that a
    thousand are within 8 of these."""
    values = parameters()
    optimizer = AMUSE(values, lr=0.05, warmup_steps=3, beta1=beta, rho=0.0)
    train(optimizer, 12)
    y = copies(values)
    with optimizer.averaged():
        x = copies(values)
    for _ in range(1000):
        optimizer.eval()
        optimizer.train()
    for value, before in zip(values, y, strict=True):
        torch.testing.assert_close(value.detach(), before, rtol=0, atol=8 * 3 * 6e-8 / beta)
    with optimizer.averaged():
        for value, before in zip(values, x, strict=True):
            torch.testing.assert_close(value.detach(), before, rtol=0, atol=8 * 3 * 6e-8 / beta)


@pytest.mark.parametrize("kind", TABLE)
def test_a_thousand_swaps_of_bfloat16_lose_nothing(kind: str) -> None:
    values = parameters(torch.bfloat16)
    optimizer = TABLE[kind](values)
    train(optimizer, 12)
    y, x = copies(values), [optimizer.state[p]["x"].clone() for p in values]
    assert {value.dtype for value in x} == {torch.float32} and not equal(x, [value.bfloat16().float() for value in x])
    for _ in range(1000):
        optimizer.eval()
        assert equal(copies(values), [value.bfloat16() for value in x])
        optimizer.train()
    assert equal(copies(values), y)
    assert equal([optimizer.state[p]["x"] for p in values], x)


@pytest.mark.parametrize("kind", TABLE)
def test_bfloat16_weights_keep_the_average_of_a_float32_run(kind: str) -> None:
    """With equal gradients z and x are those of float32 weights up to float32 rounding, though the weights have 8 bits;
    200 steps of a thousandth are too small for a bfloat16 weight near 1 to see each of them."""
    options: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 20}
    make: dict[str, Any] = {
        "amuse": lambda p: AMUSE(p, **options, momentum=0.0),  # buffers of momentum have the dtype of the weights
        "amuse-official": lambda p: AMUSE(p, **options, momentum=0.0, interpolation="official"),
        "amuse-sgd": lambda p: AMUSE(p, **options, momentum=0.0, auxiliary="sgd"),
        "sgd": lambda p: SGDScheduleFree(p, **options),
        "adamw": lambda p: AdamWScheduleFree(p, **options),
        "radam": lambda p: RAdamScheduleFree(p, lr=1e-3),
    }
    half = parameters(torch.bfloat16)
    full = [nn.Parameter(value.detach().float()) for value in half]
    ours, reference = make[kind](half), make[kind](full)
    start = copies(full)
    for t in range(200):
        for index, (one, other) in enumerate(zip(half, full, strict=True)):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(10 * t + index)).bfloat16() + 1
            other.grad = one.grad.float()
        ours.step()
        reference.step()
    for one, other in zip(half, full, strict=True):
        torch.testing.assert_close(ours.state[one]["z"], reference.state[other]["z"], rtol=0, atol=2e-6)
    with reference.averaged():
        for one, other in zip(half, full, strict=True):
            torch.testing.assert_close(ours.state[one]["x"], other.detach(), rtol=0, atol=1e-5)
        assert (
            max(float((value - before).detach().abs().max()) for value, before in zip(full, start, strict=True)) > 1e-3
        )
        with ours.averaged():
            for one, other in zip(half, full, strict=True):
                torch.testing.assert_close(one.detach().float(), other.detach(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.3, 0.2)])
def test_storing_the_average_is_the_same_step_as_recovering_it(stale: bool, decays: tuple[float, float]) -> None:
    z, x, direction = tensors((50,), (50,), (50,))
    mix = Mix(0.1, 0.3, 0.6, 0.8, *decays, stale=stale)
    y = z + 0.6 * (x - z)
    expected_y, expected_z = [y.clone()], [z.clone()]
    advance(expected_y, expected_z, [direction], mix)
    parameter, stored_z, stored_x = torch.empty(50), z.float(), x.float()
    advance_stored([parameter], [stored_z], [stored_x], [direction], mix)
    assert (expected_y[0] - y).abs().max() > 0.01
    for one, other in ((parameter, expected_y[0]), (stored_z, expected_z[0])):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-6)
    average = expected_z[0] + (expected_y[0] - expected_z[0]) / 0.8
    torch.testing.assert_close(stored_x.double(), average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["exact", "official"])
def test_a_resting_bfloat16_tensor_goes_as_one_of_float32(interpolation: Any) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        busy, resting = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = AMUSE([busy, resting], lr=0.5, warmup_steps=2, interpolation=interpolation, auxiliary="sgd")
        seen = []
        for t in range(9):
            busy.grad = torch.ones_like(busy)
            resting.grad = torch.ones_like(resting) if t in (0, 1, 2, 8) else None
            optimizer.step()
            seen.append(resting.detach().float().clone())
            with optimizer.averaged():
                seen.append(resting.detach().float().clone())
            seen.append(resting.detach().float().clone())
        results.append(torch.stack(seen))
    torch.testing.assert_close(results[1], results[0], rtol=2**-7, atol=2**-7)
