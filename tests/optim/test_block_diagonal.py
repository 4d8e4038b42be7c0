"""BlockDiagonal against torch at blocks of one, against the definition with every block written out, and its limits."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from burnish.optim import BlockDiagonal, SpectrumClip, block_diagonal
from burnish.optim.block_diagonal import EigenSteps, state_bytes
from tests.optim.reference import gradient, lockstep, tensors
from tests.optim.test_grouping import chunks, neurons_by_loops

FORMS = ("adam", "adagrad", "rmsprop")
SHAPES = [(6, 4), (5, 7), (4, 3, 3, 3), (7,), ()]


class Twin:
    """The definition, block after block, with positions of numbers from loops; float64, one decomposition each.

    x_j -= Q diag(clip(alpha / (sqrt(S) + eps))) Q' m_j, V_j = Q diag(S) Q'.
    """

    def __init__(self, starts: Sequence[Tensor], *, lr: float, form: str = "adam",
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
                 blocks: Sequence[list[list[int]]], paper: bool = False, clip: tuple[float, float] | None = None,
                 update_every: int = 1, decays: bool = False) -> None:  # fmt: skip
        self.parameters = [start.double().clone() for start in starts]
        self.blocks, self.lr, self.first_lr, self.form, self.betas = blocks, lr, lr, form, betas
        self.eps, self.weight_decay, self.paper, self.clip, self.every = eps, weight_decay, paper, clip, update_every
        self.t = [0] * len(self.parameters)
        self.m = [torch.zeros(start.numel(), dtype=torch.float64) for start in self.parameters]
        self.v = [[torch.zeros(len(one), len(one), dtype=torch.float64) for one in each] for each in blocks]
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.decays, self.now = decays, 0

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        self.now += 1
        if self.decays:
            self.lr = self.first_lr * 0.5 ** (self.now // 5)
        for i, g in enumerate(gradients):
            if g is not None:
                self.t[i] += 1
                self.move(i, g.flatten())

    def move(self, i: int, g: Tensor) -> None:
        (b1, b2), t = self.betas, self.t[i]
        if self.form != "adam":
            b1 = 0.0
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        x = (1 - self.lr * self.weight_decay) * self.parameters[i].flatten()
        for j, block in enumerate(self.blocks[i]):
            outer = torch.outer(g[block], g[block])
            self.v[i][j] = self.v[i][j] + outer if self.form == "adagrad" else b2 * self.v[i][j] + (1 - b2) * outer
            corrected = self.v[i][j] / (1 - b2**t if self.form == "adam" else 1)
            if len(block) == 1 or t <= 2 * len(block) or (t - 1) % self.every == 0:
                self.kept[i, j] = torch.linalg.eigh(corrected)
            s, q = self.kept[i, j]
            eps = self.eps / math.sqrt(1 - b2**t) if self.paper else self.eps
            e = self.lr / (1 - b1**t) / (s.clamp(min=0).sqrt() + eps)
            if self.clip:
                final, gamma = self.clip
                limit = final * self.lr / self.first_lr
                e = e.clamp(limit * (1 - 1 / (gamma * t + 1)), limit * (1 + 1 / (gamma * t)))
            x[block] -= q @ torch.diag(e) @ q.T @ self.m[i][block]
        self.parameters[i] = x.view(self.parameters[i].shape)


def positions(shape: tuple[int, ...], rule: str, size: int) -> list[list[int]]:
    if len(shape) < 2 and rule != "fixed":
        return [[number] for number in range(math.prod(shape))]
    if rule == "auto":
        rule = "filter" if len(shape) > 3 else "input"
    neurons = neurons_by_loops(shape, rule, kernel=len(shape) > 3, transposed=False)
    return chunks(neurons, len(neurons[0]) if rule == "filter" else size)


def twin(rule: str = "auto", size: int = 3, seed: int = 0, **options: Any) -> Twin:
    return Twin(tensors(*SHAPES, seed=seed), blocks=[positions(shape, rule, size) for shape in SHAPES], **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rule", "size"), [("auto", 3), ("input", 2), ("output", 3), ("fixed", 4), ("fixed", 1000)])
def test_every_step_is_that_of_the_definition(form: str, rule: str, size: int) -> None:
    """Neurons that the size divides and others, missing gradients, two groups, and going on from a saved state."""
    options: dict[str, Any] = {"lr": 0.03, "form": form, "betas": (0.8, 0.95), "eps": 1e-3}
    second = {**options, "lr": 0.01, "betas": (0.5, 0.9)}
    lockstep(
        [twin(rule, size, weight_decay=0.1, **options), twin(rule, size, seed=1, **second)],
        lambda parameters: BlockDiagonal(
            [{"params": parameters[0], "weight_decay": 0.1}, {"params": parameters[1], **second}],
            block_size=size, grouping=rule, remainder="smaller", **options,
        ),
        resume=(4, 9),
        tolerance=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("update_every", [1, 4])
def test_clipped_steps_are_those_of_the_definition_and_follow_lr(update_every: int) -> None:
    """Also with the eps of the paper, while a scheduler halves lr: bounds are halved with it."""
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}
    decaying = twin(clip=(0.05, 0.1), paper=True, update_every=update_every, decays=True, **options)

    def schedule(optimizer: torch.optim.Optimizer, t: int) -> None:
        optimizer.param_groups[0]["lr"] = decaying.lr  # the twin has moved already

    lockstep(
        [decaying],
        lambda parameters: BlockDiagonal(
            parameters[0], block_size=3, remainder="smaller", clip=SpectrumClip(0.05, 0.1), eps_form="paper",
            update_every=update_every, **options,
        ),
        before=schedule,
        resume=(6, 7),
        tolerance=1e-9,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_kept_roots_are_those_of_the_definition(form: str) -> None:
    """Each step while young, then one in five; the state of a saved run holds the root."""
    options: dict[str, Any] = {"lr": 0.02, "form": form, "betas": (0.8, 0.95), "eps": 1e-2, "update_every": 5}
    lockstep(
        [twin("auto", 2, **options)],
        lambda parameters: BlockDiagonal(parameters[0], block_size=2, remainder="smaller", **options),
        steps=24,
        resume=(7, 12, 18),
        tolerance=1e-9,
    )


def course(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 20, shapes: Any = SHAPES,
           dtype: torch.dtype = torch.float64) -> list[Tensor]:  # fmt: skip
    parameters = [nn.Parameter(value.to(dtype)) for value in tensors(*shapes)]
    optimizer = make(parameters)
    for t in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(parameter.detach(), t, index).to(dtype)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def apart(ones: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("size", [1, 3])
def test_blocks_of_one_are_the_optimizers_of_torch(eps: float, size: int) -> None:
    """Bit for bit but for the order of a sum; "diagonal" has them whatever the size."""
    options: dict[str, Any] = {"block_size": size, "eps": eps, "lr": 0.02}
    options |= {"grouping": "diagonal"} if size > 1 else {}
    adamw = course(lambda values: torch.optim.AdamW(values, lr=0.02, eps=eps, weight_decay=0.1))
    adagrad = course(lambda values: torch.optim.Adagrad(values, lr=0.02, eps=eps))
    rmsprop = course(lambda values: torch.optim.RMSprop(values, lr=0.02, eps=eps, alpha=0.9))
    assert apart(course(lambda values: BlockDiagonal(values, weight_decay=0.1, **options)), adamw) < 1e-14
    assert apart(course(lambda values: BlockDiagonal(values, form="adagrad", **options)), adagrad) < 1e-14
    found = course(lambda values: BlockDiagonal(values, form="rmsprop", betas=(0.7, 0.9), **options))
    assert apart(found, rmsprop) < 1e-14


def test_eps_of_the_paper_is_that_of_torch_over_the_correction() -> None:
    """Adam by hand with eps / sqrt(1 - beta2^t); with torch's form it is 1e-3 away."""
    options: dict[str, Any] = {"block_size": 1, "eps": 1e-3, "lr": 0.01}
    starts = tensors(*SHAPES)
    expected, m, v = ([value.clone() for value in starts] for _ in range(3))
    for each in itertools.chain(m, v):
        each.zero_()
    for t in range(1, 21):
        for i, x in enumerate(expected):
            g = gradient(x, t - 1, i)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            alpha = 0.01 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            expected[i] = x - alpha * m[i] / (v[i].sqrt() + 1e-3)
    assert apart(course(lambda values: BlockDiagonal(values, eps_form="paper", **options)), expected) < 1e-13
    assert apart(course(lambda values: BlockDiagonal(values, **options)), expected) > 1e-4


def moved(gradients: Sequence[Sequence[float]], **options: Any) -> Tensor:
    """A vector of zeros after steps with these gradients, in blocks of consecutive numbers."""
    vector = nn.Parameter(torch.zeros(len(gradients[0]), dtype=torch.float64))
    optimizer = BlockDiagonal([vector], lr=0.1, grouping="fixed", **options)
    for values in gradients:
        vector.grad = torch.tensor(values, dtype=torch.float64)
        optimizer.step()
    return vector.detach()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [-0.1, -0.1, -0.1, 0.0]),
        (2, [-0.06, -0.08, -0.1, 0.0]),
        (4, [-0.1 * part / math.sqrt(26) for part in (3, 4, 1, 0)]),
    ],
)
def test_the_first_step_of_a_block_has_the_length_of_lr(size: int, expected: list[float]) -> None:
    found = moved([(3, 4, 1, 0)], block_size=size, eps=1e-12)
    # Up to the root of float64's unit: what rounding leaves across the gradient is divided by the root of rounding.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-9)
    assert moved([(3, 4, 1, 0)], block_size=size, form="rmsprop", eps=1e-12) / math.sqrt(1000) == pytest.approx(
        found, abs=2e-9
    )


@pytest.mark.parametrize(
    ("form", "size", "expected"),
    [
        ("adam", 2, (-0.1932143, -0.0365824)),
        ("adam", 1, (-0.2, -0.0744137)),
        ("adagrad", 2, (-0.1447214, -0.0894427)),
        ("adagrad", 1, (-0.1707107, -0.1)),
    ],
)
def test_two_steps(form: str, size: int, expected: tuple[float, float]) -> None:
    found = moved([(1, 0), (1, 1)], block_size=size, form=form)
    assert found.tolist() == pytest.approx(expected, abs=6e-8)


def test_rotated_gradients_give_rotated_iterates() -> None:
    """For rotations inside of blocks; Adam has none of it."""
    draw = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64, generator=draw))[0]
    rotation = torch.block_diag(*turns)

    def iterate(size: int, turn: Tensor) -> Tensor:
        gradients = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return moved((gradients @ turn.T).tolist(), block_size=size)

    identity = torch.eye(12, dtype=torch.float64)
    assert (iterate(4, rotation) - rotation @ iterate(4, identity)).abs().max() < 2e-8
    assert (iterate(1, rotation) - rotation @ iterate(1, identity)).abs().max() > 1e-2


def test_one_block_is_the_full_matrix() -> None:
    """The definition on a vector as one matrix: V^(-1/2) m from a Schur-free square root by Denman and Beavers."""
    options: dict[str, Any] = {"lr": 0.05, "block_size": 1000, "grouping": "fixed", "eps": 1e-4}
    found = course(lambda values: BlockDiagonal(values, **options), shapes=[(3, 4)])
    x, m, v = tensors((3, 4))[0].flatten(), torch.zeros(12).double(), torch.zeros(12, 12).double()
    for t in range(1, 21):
        g = gradient(x.view(3, 4), t - 1, 0).flatten()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * torch.outer(g, g)
        u, s, _ = torch.linalg.svd(v / (1 - 0.999**t))
        x = x - 0.05 / (1 - 0.9**t) * u @ ((u.T @ m) / (s.sqrt() + 1e-4))
    assert (found[0].flatten() - x).abs().max() < 1e-9


def test_the_bounds_of_the_spectrum() -> None:
    """The table of the paper's code for gamma 1e-3, and two eigenvalues between which a step is clipped."""
    clip = SpectrumClip(0.1, 1e-3)
    table = {1: (0.001, 1001), 100: (0.091, 11), 1000: (0.5, 2), 10**4: (0.909, 1.1), 10**5: (0.990, 1.01)}
    for step, expected in table.items():
        assert clip.bounds(step) == pytest.approx(expected, rel=2e-3)
    low, high = (0.1 * bound for bound in clip.bounds(1000))
    steps = EigenSteps(0.01, 1.0, 0.0, low, high)
    assert steps(torch.tensor([1e-6, 4.0]).double().sqrt()).tolist() == pytest.approx([0.2, 0.05])
    assert EigenSteps(0.01, 1.0, 0.0)(torch.tensor([1e-6, 4.0]).double().sqrt()).tolist() == pytest.approx([10, 0.005])


@pytest.mark.parametrize(("gamma", "bound"), [(1e6, 2e-7), (10.0, 2e-2), (0.1, 1.0)])
def test_closed_bounds_are_sgd_with_averaged_momentum(gamma: float, bound: float) -> None:
    """A step along every eigenvector is final_lr: x -= final_lr m. The nearer, the larger gamma."""
    clip = SpectrumClip(0.03, gamma)
    found = course(lambda values: BlockDiagonal(values, lr=0.01, block_size=3, remainder="smaller", clip=clip))
    expected = tensors(*SHAPES)
    m = [torch.zeros_like(x) for x in expected]
    for t, (i, x) in itertools.product(range(20), enumerate(expected)):
        m[i] = 0.9 * m[i] + 0.1 * gradient(expected[i], t, i)
        expected[i] = expected[i] - 0.03 * m[i]
        assert x.shape == expected[i].shape
    moves = max(float((one - start).abs().max()) for one, start in zip(expected, tensors(*SHAPES), strict=True))
    assert apart(found, expected) < bound * moves
    assert apart(found, expected) > bound * moves / 1000


def test_clipped_blocks_of_one_are_adabound() -> None:
    """As its authors wrote it: clip(alpha sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps), lower, upper) * m."""
    clip = SpectrumClip(0.1, 1e-2)
    found = course(
        lambda values: BlockDiagonal(values, lr=0.01, block_size=1, clip=clip, eps=1e-3, eps_form="paper"), steps=60
    )
    expected = tensors(*SHAPES)
    m, v = ([torch.zeros_like(x) for x in expected] for _ in range(2))
    clipped = set()
    for t in range(1, 61):
        for i, x in enumerate(expected):
            g = gradient(x, t - 1, i)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            lower, upper = 0.1 * (1 - 1 / (1e-2 * t + 1)), 0.1 * (1 + 1 / (1e-2 * t))
            steps = 0.01 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) / (v[i].sqrt() + 1e-3)
            clipped |= {bool(steps.min() < lower), bool((steps > lower).any())}
            expected[i] = x - steps.clamp(lower, upper) * m[i]
    assert clipped == {True, False} and apart(found, expected) < 1e-12


def step_of(gradients: Tensor, **options: Any) -> Tensor:
    """The movement of a tensor at its fourth step; the earlier gradients are fixed."""
    weight = nn.Parameter(torch.zeros_like(gradients))
    optimizer = BlockDiagonal([weight], **options)
    for t in range(3):
        weight.grad = gradient(weight.detach(), t, 0)
        optimizer.step()
    before = weight.detach().clone()
    weight.grad = gradients.clone()
    optimizer.step()
    return weight.detach() - before


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 2, 3, 3), {}),
        ((8, 5), {"block_size": 4}),
        ((8, 5), {"block_size": 3, "remainder": "smaller"}),
        ((4, 6), {"block_size": 3, "grouping": "output"}),
        ((2, 6, 4), {"block_size": 2}),
    ],
)
def test_a_block_sees_its_own_numbers_and_all_of_them(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Where the step changes when one number of the gradient does: the Jacobian, by differences."""
    base = gradient(torch.zeros(shape, dtype=torch.float64), 7, 0)
    plain = step_of(base, **options)
    blocks = positions(shape, options.get("grouping", "auto"), options.get("block_size", 10))
    assert sorted(itertools.chain(*blocks)) == list(range(base.numel()))
    for block in blocks[:: max(1, len(blocks) // 4)]:
        changed = base.clone()
        changed.view(-1)[block[0]] += 0.5
        difference = (step_of(changed, **options) - plain).flatten().abs()
        assert set(torch.nonzero(difference > 1e-12).flatten().tolist()) == set(block)


def test_permuted_inputs_and_permuted_outputs_of_a_block_permute_the_step() -> None:
    start = tensors((6, 5))[0]
    rows, columns = torch.tensor([2, 0, 1, 5, 4, 3]), torch.tensor([3, 1, 4, 0, 2])

    def run(permute: Callable[[Tensor], Tensor]) -> Tensor:
        weight = nn.Parameter(permute(start).clone())
        optimizer = BlockDiagonal([weight], lr=0.05, block_size=3)
        for t in range(8):
            weight.grad = permute(gradient(start, t, 0)).contiguous()
            optimizer.step()
        return weight.detach()

    plain = run(lambda x: x)
    torch.testing.assert_close(run(lambda x: x[:, columns]), plain[:, columns], rtol=0, atol=1e-8)
    torch.testing.assert_close(run(lambda x: x[rows]), plain[rows], rtol=0, atol=1e-8)
    across = torch.tensor([3, 1, 2, 0, 4, 5])
    assert (run(lambda x: x[across]) - plain[across]).abs().max() > 1e-3, "rows that change blocks are no symmetry"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"eps": 0.0}, {"update_every": 3}, {"form": "adagrad", "eps": 0.0}])
def test_a_block_without_gradient_only_decays(dtype: torch.dtype, options: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(4, 6, dtype=dtype))
    optimizer = BlockDiagonal([weight], lr=0.1, block_size=2, weight_decay=0.5, **options)
    for t in range(9):
        weight.grad = gradient(weight.detach(), t, 0).to(dtype)
        weight.grad[:2, 1] = 0
        optimizer.step()
    expected = torch.full((2,), 0.95**9, dtype=dtype)
    torch.testing.assert_close(weight.detach()[:2, 1], expected)
    assert weight.isfinite().all() and not torch.equal(weight[2:, 1], expected)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_gradients_does_not_matter(factor: float, dtype: torch.dtype) -> None:
    def run(factor: float) -> list[Tensor]:
        weight = nn.Parameter(torch.zeros(6, 4, dtype=dtype))
        optimizer = BlockDiagonal([weight], lr=0.05, block_size=3, eps=0.0)
        for t in range(10):
            weight.grad = factor * gradient(torch.zeros(6, 4), t, 0).to(dtype)
            optimizer.step()
        return [weight.detach()]

    assert apart(run(factor), run(1.0)) < (1e-8 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("clip", [None, SpectrumClip(0.05, 0.1)])
def test_all_layers_drawn_are_all_blocks_and_none_are_the_diagonal(clip: SpectrumClip | None) -> None:
    options: dict[str, Any] = {"lr": 0.02, "remainder": "smaller", "clip": clip, "eps": 1e-4}
    whole = course(lambda values: BlockDiagonal(values, block_size=3, **options))
    diagonal = course(lambda values: BlockDiagonal(values, block_size=1, **options))
    drawn = [
        course(lambda values, k=k: BlockDiagonal(values, block_size=3, layers_per_step=k, **options)) for k in range(4)
    ]
    assert apart(drawn[3], whole) == 0
    assert apart(drawn[0][:2] + drawn[0][3:], diagonal[:2] + diagonal[3:]) < 1e-12
    assert min(apart(drawn[k], other) for k in (1, 2) for other in (whole, diagonal)) > 1e-3


def layers(seed: int = 0, k: int = 2) -> tuple[list[nn.Parameter], BlockDiagonal]:
    values = [nn.Parameter(value) for value in tensors(*[(4, 3)] * 6, (5,))]
    groups = [{"params": values[:2]}, {"params": values[2:]}]
    return values, BlockDiagonal(groups, lr=0.01, block_size=2, layers_per_step=k, seed=seed)


def test_so_many_layers_of_all_groups_are_drawn_evenly_and_go_on_after_a_resume() -> None:
    """Two of six in two groups at each step: those whose step has the length of lr in every block."""
    gradients = [gradient(torch.zeros(4, 3), 0, index).double() for index in range(6)]

    def chosen(values: list[nn.Parameter], optimizer: BlockDiagonal) -> tuple[int, ...]:
        before = [value.detach().clone() for value in values]
        for state in optimizer.state.values():  # a first step each time
            for value in state.values():
                value.zero_()
        for value, g in zip(values, [*gradients, torch.ones(5).double()], strict=True):
            value.grad = g.clone()
        optimizer.step()
        found = []
        for index, (value, start) in enumerate(zip(values[:6], before, strict=False)):
            lengths = (value.detach() - start).T.reshape(-1, 2).norm(dim=1)
            if torch.allclose(lengths, torch.full_like(lengths, 0.01), atol=1e-7):
                found.append(index)
            else:
                assert torch.allclose(lengths, torch.full_like(lengths, 0.01 * math.sqrt(2)), atol=1e-7)
        return tuple(found)

    values, optimizer = layers()
    seen = [chosen(values, optimizer) for _ in range(150)]
    assert {len(each) for each in seen} == {2}
    counts = [sum(index in each for each in seen) for index in range(6)]
    # 50 expected, of standard deviation 5.8 if the draws are independent.
    assert min(counts) > 50 - 4 * 5.8 and max(counts) < 50 + 4 * 5.8
    others, resumed = layers()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ahead = [chosen(values, optimizer) for _ in range(20)]
    assert [chosen(others, resumed) for _ in range(20)] == ahead
    values, other = layers(seed=1)
    assert [chosen(values, other) for _ in range(20)] != seen[:20]


def test_a_step_left_out_draws_nothing() -> None:
    values, optimizer = layers()
    optimizer.param_groups[0]["nonfinite"] = optimizer.param_groups[1]["nonfinite"] = "skip"
    for value in values:
        value.grad = torch.full_like(value, math.nan)
    with pytest.warns(UserWarning, match="step left out"):
        optimizer.step()
    assert [group["draws"] for group in optimizer.param_groups] == [0, 0]


def test_products_move_as_eigenvectors_do() -> None:
    """In float32, as on a GPU; kept or not."""
    for options in ({}, {"update_every": 3}):

        def run(root: str, options: dict[str, Any] = options) -> list[Tensor]:
            options = {"lr": 0.02, "block_size": 3, "remainder": "smaller", "root": root, **options}
            return course(lambda values: BlockDiagonal(values, **options), dtype=torch.float32)

        one, other = run("eigh"), run("newton-schulz")
        assert apart(one, other) < 1e-4 and apart(one, other) > 0


def test_batches_of_any_size_and_any_number_of_threads_move_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        return course(lambda values: BlockDiagonal(values, lr=0.02, block_size=3, remainder="smaller"), shapes=shapes)

    shapes = [(40, 31), (9, 9, 3, 3), (30, 7), (8, 8)]
    whole, threads = run(), torch.get_num_threads()
    for size in (1, 100, 1000):
        monkeypatch.setattr(block_diagonal, "CPU_WORKING_SET", size)
        assert apart(run(), whole) < 1e-8
    monkeypatch.undo()
    try:
        torch.set_num_threads(2)
        assert apart(run(), whole) < 1e-8
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"update_every": 3}, {"clip": SpectrumClip()}, {"layers_per_step": 1},
                                     {"clip": SpectrumClip(), "update_every": 3}])  # fmt: skip
def test_the_forecast_of_memory_is_what_is_held(form: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.Linear(16, 10), nn.LayerNorm(10)).to(dtype)
    options = {"form": form, "block_size": 4, "remainder": "smaller", **options}
    states = BlockDiagonal(model, **options).state.values()
    assert state_bytes(model, **options) == sum(value.nbytes for state in states for value in state.values())
    assert not any(isinstance(value, torch._subclasses.FakeTensor) for value in model.parameters())


def test_memory_is_half_of_block_size_numbers_for_a_weight() -> None:
    weights = nn.Linear(1000, 1000, bias=False)
    for size in (1, 10, 25):
        plain, half = state_bytes(weights, block_size=size), 2 * 10**6 * (size + 1)
        assert plain == 4 * 10**6 + half + 4
        assert state_bytes(weights, block_size=size, update_every=2) - plain == (half if size > 1 else 0)
        clipped = state_bytes(weights, block_size=size, update_every=2, clip=SpectrumClip()) - plain
        assert clipped == (4 * 10**6 * (size + 1) if size > 1 else 0)


@pytest.mark.parametrize("options", [{}, {"update_every": 3}, {"clip": SpectrumClip()}])
def test_gradients_that_overflow_their_squares_take_the_diagonal_step_and_are_counted(options: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer = BlockDiagonal([weight], lr=0.1, block_size=2, **options)
    plain = nn.Parameter(torch.zeros(4, 3))
    other = BlockDiagonal([plain], lr=0.1, block_size=2, **options)
    assert optimizer.fallbacks == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(3):
            plain.grad = gradient(torch.zeros(4, 3), t, 0).float()
            weight.grad = plain.grad.clone()
            weight.grad[0, 0] = 1e25
            optimizer.step()
            other.step()
    # All steps are young: each decomposes.
    assert optimizer.fallbacks == 3 and other.fallbacks == 0
    assert [("1 of 6 blocks" in str(w.message), w.filename) for w in caught] == [(True, __file__)]
    assert weight.isfinite().all()
    assert torch.equal(weight.flatten()[1:3], plain.flatten()[1:3]) and torch.equal(weight[2:], plain[2:])
    assert (weight[0, 0] == 0) == (not options.get("clip")), "infinite moments have no step but the lower bound"


def test_dead_inputs_in_a_long_run_stay_finite() -> None:
    """Zero rows in gradients of scale 1e-6, where float32 decompositions gave NaN after some tens of steps."""
    weight = nn.Parameter(torch.zeros(16, 20))
    optimizer = BlockDiagonal([weight], lr=1e-2, block_size=16, grouping="output", remainder="smaller")
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        weight.grad = 3e-6 * torch.randn(16, 20, generator=draw)
        weight.grad[:, 3:13] = 0
        optimizer.step()
    assert optimizer.fallbacks == 0 and weight.isfinite().all()
    assert weight[:, 3:13].abs().max() < 1e-9 and 0.01 < float(weight.detach().abs().max()) < 1


def test_a_network_on_correlated_inputs_is_sooner_where_blocks_see_the_correlation() -> None:
    """A rotated quadratic, condition 1e4: one block of all comes a thousand times lower than the diagonal."""
    draw = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=draw))[0]
    curvature = (q * torch.logspace(0, -4, 16, dtype=torch.float64)) @ q.T
    start = torch.randn(16, dtype=torch.float64, generator=draw)

    def loss(size: int) -> float:
        best = math.inf
        for lr in (1e-3, 1e-2, 1e-1):
            x = nn.Parameter(start.clone())
            optimizer = BlockDiagonal([x], lr=lr, block_size=size, grouping="fixed")
            for _ in range(800):
                x.grad = curvature @ x.detach()
                optimizer.step()
            best = min(best, float(x.detach() @ curvature @ x.detach()) / 2)
        return best

    assert loss(16) < 1e-3 * loss(1)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"root": "eigh"}, {"update_every": 3}, {"clip": SpectrumClip(0.05, 0.1)}])
def test_a_gpu_takes_the_steps_of_the_cpu(options: dict[str, Any]) -> None:
    found = []
    for device in ("cpu", "cuda"):
        values = [nn.Parameter(value.float().to(device)) for value in tensors((40, 30), (8, 6, 3, 3), (7,))]
        optimizer = BlockDiagonal(values, lr=0.02, block_size=8, remainder="smaller", **options)
        for t in range(30):
            for index, value in enumerate(values):
                value.grad = gradient(value.detach().cpu(), t, index).float().to(device)
            optimizer.step()
        found.append([value.detach().cpu() for value in values])
    assert apart(*found) < 2e-3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Conv1d(4, 6, 3)
        self.plane = nn.Conv2d(4, 6, 3)
        self.back = nn.ConvTranspose2d(4, 6, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.linear = nn.Linear(4, 6)
        self.point = nn.Conv2d(4, 6, 1)


def test_a_model_is_grouped_by_what_its_layers_are() -> None:
    net = Net()
    optimizer = BlockDiagonal(net, block_size=3)
    sizes = {}
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Of b numbers, b (b + 1) / 2 second moments.
            sizes[names[id(parameter)]] = (
                2 * optimizer.state[parameter]["second_moment"].numel() // parameter.numel() - 1
            )
    assert {name: size for name, size in sizes.items() if "bias" not in name} == {
        "line.weight": 3, "plane.weight": 9, "back.weight": 9, "depthwise.weight": 9, "linear.weight": 3,
        "point.weight": 1,
    }  # fmt: skip
    assert {size for name, size in sizes.items() if "bias" in name} == {1}


def test_a_matrix_stored_the_other_way_has_the_same_blocks() -> None:
    start = tensors((6, 4))[0]
    plain, stored = nn.Parameter(start.clone()), nn.Parameter(start.T.contiguous())
    one = BlockDiagonal([plain], block_size=3)
    other = BlockDiagonal([{"params": [stored], "transposed": True}], block_size=3)
    for t in range(6):
        plain.grad = gradient(start, t, 0)
        stored.grad = plain.grad.T.contiguous()
        one.step()
        other.step()
    assert torch.equal(plain, stored.T)


def test_a_function_groups_by_name_and_tensor() -> None:
    seen = []

    def rule(name: str, tensor: Tensor) -> str:
        seen.append((name, tuple(tensor.shape)))
        return "diagonal" if "head" in name else "output" if tensor.shape[0] == 5 else "auto"

    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in
             (("body", (6, 4)), ("wide", (5, 6)), ("head", (9, 6)))]  # fmt: skip
    optimizer = BlockDiagonal(named, block_size=3, grouping=rule)
    assert seen == [("body", (6, 4)), ("wide", (5, 6)), ("head", (9, 6))]
    assert optimizer.param_groups[0]["grouping"] == ["auto", "output", "diagonal"]
    assert [optimizer.state[value]["second_moment"].numel() for _, value in named] == [48, 60, 54]


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards_are_refused_by_name(mesh: Any) -> None:
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"weight is a DTensor: .* use DDP, or an optimizer that knows shards"):
        BlockDiagonal([("weight", weight)], block_size=2)


def out_of_range() -> list[tuple[dict[str, Any], str]]:
    rows: list[tuple[dict[str, Any], str]] = [
        ({"block_size": size}, f"block_size={size}: choose a whole number from 1 to 1024")
        for size in (0, -1, 2.5, 1025)
    ]
    rows += [({"update_every": n}, f"update_every={n}: choose a whole number from 1 on") for n in (0, 1.5)]
    rows += [({"layers_per_step": n}, f"layers_per_step={n}: choose a whole number from 0 on") for n in (-1, 0.5)]
    rows += [({"betas": (value, 0.9)}, rf"betas\[0\]={value}: expected") for value in (-0.1, 1.0, math.nan)]
    rows += [({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0: expected"), ({"betas": (0.9,)}, "expected two numbers")]
    rows += [({"eps": value}, f"eps={value}: expected a number") for value in (-1e-8, math.nan)]
    rows += [
        ({"form": "adamw"}, "form='adamw': choose one of adam, adagrad, rmsprop"),
        ({"root": "svd"}, "root='svd': choose one of auto, eigh, newton-schulz"),
        ({"remainder": "pad"}, "remainder='pad': choose one of refuse, smaller"),
        ({"eps_form": "adam"}, "eps_form='adam': choose one of torch, paper"),
        ({"grouping": "rows"}, "grouping='rows': choose one of auto, input, output"),
        ({"grouping": lambda name, tensor: None}, "grouping=None: choose one of auto"),
        ({"grouping": "filter"}, "grouping='filter': weight .* is no kernel"),
        ({"block_size": 5, "remainder": "refuse"}, r"block_size=5 does not divide the 6 weights of one input of weight"
         r" \[6, 4\]: choose 3 or 6, or pass remainder='smaller'"),
        ({"layers_per_step": 2}, "layers_per_step=2: only 1 tensors have blocks of more than one weight"),
        ({"layers_per_step": 1, "update_every": 2}, "layers_per_step=1 with update_every=2: both save decompositions"),
        ({"clip": (0.1, 1e-3)}, r"clip=\(0.1, 0.001\): expected a SpectrumClip, or None"),
        ({"clip": SpectrumClip(0.0)}, r"final_lr=0.0: expected a number in \(0, inf\)"),
        ({"clip": SpectrumClip(gamma=-1.0)}, r"gamma=-1.0: expected a number in \(0, inf\)"),
        ({"clip": SpectrumClip(), "root": "newton-schulz"}, "products give no eigenvalues to clip: choose root='eigh'"),
        ({"clip": SpectrumClip(), "lr": 0.0}, r"lr \(of a group with clip\)=0.0: expected a number in \(0, inf\)"),
    ]  # fmt: skip
    return rows


@pytest.mark.parametrize(("options", "message"), out_of_range())
def test_an_option_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BlockDiagonal([("weight", nn.Parameter(torch.ones(6, 4)))], **{"remainder": "smaller", **options})
    assert "\n" not in str(caught.value)


def test_layers_are_drawn_over_all_groups() -> None:
    weight = nn.Parameter(torch.ones(6, 4))
    with pytest.raises(ValueError, match="layers_per_step=1 of a group: it is drawn over all groups; pass it to the"):
        BlockDiagonal([{"params": [weight], "layers_per_step": 1}], block_size=3)
