"""Statistics of batch normalisation at the weights that are shipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from burnish.optim import AMUSE, SGDScheduleFree
from burnish.optim.batch_norm import refresh_batch_norm


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, momentum=0.3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images [32, 1, 8, 8] of four kinds of stripes in noise, and their kind."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    kinds = torch.stack([torch.sin(rows), torch.sin(cols), torch.sin(rows + cols), torch.sin(2 * rows)])
    found = []
    for _ in range(count):
        labels = torch.randint(4, (32,), generator=generator)
        noise = torch.randn(32, 1, 8, 8, generator=generator)
        found.append((kinds[labels][:, None] + noise, labels))
    return found


def test_statistics_are_the_plain_mean_over_the_batches_at_these_weights() -> None:
    model, data = net(), batches(7)
    momenta = [module.momentum for module in model if isinstance(module, nn.BatchNorm2d)]
    refresh_batch_norm(model, data, num_batches=5)
    expected: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], 4: []}
    with torch.no_grad():
        for images, _ in data[:5]:
            hidden = images
            for index, layer in enumerate(model):
                if index in expected:
                    expected[index].append((hidden.mean((0, 2, 3)), hidden.var((0, 2, 3))))
                    hidden = nn.functional.batch_norm(hidden, None, None, layer.weight, layer.bias, training=True)
                else:
                    hidden = layer(hidden)
    for index, seen in expected.items():
        means, variances = zip(*seen, strict=True)
        norm = model[index]
        torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-6)
        assert int(norm.num_batches_tracked) == 5
    assert [module.momentum for module in model if isinstance(module, nn.BatchNorm2d)] == momenta


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_weights_are_left_as_they_were(training: bool) -> None:
    model = net().train(training)
    model[2].train(not training)
    modes = [module.training for module in model.modules()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    refresh_batch_norm(model, (images for images, _ in batches(3)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_normalisation_keeps_its_statistics_and_normalises_with_them(training: bool) -> None:
    frozen, twin = net().train(training), net().train(training)
    frozen[1].train(not training)
    for model in (frozen, twin):
        model[1].running_mean.fill_(0.5)
        model[1].running_var.fill_(4.0)
    frozen[1].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in frozen[1].state_dict().items()}
    data = [images for images, _ in batches(3)]
    refresh_batch_norm(frozen, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen[1].state_dict().items())
    first = nn.Sequential(twin[0], nn.BatchNorm2d(6)).eval()
    first[1].load_state_dict(before)
    with torch.no_grad():
        expected = torch.stack([twin[3](first(images).relu()).mean((0, 2, 3)) for images in data]).mean(0)
    torch.testing.assert_close(frozen[4].running_mean, expected, rtol=1e-4, atol=1e-6)


def test_without_a_batch_nothing_is_changed() -> None:
    model = net()
    model(batches(1)[0][0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="no batch to measure"):
        refresh_batch_norm(model, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_batch_normalisation_is_not_run() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    refresh_batch_norm(model, [torch.ones(2, 3)])


@pytest.mark.parametrize("name", ["amuse", "sgd-schedule-free"])
def test_u7_5_the_average_needs_statistics_of_its_own(name: str) -> None:
    """Trained for a while, the average with its own statistics is better than with those of the training weights."""
    model = net()
    options = {"scale": "original", "auxiliary": "sgd", "beta1": 0.4, "rho": 0.0}
    optimizer: AMUSE | SGDScheduleFree
    if name == "amuse":
        optimizer = AMUSE(model, lr=0.1, warmup_steps=4, **options)  # type: ignore[arg-type]
    else:
        optimizer = SGDScheduleFree(model, lr=3.0, momentum=0.4, warmup_steps=4)
    train, heldout = batches(80), batches(4, seed=1)
    for images, labels in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    @torch.no_grad()
    def loss() -> float:
        model.eval()
        losses = [nn.functional.cross_entropy(model(images), labels) for images, labels in heldout]
        model.train()
        return float(torch.stack(losses).mean())

    with optimizer.averaged():
        stale = loss()
        refresh_batch_norm(model, train)
        fresh = loss()
    assert fresh < 0.6 * stale, (fresh, stale)
    assert fresh < 0.1  # chance is 1.39
