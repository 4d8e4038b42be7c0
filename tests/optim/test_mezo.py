"""MeZO and MeZO-BCD: the published update, exact restoring, blocks, estimates, replay."""

from __future__ import annotations

import functools
import io
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.errors import TrainingError
from burnish.optim import MeZO, MeZOBCD
from burnish.optim.blocks import derived_seed
from burnish.optim.perturbation import Direction, LowRank, Perturbation, Sparse, Subspace, row

Make = Callable[..., MeZO]


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Layers of several sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3)
        ).to(dtype)


def objective(model: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator).to(dtype), torch.randint(3, (40,), generator=generator)
    return lambda: nn.functional.cross_entropy(model(x).float(), y)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in model.parameters()]).clone()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def noise_of(optimizer: MeZO, seed: int) -> list[Tensor]:
    """z of the tensors of an optimizer in a step without slow parts."""
    rows = [row(i, (tensor.detach(),) * 2, {}, split=True) for i, tensor in enumerate(optimizer.tensors())]
    return list(Direction(optimizer.perturbation, seed).walk(rows))


def published(tensors: list[Tensor], loss: Callable[[], Tensor], seed: int, lr: float, eps: float) -> None:
    """One step of the released MeZO on float32 weights, from its description."""

    def move(scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in tensors:
            tensor += scale * eps * torch.randn(tensor.shape, generator=generator)

    move(1)
    ahead = float(loss())
    move(-2)
    slope = (ahead - float(loss())) / (2 * eps)
    move(1)
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor -= lr * slope * torch.randn(tensor.shape, generator=generator)


@torch.no_grad()
def test_in_place_it_is_the_published_loop() -> None:
    ours, theirs = network(), network()
    optimizer = MeZO([*ours.named_parameters()], lr=0.02, copy=False, seed=7)
    for step in range(20):
        optimizer.step(objective(ours))
        published(list(theirs.parameters()), objective(theirs), derived_seed(7, step), 0.02, 1e-3)
    # The difference of two losses is divided by 2 eps, which makes their rounding 500 times as large.
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=2e-4)
    assert (flat(ours) - flat(network())).abs().max() > 0.02


@pytest.mark.parametrize("copied", [True, False])
def test_worked_step(copied: bool) -> None:
    """theta (.5, .5), L = g.theta, g = (1, -2), lr .1: theta - lr (z.g) z."""
    theta = torch.tensor([0.5, 0.5], dtype=torch.float64)
    gradient = torch.tensor([1.0, -2.0], dtype=torch.float64)
    optimizer = MeZO([theta], lr=0.1, copy=copied, seed=3)
    z = noise_of(optimizer, derived_seed(3, 0))[0]
    record = optimizer.measure(lambda: float(gradient @ theta))
    assert record.gradients[0] == pytest.approx(float(z @ gradient), rel=1e-9)
    assert record.loss == pytest.approx(-0.5, rel=1e-9)
    optimizer.step()
    torch.testing.assert_close(theta, torch.tensor([0.5, 0.5]).double() - 0.1 * (z @ gradient) * z, rtol=1e-9, atol=0)


def test_card_numbers() -> None:
    """The card's worked step: z = (.6, -.8) gives a projected gradient of 2.2 and theta (.368, .676)."""

    class Fixed(Perturbation):
        def draw(self, weights: Tensor, source: Any) -> Tensor:
            return torch.tensor([0.6, -0.8], dtype=torch.float64)

    theta = torch.tensor([0.5, 0.5], dtype=torch.float64)
    optimizer = MeZO([theta], lr=0.1, perturbation=Fixed())
    optimizer.step(lambda: float(theta[0] - 2 * theta[1]))
    torch.testing.assert_close(theta, torch.tensor([0.368, 0.676], dtype=torch.float64), rtol=1e-10, atol=0)


def test_central_is_exact_on_quadratics_and_forward_is_off_by_half_the_curvature() -> None:
    matrix = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def loss() -> float:
        return float(theta @ matrix @ theta / 2)

    for eps in (10.0, 1e-2):
        central = MeZO([theta], eps=eps)
        z = noise_of(central, derived_seed(0, 0))[0]
        slope = float(z @ matrix @ theta)
        assert central.measure(loss).gradients[0] == pytest.approx(slope, rel=1e-10)
        forward = MeZO([theta], eps=eps, estimate="forward")
        assert forward.measure(loss).gradients[0] == pytest.approx(slope + eps / 2 * float(z @ matrix @ z), rel=1e-8)


def test_leave_one_out_compares_the_queries() -> None:
    theta = torch.zeros(3, dtype=torch.float64)
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    optimizer = MeZO([theta], estimate="leave-one-out", queries=4, seed=5)
    seed = derived_seed(5, 0)
    seeds = [seed, *(derived_seed(seed, query) for query in range(1, 4))]
    slopes = [float(noise_of(optimizer, one)[0] @ gradient) for one in seeds]
    expected = [slope - (sum(slopes) - slope) / 3 for slope in slopes]
    assert optimizer.measure(lambda: float(gradient @ theta) + 7).gradients == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("estimate", "evaluations"), [("central", 6), ("forward", 4), ("leave-one-out", 3)])
@pytest.mark.parametrize("copied", [True, False])
def test_queries_are_averaged(estimate: Any, evaluations: int, copied: bool) -> None:
    theta = torch.zeros(4, dtype=torch.float64)
    calls = []

    def loss() -> float:
        calls.append(1)
        return float(theta.sum())

    optimizer = MeZO([theta], lr=0.5, queries=3, estimate=estimate, copy=copied)
    record = optimizer.measure(loss, restore=False)
    optimizer.step()
    assert len(calls) == evaluations
    seeds = [record.seed, derived_seed(record.seed, 1), derived_seed(record.seed, 2)]
    mean = sum(g * noise_of(optimizer, seed)[0] for g, seed in zip(record.gradients, seeds, strict=True)) / 3
    torch.testing.assert_close(theta, -0.5 * mean, rtol=1e-9, atol=1e-12)


def test_more_queries_less_variance() -> None:
    """The mean of n estimates has an n-th of the variance: 1 + (d + 1) / n times |g|^2 is its second moment."""
    gradient = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for queries in (1, 4):
        lengths = []
        for seed in range(1500):
            theta = torch.zeros(10, dtype=torch.float64)
            optimizer = MeZO([theta], lr=1.0, queries=queries, seed=seed)
            optimizer.step(lambda theta=theta: float(gradient @ theta))  # type: ignore[misc]
            lengths.append(float(theta.square().sum() / gradient.square().sum()))
        found = torch.tensor(lengths)
        assert abs(found.mean() - (1 + 11 / queries)) < 4 * found.std() / 1500**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [MeZO, MeZOBCD])
def test_with_a_copy_weights_are_restored_exactly(make: Make, dtype: torch.dtype) -> None:
    model = network(dtype)
    before = flat(model)
    optimizer = make(model, copy=True)
    seen = []
    optimizer.measure(lambda: seen.append(flat(model)) or float(len(seen)))  # type: ignore[func-returns-value]
    assert torch.equal(flat(model), before)
    assert not torch.equal(seen[0], before) and not torch.equal(seen[0], seen[1])


def test_in_place_weights_come_back_up_to_rounding() -> None:
    model = network()
    before = flat(model)
    MeZO(model, copy=False).measure(objective(model))
    change = float((flat(model) - before).norm() / before.norm())
    assert 0 < change < 1e-6


def test_only_the_active_block_is_touched() -> None:
    model = network()
    optimizer = MeZOBCD(model, lr=0.1, interval=2, order="ascending")
    names = ["0", "2", "3", "5"]
    assert [block.name for block in optimizer.blocks] == names
    for step in range(10):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        during: list[str] = []

        def loss(before: dict[str, Tensor] = before, during: list[str] = during) -> float:
            state = model.state_dict()
            during.extend(name for name in state if not torch.equal(state[name], before[name]))
            return float(objective(model)())

        optimizer.step(loss)
        changed = {n.split(".")[0] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        assert changed == {name.split(".")[0] for name in during} == {names[step // 2 % 4]}
        held = {id(tensor) for tensor in optimizer.tensors() if "copy" in optimizer.state[tensor]}
        assert held == {id(optimizer.tensors()[index]) for index in optimizer.blocks[step // 2 % 4].tensors}


def test_what_a_block_needs_is_given_up_with_it() -> None:
    model = network()
    optimizer = MeZOBCD(model, interval=1, order="ascending", update="adam", perturbation=Subspace(2))
    sizes = []
    for _ in range(4):
        optimizer.step(objective(model))
        sizes.append(sum(value.numel() for state in optimizer.state.values() for value in state.values()))
        assert set(optimizer._bases) <= set(optimizer.blocks[optimizer.next_step - 1].tensors)
    assert sizes == [3 * block.size for block in optimizer.blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
def test_one_block_of_everything_is_mezo_bit_for_bit(dtype: torch.dtype, update: Any) -> None:
    """Oracle 1 of the method."""
    ours, theirs = network(dtype), network(dtype)
    options: dict[str, Any] = {"lr": 1e-3, "update": update, "copy": True, "weight_decay": 0.1}
    one = MeZOBCD(ours, blocks=["*"], interval=3, **options)
    other = MeZO(theirs, **options)
    for _ in range(10):
        one.step(objective(ours, dtype))
        other.step(objective(theirs, dtype))
    assert same(ours, theirs) and not same(ours, network(dtype))


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_kept_noise_and_deferred_restoring_change_nothing(copied: bool, keep: bool) -> None:
    ours, theirs = network(), network()
    one = MeZO(ours, lr=0.01, copy=copied, keep_noise=keep, queries=2)
    other = MeZO(theirs, lr=0.01, copy=copied, queries=2)
    for _ in range(5):
        one.step(objective(ours))
        other.measure(objective(theirs))
        other.step()
    assert same(ours, theirs) and not same(ours, network())


@pytest.mark.parametrize(
    ("update", "peer"),
    [
        ("sgd", lambda tensors: torch.optim.SGD(tensors, 0.05)),
        ("momentum", lambda tensors: torch.optim.SGD(tensors, 0.05, momentum=0.8)),
        ("adam", lambda tensors: torch.optim.Adam(tensors, 0.05, betas=(0.7, 0.9), eps=1e-6)),
        (
            "adam decayed",
            lambda tensors: torch.optim.AdamW(tensors, 0.05, betas=(0.7, 0.9), eps=1e-6, weight_decay=0.3),
        ),
    ],
)
def test_updates_are_those_of_torch_fed_with_the_estimate(update: str, peer: Any) -> None:
    ours, theirs = torch.linspace(-1, 1, 9).double(), torch.linspace(-1, 1, 9).double().requires_grad_()
    decay = {"weight_decay": 0.3} if "decayed" in update else {}
    optimizer = MeZO([ours], lr=0.05, update=update.split()[0], momentum=0.8, betas=(0.7, 0.9), adam_eps=1e-6, **decay)
    reference = peer([theirs])
    for _ in range(12):
        record = optimizer.measure(lambda: float((ours**2).sum() + ours.sum()))
        optimizer.step()
        theirs.grad = record.gradients[0] * noise_of(optimizer, record.seed)[0]
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_a_new_turn_starts_without_momentum() -> None:
    """Two blocks by turns: the step of a new turn is that of plain descent."""
    tensors = [("0.w", torch.zeros(3).double()), ("1.w", torch.zeros(3).double())]
    optimizer = MeZOBCD(tensors, lr=1.0, update="momentum", order="ascending", interval=2)
    gradient = torch.tensor([1.0, 2.0, 3.0]).double()
    steps = []
    for _ in range(8):
        before = [tensor.clone() for _, tensor in tensors]
        record = optimizer.measure(lambda: float(sum(gradient @ tensor for _, tensor in tensors)))
        optimizer.step()
        z = noise_of(MeZO([tensors[0][1]]), record.seed)[0]
        moved = sum(b - t for b, (_, t) in zip(before, tensors, strict=True))
        steps.append(torch.allclose(moved, record.gradients[0] * z, rtol=1e-8))  # type: ignore[arg-type]
    assert steps == [True, False] * 4


def test_accumulated_batches_are_one_larger_batch() -> None:
    ours, theirs = torch.ones(5).double(), torch.ones(5).double()
    batches = [torch.randn(5, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
    one, other = MeZO([ours], lr=0.1), MeZO([theirs], lr=0.1)
    for batch in batches:
        record = one.measure(functools.partial(lambda b: float(b @ ours), batch))
    assert record.repeats == 3
    one.step()
    other.step(lambda: sum(float(batch @ theirs) for batch in batches) / 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_clipped() -> None:
    theta = torch.zeros(3)
    assert MeZO([theta], clip=0.5).measure(lambda: float(1000 * theta.sum())).gradients[0] in (-0.5, 0.5)
    assert abs(MeZO([theta], clip=1e9).measure(lambda: float(1000 * theta.sum())).gradients[0]) > 0.5


def test_a_step_function_can_be_minimised() -> None:
    """An objective without a gradient: how many of eight numbers are below 1."""
    theta = torch.zeros(8)
    optimizer = MeZO([theta], lr=0.3, eps=1.0, queries=4, seed=1)
    losses = [optimizer.step(lambda: int((theta < 1).sum())) for _ in range(200)]
    assert losses[0] > 6 and sum(losses[-20:]) / 20 < 3


@pytest.mark.parametrize(
    "perturbation", [None, LowRank(1), Subspace(4, 10), Sparse(0.5), Sparse(0.5, by="random")], ids=repr
)
def test_every_perturbation_learns(perturbation: Perturbation | None) -> None:
    model = network(seed=2)
    start = float(objective(model)().detach())
    optimizer = MeZO(model, lr=0.02, perturbation=perturbation)
    for _ in range(800):
        optimizer.step(objective(model))
    assert float(objective(model)().detach()) < 0.9 * start


def test_sparse_by_magnitude_keeps_large_weights_for_ever() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = MeZO(model, lr=1e-4, perturbation=Sparse(0.25))
    for _ in range(3):
        optimizer.step(objective(model))
    for name, value in model.named_parameters():
        moved = value != before[name]
        assert moved.sum() <= max(1, round(0.25 * value.numel())) or before[name].unique().numel() == 1
    assert not same(model, network())


def test_u7_3_u2_1_saved_loaded_and_continued_bitwise() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for make in (MeZO, MeZOBCD):
            extra: dict[str, Any] = {"interval": 3} if make is MeZOBCD else {}
            options = {"lr": 1e-3, "update": "adam", "perturbation": Sparse(0.5), **extra}
            model = network(dtype)
            optimizer = make(model, **options)
            for step in range(11):
                if step == 7:
                    file = io.BytesIO()
                    torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                optimizer.step(objective(model, dtype))
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            resumed = network(dtype, seed=5)
            resumed.load_state_dict(saved["weights"])
            other = make(resumed, **options)
            other.load_state_dict(saved["optimizer"])
            assert other.next_step == 7
            for _ in range(4):
                other.step(objective(resumed, dtype))
            assert same(model, resumed)
            states = [[s[k] for s in o.state.values() for k in sorted(s)] for o in (optimizer, other)]
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_u12_2_no_global_random_state_is_touched() -> None:
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.randn(3), random.random())
    torch.manual_seed(3)
    random.seed(3)
    model = network()
    optimizer = MeZOBCD(model, perturbation=Subspace(2), interval=1)
    for _ in range(3):
        optimizer.step(objective(model))
    assert torch.equal(torch.randn(3), expected[0]) and random.random() == expected[1]


def test_u12_1_the_same_seed_gives_the_same_run() -> None:
    ends = []
    for seed in (0, 0, 1):
        model = network()
        optimizer = MeZO(model, lr=0.01, seed=seed)
        for _ in range(3):
            optimizer.step(objective(model))
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_a_closure_that_draws_is_refused_or_given_common_numbers() -> None:
    for draw in (lambda: float(torch.rand(())), random.random):
        model = network()
        before = flat(model)
        with pytest.raises(ValueError, match=r"the closure changed the random state .* call model.eval\(\)"):
            MeZO(model, copy=True).step(draw)
        assert torch.equal(flat(model), before)
        seen: list[float] = []
        optimizer = MeZO(model, randomness="common")
        for _ in range(2):
            optimizer.step(lambda draw=draw, seen=seen: seen.append(draw()) or seen[-1])  # type: ignore[misc]
        assert seen[0] == seen[1] != seen[2] == seen[3]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("copied", [True, False])
def test_a_loss_that_is_no_number(loss: float, copied: bool) -> None:
    model = network()
    before = flat(model)
    with pytest.raises(TrainingError, match=r"the losses of step 0 are 1, (nan|inf|-inf); the weights are as before"):
        values = iter([1.0, loss])
        MeZO(model, copy=copied).step(lambda: next(values))
    torch.testing.assert_close(flat(model), before, rtol=0, atol=0 if copied else 1e-6)
    optimizer = MeZO(model, copy=copied, nonfinite="skip", lr=0.1)
    with pytest.warns(UserWarning, match="step 0 left out"):
        assert optimizer.step(lambda: loss) is None
    torch.testing.assert_close(flat(model), before, rtol=0, atol=0 if copied else 1e-6)
    assert optimizer.next_step == 1


@pytest.mark.parametrize("make", [MeZO, MeZOBCD])
def test_a_closure_that_fails_leaves_the_weights(make: Make) -> None:
    model = network()
    before = flat(model)
    optimizer = make(model, copy=True)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert torch.equal(flat(model), before)
    optimizer.step(objective(model))
    other = network()
    make(other, copy=True).step(objective(other))
    assert same(model, other)


def test_weights_changed_by_somebody_else_are_not_overwritten() -> None:
    model = network()
    optimizer = MeZO(model, copy=True)
    optimizer.step(objective(model))
    with torch.no_grad():
        model[0].weight.mul_(1.0)
    optimizer.step(objective(model))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"0.weight was changed since the last step: build a new optimizer"):
        optimizer.step(objective(model))


def test_one_dimension_is_not_decayed_in_a_model() -> None:
    optimizer = MeZO(network(), weight_decay=0.1)
    assert {
        tensor.ndim > 1: group["weight_decay"] for group in optimizer.param_groups for tensor in group["params"]
    } == {
        True: 0.1,
        False: 0.0,
    }
    frozen = network()
    for name, tensor in frozen.named_parameters():
        tensor.requires_grad_(name.startswith("0."))
    assert MeZO(frozen).names() == ["0.weight", "0.bias"]


def test_schedulers_of_torch_move_the_rate() -> None:
    model = network()
    optimizer = MeZO(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    rates = []
    for _ in range(5):
        rates.append(optimizer.measure(objective(model)).lr[0])
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, r"eps=0: expected a number in \(0, inf\)"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"update": "lion"}, "update='lion': choose one of sgd, momentum, adam"),
        ({"estimate": "backward"}, "estimate='backward': choose one of central, forward, leave-one-out"),
        ({"estimate": "leave-one-out"}, "queries=1: expected 2 or more for 'leave-one-out'"),
        ({"queries": 0}, "queries=0: expected 1 or more"),
        ({"copy": "yes"}, "copy='yes'"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"randomness": "any"}, "randomness='any': choose one of refuse, common"),
        ({"nonfinite": "stop"}, "nonfinite='stop'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"copy": False, "perturbation": Sparse()}, "copy=False: Sparse.* looks at the weights"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeZO(network(), **options)


def test_bad_tensors_and_calls() -> None:
    with pytest.raises(ValueError, match=r"tensor 0 of group 0 is torch.int64"):
        MeZO([torch.zeros(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match="no tensor of the model requires grad"):
        MeZO(network().requires_grad_(False))
    optimizer = MeZO(network())
    with pytest.raises(RuntimeError, match="nothing was measured"):
        optimizer.step()
    with pytest.raises(ValueError, match="give all groups when the optimizer is built"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
    record = optimizer.measure(lambda: 1.0)
    optimizer.apply(record)
    with pytest.raises(ValueError, match=r"this record is of step 0 and block 0, but step 1 and block 0 come next"):
        optimizer.apply(record)
    with pytest.raises(ValueError, match=r"written by Adam|written by another library"):
        model = network()
        MeZO(model).load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


def test_no_warning_in_a_plain_loop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        MeZO(model).step(objective(model))
