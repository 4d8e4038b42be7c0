"""Products with the Hessian against closed forms, torch's own Hessian and finite differences."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from burnish.data import bundled_model
from burnish.diagnose import hessian_vector_product, loss_gradient
from burnish.errors import BurnishError


def network(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return model, torch.randn(12, 3, dtype=dtype), torch.randint(2, (12,))


@pytest.mark.parametrize("module", ["hessian", "eigenpairs", "update"])
def test_doctests(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"burnish.diagnose.{module}"), extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_a_polynomial_by_hand() -> None:
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:  # gradient (2 x0 x1 y, x0^2 y, x0^2 x1)
        return x[0] ** 2 * x[1] * y

    assert loss_gradient(loss, [x, y]).tolist() == [60, 20, 12]
    assert hessian_vector_product(loss, [x, y], torch.tensor([1.0, 0, 0]).double()).tolist() == [30, 20, 12]
    assert hessian_vector_product(loss, [x, y], [torch.tensor([0.0, 1.0]), torch.tensor(1.0)]).tolist() == [32, 4, 4]
    assert hessian_vector_product(loss, [y, x], [torch.tensor(1.0), torch.tensor([0.0, 1.0])]).tolist() == [4, 32, 4]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_the_whole_hessian_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    model, inputs, labels = network(dtype)
    params = list(model.parameters())
    sizes = [p.numel() for p in params]

    def of_vector(vector: Tensor) -> Tensor:
        parts = dict(zip(dict(model.named_parameters()), vector.split(sizes), strict=True))
        shaped = {name: part.view_as(model.get_parameter(name)) for name, part in parts.items()}
        return F.cross_entropy(torch.func.functional_call(model, shaped, inputs), labels)

    whole = torch.autograd.functional.hessian(of_vector, torch.cat([p.detach().flatten() for p in params]))
    for column in (0, 7, 20):
        unit = torch.zeros(sum(sizes), dtype=dtype)
        unit[column] = 1
        product = hessian_vector_product(lambda: F.cross_entropy(model(inputs), labels), model, unit)
        assert torch.allclose(product, whole[:, column], atol=tolerance)


def test_micro_batches_average_to_the_whole_batch() -> None:
    model, inputs, labels = network()
    vector = torch.randn(26, dtype=torch.float64)

    def part(rows: slice) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(inputs[rows]), labels[rows])

    parts = [part(slice(first, first + 4)) for first in (0, 4, 8)]
    whole = part(slice(None))
    assert torch.allclose(
        hessian_vector_product(parts, model, vector), hessian_vector_product(whole, model, vector), atol=1e-15
    )
    assert torch.allclose(loss_gradient(parts, model), loss_gradient(whole, model), atol=1e-15)


def test_tensors_that_the_loss_does_not_bend_have_zero_rows() -> None:
    bent, linear, unused = (torch.ones(2, requires_grad=True) for _ in range(3))

    def loss() -> Tensor:
        return (bent**3).sum() + 4 * linear.sum()

    assert hessian_vector_product(loss, [unused, bent, linear], torch.ones(6)).tolist() == [0, 0, 6, 6, 0, 0]
    assert loss_gradient(loss, [unused, bent, linear]).tolist() == [0, 0, 3, 3, 4, 4]
    assert hessian_vector_product(lambda: linear.sum(), [linear], torch.ones(2)).tolist() == [0, 0]


@pytest.mark.parametrize("parts", [1, 2])
def test_u12_2_the_model_and_the_random_state_are_left_as_found(parts: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    model(inputs).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    def loss() -> Tensor:
        return model(inputs).square().mean()

    losses = loss if parts == 1 else [loss] * parts
    size = sum(p.numel() for p in model.parameters())
    v, w = torch.randn(2, size, dtype=torch.float64)
    torch.set_rng_state(random)
    of_v, of_w = hessian_vector_product(losses, model, v), hessian_vector_product(losses, model, w)

    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and of_v.abs().max() > 1e-3
    assert torch.allclose(v @ of_w, w @ of_v, rtol=1e-10)  # one dropout mask, so one symmetric Hessian


def test_attention_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    vector = torch.randn(64, dtype=torch.float64)

    def fused() -> Tensor:
        states = inputs @ weight
        return F.scaled_dot_product_attention(states, states, inputs, is_causal=True).square().mean()

    def plain() -> Tensor:
        states = inputs @ weight
        scores = (states @ states.mT / 8**0.5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
        return (scores.softmax(-1) @ inputs).square().mean()

    product = hessian_vector_product(fused, [weight], vector)
    assert torch.allclose(product, hessian_vector_product(plain, [weight], vector), atol=1e-12)


def test_a_mixture_of_experts_against_finite_differences() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float64)
    model.set_experts_implementation("eager")  # the only one for float64
    params = [p for name, p in model.named_parameters() if "layers.3" in name]
    tokens = torch.arange(100, 116)[None]

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) * 1e-2 for p in params]
    product = hessian_vector_product(loss, params, directions)

    @torch.no_grad()
    def move(step: float) -> None:
        for p, direction in zip(params, directions, strict=True):
            p.add_(direction, alpha=step)

    step = 1e-4  # further away a token changes its expert; nearer, norms and routers round to float32
    move(step)
    difference = loss_gradient(loss, params)
    move(-2 * step)
    difference = (difference - loss_gradient(loss, params)) / (2 * step)
    assert (product - difference).norm() < 0.02 * product.norm()


def one(dtype: torch.dtype = torch.float32, **options: bool) -> Tensor:
    return torch.ones(2, dtype=dtype, **{"requires_grad": True, **options})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "params is empty"),
        ([one(torch.bfloat16)], "torch.bfloat16 on cpu: expected all float32 or all float64"),
        ([one(), one(torch.float64)], "torch.float32 on cpu, torch.float64 on cpu"),
        ([one(), one(requires_grad=False)], "tensor 1 of params does not require a gradient"),
        ([one()] * 2, "a tensor twice"),
    ],
)
def test_parameters_refused(params: list[Tensor], message: str) -> None:
    params = [params[0], params[0]] if message == "a tensor twice" else params
    with pytest.raises(ValueError, match=message):
        loss_gradient(lambda: sum(p.float().sum() for p in params), params)


def test_losses_refused() -> None:
    x = one()
    with pytest.raises(ValueError, match=r"shape \[2\], requires_grad=True: expected a scalar"):
        loss_gradient(lambda: x**2, [x])
    with pytest.raises(ValueError, match=r"shape \[\], requires_grad=False"):
        loss_gradient(lambda: torch.tensor(1.0), [x])
    with pytest.raises(ValueError, match="depends on none of params"):
        loss_gradient(lambda: x.sum(), [one()])
    with pytest.raises(ValueError, match="only once"):
        loss_gradient(iter([lambda: x.sum()]), [x])
    with pytest.raises(ValueError, match="holds no function"):
        loss_gradient([], [x])
    with pytest.raises(ValueError, match=r"shape \[3\]: expected \[2\]"):
        hessian_vector_product(lambda: (x**2).sum(), [x], torch.ones(3))
    with pytest.raises(BurnishError, match="not finite"):
        hessian_vector_product(lambda: (x - 1).sqrt().sum(), [x], torch.ones(2))
