"""AMUSE beside its twin, its worked example, and what must hold of beta and of the window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from burnish.optim import AMUSE
from burnish.optim.amuse import beta_from_steps, beta_from_weights
from tests.optim.reference import AdamRule, AmuseTwin, GradientRule, MatrixRule, lockstep, tensors

MATRICES = tensors((4, 3), (3, 4), (2, 6), (2, 3, 5), (3, 4, 2, 2), seed=1)
TRANSPOSED = tensors((3, 6), (5, 6), seed=2)
OTHERS = tensors((5,), (2, 2), (), seed=3)
BASE: dict[str, Any] = {"lr": 0.05, "warmup_steps": 4, "beta1": 0.6, "rho": 0.8, "weight_decay": 0.1, "momentum": 0.9}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "official": {"interpolation": "official"},
    "uniform": {"averaging": "uniform"},
    "uniform-official": {"averaging": "uniform", "interpolation": "official"},
    "beta-by-steps": {"beta_schedule": "steps"},
    "beta-by-steps-official": {"beta_schedule": "steps", "interpolation": "official", "rho": 0.3},
    "beta-by-steps-uniform": {"beta_schedule": "steps", "averaging": "uniform"},
    "decay-at-y": {"weight_decay_at_y": 0.3, "weight_decay": 0.0},
    "both-decays": {"weight_decay_at_y": 0.3},
    "both-decays-official": {"weight_decay_at_y": 0.3, "interpolation": "official"},
    "heavy-ball": {"nesterov": False},
    "accumulate": {"momentum_form": "accumulate"},
    "accumulate-heavy-ball": {"momentum_form": "accumulate", "nesterov": False},
    "no-momentum": {"momentum": 0.0},
    "original-scale-sgd": {"scale": "original", "auxiliary": "sgd"},
    "spectral-scale": {"scale": "spectral"},
    "no-scale": {"scale": "none"},
    "polar-express": {"orthogonalization": "polar-express"},
    "gram": {"orthogonalization": "gram"},
    "svd": {"orthogonalization": "svd"},
    "auxiliary-lr": {"auxiliary_lr": 0.3, "beta2": 0.9, "auxiliary_eps": 1e-3},
    "polynomial-weights": {"r": 2.0, "weight_lr_power": 1.0},
    "rho-0": {"rho": 0.0},
    "rho-1": {"rho": 1.0, "beta1": 0.4},
    "primal-averaging": {"beta1": 1.0},
    "long-warmup": {"warmup_steps": 20},
}


def twins(options: dict[str, Any]) -> list[AmuseTwin]:
    """For matrices, for transposed ones with row splits and an lr and decay of their own, and for the other tensors."""

    def group(tensors: list[Tensor], rules: list[Any], **own: Any) -> AmuseTwin:
        decays = {"decay_z": own.get("weight_decay", options["weight_decay"]),
                  "decay_y": options.get("weight_decay_at_y", 0.0)}  # fmt: skip
        names = ("warmup_steps", "rho", "r", "interpolation", "averaging", "beta_schedule")
        shared = {key: options[key] for key in names if key in options}
        power = options.get("weight_lr_power", 2.0)
        return AmuseTwin(tensors, rules, lr=own["lr"], beta=options["beta1"], power=power, **decays, **shared)

    matrix = {"momentum": options["momentum"], "nesterov": options.get("nesterov", True),
              "form": options.get("momentum_form", "ema"), "scale": options.get("scale", "match_rms_adamw"),
              "method": options.get("orthogonalization", "newton-schulz")}  # fmt: skip
    if options.get("auxiliary") == "sgd":
        others: list[Any] = [GradientRule(w.shape) for w in OTHERS]
    else:
        adam = {"beta2": options.get("beta2", 0.999), "eps": options.get("auxiliary_eps", 1e-10)}
        others = [AdamRule(w.shape, **adam) for w in OTHERS]
    views = {"transposed": True, "splits": (1, 5)}
    return [
        group(MATRICES, [MatrixRule(w.shape, **matrix) for w in MATRICES], lr=options["lr"]),
        group(TRANSPOSED, [MatrixRule(w.shape, **matrix, **views) for w in TRANSPOSED], lr=0.02, weight_decay=0.4),
        group(OTHERS, others, lr=options.get("auxiliary_lr", options["lr"])),
    ]


def build(parameters: list[list[Tensor]], options: dict[str, Any]) -> AMUSE:
    matrices, transposed, others = parameters
    own = {"use_muon": True, "transposed": True, "splits": (1, 5), "lr": 0.02, "weight_decay": 0.4}
    groups = [
        {"params": matrices, "use_muon": True},
        {"params": transposed, **own},
        {"params": others, "use_muon": False},
    ]
    return AMUSE(groups, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_u7_3_each_step_equals_the_twin_with_resumes_and_resting_tensors(variant: str) -> None:
    options = BASE | VARIANTS[variant]
    lockstep(twins(options), lambda parameters: build(parameters, options), resume=(2, 5, 9, 10), tolerance=2e-12)


def test_gradients_up_the_hill_are_followed_when_maximizing() -> None:
    lockstep(twins(BASE), lambda parameters: build(parameters, BASE | {"maximize": True}), sign=-1.0, tolerance=2e-12)


def test_a_scheduler_is_followed_when_asked() -> None:
    ours, factors = twins(BASE), [1.0, 0.8, 2.0, 1.0, 0.5, 0.25, 1.0, 0.7, 0.1, 0.0, 0.3, 0.3, 0.3, 0.3]
    lrs = [twin.lr for twin in ours]

    def schedule(optimizer: torch.optim.Optimizer, t: int) -> None:
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factors[t - 1]

    for twin, lr in zip(ours, lrs, strict=True):
        twin.eta = lambda twin=twin, lr=lr: lr * factors[twin.t - 1] * min(1.0, twin.t / 4)
    lockstep(
        ours, lambda parameters: build(parameters, BASE | {"scheduler": "follow"}), before=schedule, tolerance=2e-12
    )


WORKED = {
    "official": [
        ("1.00587763 1.9785463 2.97640409 3.97483794", "1.00587763 1.9785463 2.97640409 3.97483794"),
        ("1.01617334 1.94097167 2.93509914 3.93076173", "1.01523737 1.94438755 2.93885414 3.93476866"),
        ("1.02265781 1.91731074 2.90910776 3.90300101", "1.02185048 1.92025658 2.9123438 3.90645726"),
        ("1.0287385 1.89512545 2.88474778 3.8769684", "1.02785688 1.89834205 2.8882798 3.88074278"),
    ],
    "exact": [
        ("1.00587763 1.9785463 2.97640409 3.97483794", None),
        ("1.01617334 1.94097167 2.93509914 3.93076173", None),
        ("1.02228131 1.91868478 2.91061821 3.9046128", None),
        ("1.028256 1.89688614 2.88668232 3.87903404", None),
    ],
}


@pytest.mark.parametrize("interpolation", WORKED)
def test_the_worked_example(interpolation: Any) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    target = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    optimizer = AMUSE([weight], 0.1, beta1=0.6, warmup_steps=2, weight_decay=0.1, interpolation=interpolation)
    group, weights = optimizer.param_groups[0], 0.0
    for (parameters, average), beta, share in zip(
        WORKED[interpolation],
        (0.6, 0.6, 0.8896216271, 0.9310290856),
        (1.0, 0.8, 0.4444444444, 0.3076923077),
        strict=True,
    ):
        weight.grad = weight.detach() - target
        optimizer.step()
        assert group["beta"] == pytest.approx(beta, abs=5e-11)
        assert (group["weight_sum"] - weights) / group["weight_sum"] == pytest.approx(share, abs=5e-11)
        weights = group["weight_sum"]
        assert weight.flatten().tolist() == pytest.approx([float(value) for value in parameters.split()], abs=6e-9)
        if average:
            with optimizer.averaged():
                assert weight.flatten().tolist() == pytest.approx([float(v) for v in average.split()], abs=6e-9)


def run(steps: int, *, lr: float = 1.0, shape: tuple[int, ...] = (1,), **options: Any) -> list[dict[str, float]]:
    """The numbers of the group after each of some steps."""
    weight = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = AMUSE([weight], lr, **options)
    seen = []
    for t in range(1, steps + 1):
        weight.grad = torch.sin(weight.detach() * 3 + t)
        optimizer.step()
        group = optimizer.param_groups[0]
        seen.append({key: group[key] for key in ("beta", "weight_sum", "scheduled_lr", "warmup_share")})
    return seen


@pytest.mark.parametrize(
    ("rho", "windows"),
    [(0.0, (4.705, 112.705, 1192.705)), (0.5, (4.705, 21.343722, 67.447476)), (1.0, (4.705, 4.705, 4.705))],
)
def test_the_window_over_which_x_averages_y(rho: float, windows: tuple[float, ...]) -> None:
    seen = run(2000, lr=0.3, warmup_steps=20, beta1=0.4, rho=rho, auxiliary="sgd")
    for t, expected in zip((20, 200, 2000), windows, strict=True):
        beta = seen[t - 1]["beta"]
        share = 1 - seen[t - 2]["weight_sum"] / seen[t - 1]["weight_sum"]
        assert beta + (1 - beta) / share == pytest.approx(expected, abs=6e-7)
        # 1/r_t = 1 + (1 - beta_1) (W_0 - 1)^rho (W_t - 1)^(1 - rho), W_0 = (T_0 + 1)(2 T_0 + 1) / (6 T_0)
        start, now = 21 * 41 / 120, 1 / share
        assert beta + (1 - beta) / share == pytest.approx(1 + 0.6 * (start - 1) ** rho * (now - 1) ** (1 - rho), 1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_x_averages_the_points_y_with_that_window(rho: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = AMUSE([weight], 0.1, warmup_steps=5, beta1=0.4, rho=rho)
    group = optimizer.param_groups[0]
    average, weights = weight.detach().clone(), 0.0
    for t in range(1, 40):
        weight.grad = torch.sin(weight.detach() * 3 + t)
        optimizer.step()
        share, beta = 1 - weights / group["weight_sum"], group["beta"]
        rate = share / ((1 - beta) + beta * share)
        weights = group["weight_sum"]
        average = (1 - rate) * average + rate * weight.detach()
        with optimizer.averaged():
            torch.testing.assert_close(weight.detach(), average, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("warmup_steps", "beta1", "step", "by_weights", "by_steps"),
    [
        (2000, 0.4, 4000, 0.802163, 0.655459),
        (2000, 0.4, 8000, 0.904958, 0.802133),
        (2000, 0.4, 16000, 0.949422, 0.886361),
        (6000, 0.6, 12000, 0.868069, 0.770276),
        (6000, 0.6, 16000, 0.904618, 0.817506),
    ],
)
def test_the_two_forms_of_beta_at_the_published_horizons(
    warmup_steps: int, beta1: float, step: int, by_weights: float, by_steps: float
) -> None:
    ramp = sum((t / warmup_steps) ** 2 for t in range(1, warmup_steps + 1))
    assert ramp == pytest.approx((warmup_steps + 1) * (2 * warmup_steps + 1) / (6 * warmup_steps))
    share, start = 1 / (ramp + step - warmup_steps), 1 / ramp
    assert beta_from_weights(share, start, beta1=beta1, rho=0.8) == pytest.approx(by_weights, abs=5e-7)
    assert beta_from_steps(step, warmup_steps, beta1=beta1, rho=0.8) == pytest.approx(by_steps, abs=5e-7)


def test_uniform_shares_give_the_ratio_of_steps() -> None:
    """With c = 1 / (t + 1) the general form is 1 - (T_0 / t)^rho (1 - beta_1)."""
    for t, numbers in enumerate(run(40, warmup_steps=7, beta1=0.3, rho=0.6, averaging="uniform"), start=1):
        expected = 0.3 if t <= 7 else 1 - (7 / t) ** 0.6 * 0.7
        assert numbers["beta"] == pytest.approx(expected, abs=1e-14)
        assert numbers["weight_sum"] == t + 1


@pytest.mark.parametrize("schedule", ["weights", "steps"])
def test_beta_grows_from_beta1_towards_1_whatever_the_lr(schedule: str) -> None:
    runs = [run(200, lr=lr, warmup_steps=10, beta1=0.4, rho=0.8, beta_schedule=schedule) for lr in (1e-3, 0.5)]
    betas = [[numbers["beta"] for numbers in seen] for seen in runs]
    assert betas[0] == pytest.approx(betas[1], abs=1e-12)
    assert betas[0][:10] == [0.4] * 10
    assert all(one < other < 1 for one, other in zip(betas[0][9:], betas[0][10:], strict=False))


def test_warmup_is_linear_and_then_constant() -> None:
    seen = [numbers["scheduled_lr"] for numbers in run(8, lr=0.6, warmup_steps=4)]
    assert seen == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.6, 0.6, 0.6, 0.6])


def test_beta_stays_in_its_range_when_a_followed_scheduler_raises_lr() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = AMUSE([weight], lr=0.01, warmup_steps=3, scheduler="follow")
    for t in range(1, 12):
        optimizer.param_groups[0]["lr"] = 0.01 if t < 6 else 1.0
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert 0.6 <= optimizer.param_groups[0]["beta"] <= 1, t


@pytest.mark.parametrize("auxiliary", ["adamw", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_with_rho_0_the_other_tensors_go_as_in_schedulefree(auxiliary: Any, decay: float) -> None:
    start = tensors((7,), (3, 2))
    mine, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    options = {"lr": 0.05, "warmup_steps": 5, "weight_decay_at_y": decay}
    groups = [{"params": mine, "use_muon": False}]
    ours = AMUSE(groups, **options, beta1=0.8, rho=0.0, auxiliary=auxiliary)
    peer: Any
    if auxiliary == "adamw":
        peer = schedulefree.AdamWScheduleFree(
            theirs, lr=0.05, betas=(0.8, 0.999), eps=1e-10, warmup_steps=5, weight_decay=decay
        )
    else:
        peer = schedulefree.SGDScheduleFree(theirs, lr=0.05, momentum=0.8, warmup_steps=5, weight_decay=decay)
    peer.train()
    for t in range(60):
        for one, other in zip(mine, theirs, strict=True):
            one.grad, other.grad = (torch.sin(3 * p.detach() + t) + 0.1 * p.detach() for p in (one, other))
        ours.step()
        peer.step()
        assert max(float((one - other).detach().abs().max()) for one, other in zip(mine, theirs, strict=True)) < 1e-14


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_exact_and_official_part_only_after_warmup_and_only_if_beta_grows(rho: float) -> None:
    paths = {}
    for interpolation in ("exact", "official"):
        weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = AMUSE([weight], 0.1, warmup_steps=5, rho=rho, interpolation=interpolation)
        path = []
        for t in range(10):
            weight.grad = torch.sin(weight.detach() * 3 + t)
            optimizer.step()
            path.append(weight.detach().clone())
        paths[interpolation] = torch.stack(path)
    apart = (paths["exact"] - paths["official"]).abs().amax(1)
    assert apart[:5].max() < 1e-14
    assert (apart[5:].min() > 1e-4) if rho else (apart.max() < 1e-14)


def test_exact_x_is_the_weighted_mean_of_the_z_after_each_step() -> None:
    weight = nn.Parameter(tensors((3, 4))[0])
    optimizer = AMUSE([weight], 0.1, warmup_steps=5, weight_decay=0.1)
    total, weights = torch.zeros_like(weight), 0.0
    for t in range(1, 30):
        weight.grad = torch.sin(weight.detach() * 3 + t)
        optimizer.step()
        w = min(1.0, t / 5) ** 2
        total, weights = total + w * optimizer.state[weight]["z"], weights + w
        with optimizer.averaged():
            torch.testing.assert_close(weight.detach(), total.detach() / weights, rtol=1e-12, atol=1e-13)


def test_a_resting_tensor_keeps_its_average_while_beta_grows() -> None:
    """Exact: x and z stay, and the parameters follow beta. Official: the parameters stay, and x is read off them."""
    for interpolation in ("exact", "official"):
        weight, other = (
            nn.Parameter(torch.ones(2, dtype=torch.float64)),
            nn.Parameter(torch.ones(2, dtype=torch.float64)),
        )
        optimizer = AMUSE([weight, other], 0.1, warmup_steps=2, interpolation=interpolation)
        for t in range(5):
            weight.grad, other.grad = torch.sin(weight.detach() + t), torch.ones_like(other)
            optimizer.step()
        y, z, beta = weight.detach().clone(), optimizer.state[weight]["z"].clone(), optimizer.param_groups[0]["beta"]
        x = z + (y - z) / beta
        weight.grad = None
        for _ in range(4):
            optimizer.step()
        later = optimizer.param_groups[0]["beta"]
        assert later > beta + 0.02 and not torch.allclose(y, z)
        assert torch.equal(optimizer.state[weight]["z"], z)
        expected = (1 - later) * z + later * x if interpolation == "exact" else y
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=0)
        with optimizer.averaged():
            expected = x if interpolation == "exact" else z + (y - z) / later
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=0)


def test_the_official_pull_towards_z_is_as_large_as_stated() -> None:
    """x_{t+1} = (1 - c)[x + (1 - beta_{t-1} / beta_t)(z - x)] + c z_{t+1}."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = AMUSE([weight], 0.1, warmup_steps=3, interpolation="official")
    group, x, z, beta, weights = optimizer.param_groups[0], weight.detach().clone(), weight.detach().clone(), 0.6, 0.0
    for t in range(12):
        weight.grad = torch.sin(weight.detach() * 3 + t)
        optimizer.step()
        share, new_z = 1 - weights / group["weight_sum"], optimizer.state[weight]["z"].clone()
        x = (1 - share) * (x + (1 - beta / group["beta"]) * (z - x)) + share * new_z
        z, beta, weights = new_z, group["beta"], group["weight_sum"]
        with optimizer.averaged():
            torch.testing.assert_close(weight.detach(), x, rtol=1e-13, atol=1e-14)
    assert math.isclose(weights, sum(min(1.0, t / 3) ** 2 for t in range(1, 13)) * 0.01)
