"""Muon beside its twin, the published step, and torch's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.optim import Muon, orthogonalize
from tests.optim.reference import KELLER_JORDAN, AdamWTwin, MuonTwin, SGDTwin, gradient, lockstep, scalar_map, tensors

MATRICES = tensors((4, 3), (3, 4), (2, 6), (2, 3, 5), (3, 4, 2, 2), seed=1)
FUSED = tensors((6, 3), (2, 6, 4), seed=2)
OTHERS = tensors((5,), (2, 2), (), seed=3)
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "heavy-ball": {"nesterov": False},
    "accumulate": {"momentum_form": "accumulate"},
    "accumulate-heavy-ball": {"momentum_form": "accumulate", "nesterov": False},
    "no-momentum": {"momentum": 0.0},
    "match-rms": {"scale": "match_rms_adamw"},
    "spectral": {"scale": "spectral"},
    "no-scale": {"scale": "none"},
    "no-decay": {"weight_decay": 0.0},
    "cautious": {"cautious": True, "weight_decay": 2.0},
    "polar-express": {"orthogonalization": "polar-express"},
    "gram": {"orthogonalization": "gram"},
    "svd": {"orthogonalization": "svd"},
    "sgd": {"auxiliary": "sgd"},
    "sgd-heavy-ball": {"auxiliary": "sgd", "nesterov": False, "momentum": 0.8},
    "auxiliary": {"auxiliary_lr": 0.01, "betas": (0.7, 0.99), "auxiliary_eps": 1e-3},
}


def twins(options: dict[str, Any]) -> list[Any]:
    """For a group of matrices, one of fused rows with its own lr and decay, and one of the others."""
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True} | options
    rule = {"momentum": options["momentum"], "nesterov": options["nesterov"],
            "form": options.get("momentum_form", "ema"), "scale": options.get("scale", "original"),
            "method": options.get("orthogonalization", "newton-schulz"),
            "cautious": options.get("cautious", False)}  # fmt: skip
    lr, decay = options.get("auxiliary_lr", options["lr"]), options["weight_decay"]
    others: Any
    if options.get("auxiliary") == "sgd":
        others = SGDTwin(OTHERS, lr=lr, weight_decay=decay, momentum=options["momentum"], nesterov=options["nesterov"])
    else:
        betas, eps = options.get("betas", (0.9, 0.95)), options.get("auxiliary_eps", 1e-8)
        others = AdamWTwin(OTHERS, lr=lr, weight_decay=decay, betas=betas, eps=eps)
    return [
        MuonTwin(MATRICES, lr=options["lr"], weight_decay=decay, **rule),
        MuonTwin(FUSED, lr=0.02, weight_decay=0.3, **rule, splits=(3, 1, 2)),
        others,
    ]


def build(parameters: list[list[Tensor]], options: dict[str, Any]) -> Muon:
    matrices, fused, others = parameters
    own = {"use_muon": True, "splits": (3, 1, 2), "lr": 0.02, "weight_decay": 0.3}
    groups = [{"params": matrices, "use_muon": True}, {"params": fused, **own}, {"params": others, "use_muon": False}]
    return Muon(groups, **({"lr": 0.05} | options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_u7_3_each_step_equals_the_twin_with_resumes_and_resting_tensors(variant: str) -> None:
    options = VARIANTS[variant]
    lockstep(twins(options), lambda parameters: build(parameters, options), resume=(4, 9), tolerance=2e-12)


def test_maximizing_follows_the_gradient_upwards() -> None:
    lockstep(twins({}), lambda parameters: build(parameters, {"maximize": True}), sign=-1.0, tolerance=2e-12)


def test_lr_is_read_at_each_step() -> None:
    """Muon has a schedule like any other optimizer."""
    ours, factors = twins({}), [1.0, 0.5, 2.0, 0.0] * 4

    def schedule(optimizer: torch.optim.Optimizer, t: int) -> None:
        for group, lr in zip(optimizer.param_groups, (0.05, 0.02, 0.05), strict=True):
            group["lr"] = lr * factors[t - 1]

    for twin, lr in zip(ours, (0.05, 0.02, 0.05), strict=True):
        plain, count = twin.step, iter(factors)

        def step(gradients: Any, twin: Any = twin, lr: float = lr, plain: Any = plain, count: Any = count) -> None:
            twin.lr = lr * next(count)
            plain(gradients)

        twin.step = step
    lockstep(ours, lambda parameters: build(parameters, {}), before=schedule, tolerance=2e-12)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("original", [0.995518032, 2.001443461, 2.981226035, 3.978449047, 5.004541063, 5.972735230]),
        ("match_rms_adamw", [0.997297994, 1.997539643, 2.990386977, 3.988167212, 4.994112834, 5.983682471]),
    ],
)
def test_the_published_step(scale: str, expected: list[float]) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64))
    weight.grad = torch.tensor([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]], dtype=torch.float64)
    # The published values divide by the norm plus 1e-7, not by the larger of the two: that moves the sixth digit.
    update = weight.grad * (1 - 0.95**2)
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    published = u @ torch.diag(scalar_map(s / (update.norm() + 1e-7), KELLER_JORDAN)) @ vh
    assert published.flatten().tolist() == pytest.approx(
        [0.101325902, -0.222228356, 0.521494958, 0.553215339, -0.593636410, 0.623181619], abs=1e-9
    )
    torch.testing.assert_close(orthogonalize(update), published, rtol=0, atol=1e-5)
    before = weight.detach().clone()
    Muon([weight], lr=0.02, scale=scale).step()
    assert weight.flatten().tolist() == pytest.approx(expected, abs=3e-7)
    factor = 1.5**0.5 if scale == "original" else 0.2 * 3**0.5
    ours = before * (1 - 0.02 * 0.1) - 0.02 * factor * orthogonalize(update)
    torch.testing.assert_close(weight.detach(), ours, rtol=1e-14, atol=0)


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_parity_with_torch_muon(adjust: str | None, nesterov: bool, shape: tuple[int, int]) -> None:
    """Both orthogonalise in bfloat16, by kernels that may round in another order: a direction of entries near
    1/sqrt(max) moves by less than 2 % of that, six steps in a row."""
    start = tensors(shape)[0].float()
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([mine], lr=0.02, nesterov=nesterov, scale=adjust or "original", weight_decay=0.2)
    peer = torch.optim.Muon([theirs], lr=0.02, nesterov=nesterov, adjust_lr_fn=adjust, weight_decay=0.2)
    ratio = 0.2 * max(shape) ** 0.5 if adjust == "match_rms_adamw" else max(1, shape[0] / shape[1]) ** 0.5
    for t in range(6):
        mine.grad = gradient(start, t, 0).float()
        theirs.grad = mine.grad.clone()
        ours.step()
        peer.step()
        assert float((mine - theirs).detach().abs().max()) < (t + 1) * 0.02 * ratio * 0.02 / max(shape) ** 0.5
    torch.testing.assert_close(
        ours.state[mine]["momentum_buffer"], peer.state[theirs]["momentum_buffer"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("auxiliary", ["adamw", "sgd", "sgd-heavy-ball"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_of_the_other_tensors_with_torch(auxiliary: str, dtype: torch.dtype) -> None:
    start = [w.to(dtype) for w in tensors((5,), (3, 4), ())]
    mine, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    nesterov = auxiliary != "sgd-heavy-ball"
    groups = [{"params": mine, "use_muon": False}]
    kind: Any = auxiliary.split("-")[0]
    ours = Muon(groups, lr=0.03, momentum=0.9, nesterov=nesterov, auxiliary=kind, betas=(0.8, 0.9))
    peer: Any = torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.9), weight_decay=0.1)
    if auxiliary != "adamw":  # torch couples weight decay to the gradient in SGD; ours is decoupled
        peer = torch.optim.SGD(theirs, lr=0.03, momentum=0.9, nesterov=nesterov)
    for t in range(12):
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            one.grad = None if (t, index) == (3, 1) else gradient(one.detach().double(), t, index).to(dtype)
            other.grad = None if one.grad is None else one.grad.clone()
            if auxiliary != "adamw" and other.grad is not None:
                other.data.mul_(1 - 0.03 * 0.1)
        ours.step()
        peer.step()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(
                one.detach(), other.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0
            )


def test_the_dtype_of_the_products_may_be_chosen() -> None:
    """float32 products are near float64's; bfloat16 ones, the default below float64, are not."""
    steps = {}
    for given, dtype in ((torch.float64, None), (torch.float32, torch.float32), (torch.float32, None),
                         (torch.float64, torch.bfloat16)):  # fmt: skip
        weight = nn.Parameter(torch.zeros(24, 40, dtype=given))
        weight.grad = tensors((24, 40))[0].to(given)
        Muon([weight], lr=1.0, dtype=dtype).step()
        steps[given, dtype] = weight.detach().double()
    exact = steps.pop((torch.float64, None))
    errors = {key: float((step - exact).norm() / exact.norm()) for key, step in steps.items()}
    assert errors[torch.float32, torch.float32] < 1e-5
    assert 1e-3 < errors[torch.float32, None] < 0.05 and 1e-3 < errors[torch.float64, torch.bfloat16] < 0.05


def test_the_two_momentum_forms_differ_by_what_orthogonalisation_does_not_see() -> None:
    start = tensors((4, 6))[0]
    paths = []
    for form in ("ema", "accumulate"):
        weight = nn.Parameter(start.clone())
        optimizer = Muon([weight], lr=0.02, momentum_form=form)
        for t in range(6):
            weight.grad = gradient(start, t, 0)
            optimizer.step()
        paths.append((weight.detach(), optimizer.state[weight]["momentum_buffer"]))
    torch.testing.assert_close(paths[0][0], paths[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(paths[0][1], paths[1][1] * 0.05, rtol=1e-12, atol=0)


def test_cautious_decay_spares_what_the_step_pushes_away_from_zero() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64))
    weight.grad = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    step = orthogonalize(weight.grad, method="svd") * 0.1
    before = weight.detach().clone()
    Muon([weight], lr=0.1, weight_decay=0.5, cautious=True, orthogonalization="svd").step()
    shrunk = (before - step - weight.detach()) / before
    assert shrunk.flatten().tolist() == pytest.approx([0.05, 0.0, 0.0, 0.05], abs=2e-16)
