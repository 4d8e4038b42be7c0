"""The three schedule-free optimizers beside their twins, the published numbers, and the `schedulefree` package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from burnish.optim import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from burnish.optim.averaging import AveragedOptimizer
from burnish.optim.radam_schedule_free import rectification
from tests.optim import reference
from tests.optim.reference import (
    AdamRule,
    GradientRule,
    RectifiedRule,
    RectifiedTwin,
    ScheduleFreeTwin,
    lockstep,
    tensors,
)

FIRST = tensors((3, 2), (4,), (), seed=1)
SECOND = tensors((2, 2), (3,), seed=2)
# Each with options of the constructor; the second group has its own lr and weight decay.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 0.2}),
    "sgd-warmup-decay": ("sgd", {"lr": 0.2, "warmup_steps": 5, "weight_decay": 0.1}),
    "sgd-weights": ("sgd", {"lr": 0.2, "warmup_steps": 5, "r": 2.0, "weight_lr_power": 1.0, "momentum": 0.6}),
    "sgd-primal-averaging": ("sgd", {"lr": 0.2, "momentum": 1.0}),
    "adamw": ("adamw", {"lr": 0.05}),
    "adamw-warmup-decay": ("adamw", {"lr": 0.05, "warmup_steps": 5, "weight_decay": 0.1, "betas": (0.95, 0.9)}),
    "adamw-eps": ("adamw", {"lr": 0.05, "eps": 0.1, "weight_lr_power": 0.0}),
    "radam": ("radam", {"lr": 0.05, "betas": (0.9, 0.99)}),
    "radam-loud": ("radam", {"lr": 0.05, "silent_sgd_phase": False, "weight_decay": 0.1, "r": 1.0}),
}
CLASSES: dict[str, type[AveragedOptimizer]] = {
    "sgd": SGDScheduleFree,
    "adamw": AdamWScheduleFree,
    "radam": RAdamScheduleFree,
}
PEERS: dict[str, Any] = {
    "sgd": schedulefree.SGDScheduleFree,
    "adamw": schedulefree.AdamWScheduleFree,
    "radam": schedulefree.RAdamScheduleFree,
}
OWN = {"lr": 0.07, "weight_decay": 0.3}


def twin(kind: str, values: list[Tensor], options: dict[str, Any]) -> ScheduleFreeTwin:
    beta2, eps = options.get("betas", (0.9, 0.999))[1], options.get("eps", 1e-8)
    shared = {"lr": options["lr"], "decay_y": options.get("weight_decay", 0.0), "r": options.get("r", 0.0),
              "power": options.get("weight_lr_power", 2.0), "warmup_steps": options.get("warmup_steps", 0)}  # fmt: skip
    if kind == "sgd":
        return ScheduleFreeTwin(
            values, [GradientRule(w.shape) for w in values], beta=options.get("momentum", 0.9), **shared
        )
    shared["beta"] = options.get("betas", (0.9, 0.999))[0]
    if kind == "adamw":
        return ScheduleFreeTwin(values, [AdamRule(w.shape, beta2=beta2, eps=eps) for w in values], **shared)
    rules = [RectifiedRule(w.shape, beta2=beta2, eps=eps) for w in values]
    return RectifiedTwin(values, rules, beta2=beta2, silent=options.get("silent_sgd_phase", True), **shared)


def build(kind: str, parameters: list[list[Tensor]], options: dict[str, Any]) -> AveragedOptimizer:
    first, second = parameters
    return CLASSES[kind]([{"params": first}, {"params": second, **OWN}], **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_u7_3_each_step_equals_the_twin_with_resumes_and_resting_tensors(variant: str) -> None:
    kind, options = VARIANTS[variant]
    twins = [twin(kind, FIRST, options), twin(kind, SECOND, options | OWN)]
    lockstep(twins, lambda parameters: build(kind, parameters, options), resume=(2, 5, 9, 10))


@pytest.mark.parametrize("kind", CLASSES)
def test_maximizing_follows_the_gradient_upwards(kind: str) -> None:
    twins = [twin(kind, FIRST, {"lr": 0.1}), twin(kind, SECOND, {"lr": 0.1} | OWN)]
    lockstep(twins, lambda parameters: build(kind, parameters, {"lr": 0.1, "maximize": True}), sign=-1.0)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_scheduler_is_followed_when_asked(kind: str) -> None:
    """Weights of the average take the largest lr so far, so that a decayed lr does not shrink them."""
    factors = [1.0, 0.5, 2.0, 1.0, 0.2, 0.0, 0.4, 0.4, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1]
    twins = [twin(kind, FIRST, {"lr": 0.1}), twin(kind, SECOND, {"lr": 0.1} | OWN)]

    def schedule(optimizer: torch.optim.Optimizer, t: int) -> None:
        for group, lr in zip(optimizer.param_groups, (0.1, OWN["lr"]), strict=True):
            group["lr"] = lr * factors[t - 1]

    for one, lr in zip(twins, (0.1, OWN["lr"]), strict=True):
        plain = one.eta

        def eta(one: Any = one, lr: float = lr, plain: Callable[[], float] = plain) -> float:
            one.lr = lr * factors[one.t - 1]
            return plain()

        one.eta = eta
    lockstep(twins, lambda parameters: build(kind, parameters, {"lr": 0.1, "scheduler": "follow"}), before=schedule)


# On 0.5 y^2 from 1: (y, z, x) after each step; None: not given.
PUBLISHED: dict[str, tuple[Any, list[tuple[float, ...]]]] = {
    "sgd": (lambda p: SGDScheduleFree(p, lr=0.5),
            [(0.5, 0.5, 0.5), (0.3625, 0.25, 0.375), (0.2525, 0.06875, 0.2729166667)]),
    "sgd-warmup-decay": (lambda p: SGDScheduleFree(p, lr=0.5, warmup_steps=4, weight_decay=0.1),
                         [(0.8625, 0.8625, 0.8625), (0.66800625, 0.6253125, 0.67275),
                          (0.4535781613, 0.3497599219, 0.4651135212)]),
    "adamw": (lambda p: AdamWScheduleFree(p, lr=0.1),
              [(0.900000001,) * 3, (0.8479653905, 0.8053916182, 0.8526958096),
               (0.7968300773, 0.7130314788, 0.8061410327)]),
    "adamw-warmup-decay": (lambda p: AdamWScheduleFree(p, lr=0.1, warmup_steps=3, weight_decay=0.1),
                           [(0.9633333337,) * 3, (0.9044302367, 0.8915002886, 0.9058668976),
                            (0.8258311686, 0.7879195075, 0.8300435754)]),
    "radam": (lambda p: RAdamScheduleFree(p, lr=0.1),
              [(1.0,) * 3] * 4 + [(0.9982688497,) * 3, (0.9964100697, 0.9956904632, 0.9964900260)]),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_first_steps_on_a_parabola(case: str) -> None:
    make, expected = PUBLISHED[case]
    y = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = make([y])
    for row in expected:
        y.grad = y.detach().clone()
        optimizer.step()
        seen = [float(y.detach()), float(optimizer.state[y]["z"])]
        with optimizer.averaged():
            seen.append(float(y.detach()))
        assert seen == pytest.approx(row, abs=6e-11)


def test_the_sgd_phase_of_radam_may_be_taken() -> None:
    y = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = RAdamScheduleFree([y], lr=0.1, silent_sgd_phase=False)
    for _ in range(4):
        y.grad = y.detach().clone()
        optimizer.step()
    seen = [float(y.detach()), float(optimizer.state[y]["z"])]
    with optimizer.averaged():
        assert [*seen, float(y.detach())] == pytest.approx([0.75737565, 0.644652, 0.7699005], abs=6e-9)


def test_the_rectification() -> None:
    for step, expected in ((5, 0.0173115), (6, 0.02582111), (10, 0.04899801), (100, 0.21533544), (1000, 0.64532565)):
        assert rectification(step, 0.999) == (pytest.approx(expected, abs=6e-8), True)
        assert reference.rectification(step, 0.999) == pytest.approx(expected, abs=6e-8)
    assert [rectification(step, 0.999) for step in range(1, 5)] == [(0.0, False)] * 4
    assert rectification(4, 0.999, silent=False) == (1.0, False)


@pytest.mark.parametrize(
    ("options", "steps", "share"),
    [
        ({"warmup_steps": 5}, 40, 0.026881720),
        ({"r": 2.0}, 40, 0.072267389),
        ({"weight_lr_power": 0.0, "warmup_steps": 5}, 40, 1 / 40),
        ({}, 3, 1 / 3),
        ({"warmup_steps": 4}, 3, 0.6428571429),
    ],
)
def test_the_share_of_a_step_in_the_average(options: dict[str, Any], steps: int, share: float) -> None:
    """And the average is the mean of the z after each step with these weights."""
    y = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGDScheduleFree([y], lr=0.3, **options)
    group, weights, total = optimizer.param_groups[0], 0.0, torch.zeros(3, dtype=torch.float64)
    for t in range(steps):
        y.grad = torch.sin(3 * y.detach() + t)
        optimizer.step()
        weight, weights = group["weight_sum"] - weights, group["weight_sum"]
        total += weight * optimizer.state[y]["z"]
    assert weight / weights == pytest.approx(share, abs=6e-10)
    with optimizer.averaged():
        torch.testing.assert_close(y.detach(), total / weights, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "primal" not in name])
def test_parity_with_schedulefree_while_training_averaged_and_after_a_resume(variant: str, dtype: torch.dtype) -> None:
    """Up to rounding, on gradients that depend on the parameters; with groups, a resting tensor, and both resumes.

    The peer starts in averaged mode, and overwrites gradients.
    """
    kind, options = VARIANTS[variant]
    start = [[w.to(dtype) for w in values] for values in (FIRST, SECOND)]

    def parameters(values: list[list[Tensor]]) -> list[list[Tensor]]:
        return [[nn.Parameter(w.detach().clone()) for w in group] for group in values]

    def groups(values: list[list[Tensor]]) -> list[dict[str, Any]]:
        return [{"params": values[0]}, {"params": values[1], **OWN}]

    mine, theirs = parameters(start), parameters(start)
    ours: Any = CLASSES[kind](groups(mine), **options)
    peer = PEERS[kind](groups(theirs), **options)
    peer.train()
    tolerance = 1e-13 if dtype == torch.float64 else 3e-5

    def same() -> None:
        for one, other in zip(chain(*mine), chain(*theirs), strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=tolerance, atol=tolerance)

    for t in range(1, 26):
        for values in (mine, theirs):
            for number, group in enumerate(values):
                for index, p in enumerate(group):
                    resting = index == 1 and t in (1, 6, 7)
                    p.grad = None if resting else reference.gradient(p.detach().double(), t, index + number).to(dtype)
        ours.step()
        peer.step()
        same()
        if t % 5 == 0:
            with ours.averaged():
                peer.eval()
                same()
            peer.train()
            same()
        if t in (8, 12):  # resume in training mode, then in averaged mode
            if t == 12:
                ours.eval()
                peer.eval()
            mine, theirs = parameters(mine), parameters(theirs)
            saved, saved_by_peer = (copy.deepcopy(one.state_dict()) for one in (ours, peer))
            ours, peer = CLASSES[kind](groups(mine), **options), PEERS[kind](groups(theirs), **options)
            ours.load_state_dict(saved)
            peer.load_state_dict(saved_by_peer)
            ours.train()
            peer.train()
            same()


def test_a_group_of_one_keeps_to_the_weight_decay_it_was_given() -> None:
    """Trainers give each group its own: at the parameters, as in the constructor."""
    one, other = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = AdamWScheduleFree([{"params": [one], "weight_decay": 0.5}, {"params": [other]}], lr=0.1)
    for _ in range(2):
        one.grad, other.grad = torch.zeros_like(one), torch.zeros_like(other)
        optimizer.step()
    # z = 1, .95, .95 - .05 y with y = z = x at first; x = mean of the two; y = .1 z + .9 x
    z = 0.95 - 0.05 * 0.95
    assert one.tolist() == pytest.approx([0.1 * z + 0.9 * (0.95 + z) / 2] * 2)
    assert other.tolist() == [1.0, 1.0]
