"""Closed forms against exact quadrature (Gauss-Hermite, enumeration, angles) and against the optimizers' own draws."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from burnish.diagnose.directions import (
    covariance_alignment,
    expected_alignment,
    intrinsic_dimension,
    quadratic_course,
    sampled_alignment,
    stable_rank,
    subspace_share,
)
from burnish.optim.mezo import MeZO
from burnish.optim.mezo_bcd import MeZOBCD
from burnish.optim.perturbation import Gaussian, LowRank, Rademacher, Sparse, Subspace


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normals(count):
    """Nodes [n, count] and weights [n] of 3 points a variable: exact for polynomials of degree 5 in each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = torch.tensor(list(itertools.product(nodes, repeat=count)))
    mass = torch.tensor(list(itertools.product(weights / weights.sum(), repeat=count))).prod(-1)
    return grid, mass


def exact(z, mass, gradient):
    """alpha and s of directions z [n, d] with probabilities."""
    product, energy, length = z @ gradient, z.square().sum(-1), gradient @ gradient
    return [float((mass * product**2).sum() / length), float((mass * product**2 * energy).sum() / length)]


def found(alignment):
    return [alignment.alpha, alignment.second_moment]


def test_any_covariance_equals_quadrature():
    root, gradient = draw(3, 3), draw(3, seed=1)
    grid, mass = normals(3)
    covariance = root @ root.mT
    assert found(covariance_alignment(covariance, gradient)) == pytest.approx(exact(grid @ root.mT, mass, gradient))


def test_gaussian_equals_quadrature_and_the_identity_covariance():
    gradient = draw(4)
    grid, mass = normals(4)
    whole = found(expected_alignment(Gaussian(), [gradient]))
    assert whole == pytest.approx(exact(grid, mass, gradient)) and whole == pytest.approx([1, 6])
    assert whole == pytest.approx(found(covariance_alignment(torch.eye(4), gradient)))
    # The same numbers in two tensors are the same direction.
    assert found(expected_alignment(Gaussian(), [gradient[:1], gradient[1:]])) == pytest.approx(whole)


def test_signs_equal_enumeration():
    gradients = [draw(2), draw(3, seed=1)]
    z = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    mass = torch.full((32,), 1 / 32, dtype=torch.float64)
    alignment = found(expected_alignment(Rademacher(), gradients))
    assert alignment == pytest.approx(exact(z, mass, torch.cat(gradients))) and alignment == pytest.approx([1, 5])


def test_a_random_mask_equals_quadrature_over_masks():
    gradient, keep = draw(3), 0.3
    grid, mass = normals(3)
    z, weight = [], []
    for mask in itertools.product([0.0, 1.0], repeat=3):
        z.append(grid * torch.tensor(mask))
        weight.append(mass * keep ** sum(mask) * (1 - keep) ** (3 - sum(mask)))
    expected = exact(torch.cat(z), torch.cat(weight), gradient)
    assert found(expected_alignment(Sparse(keep, "random"), [gradient])) == pytest.approx(expected)


def test_a_mask_by_magnitude_is_a_projector():
    gradient, weights = draw(6), torch.tensor([3.0, -1, 2, -5, 0.5, 4])
    kept = torch.diag(torch.tensor([0.0, 1, 1, 0, 1, 0]))
    inside = found(expected_alignment(Sparse(0.5), [gradient], weights=[weights]))
    assert inside == pytest.approx(found(covariance_alignment(kept, gradient)))
    # Two tensors have a quantile each.
    both = expected_alignment(Sparse(0.5), [gradient[:2], gradient[2:]], weights=[weights[:2], weights[2:]])
    kept = torch.diag(torch.tensor([0.0, 1, 1, 0, 1, 0]))
    assert found(both) == pytest.approx(found(covariance_alignment(kept, gradient)))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(3, 2, 1), (2, 3, 1), (2, 2, 2)])
def test_low_rank_equals_quadrature(rows, columns, rank, normalize):
    gradient = draw(rows, columns)
    grid, mass = normals((rows + columns) * rank)
    left, right = grid[:, : rows * rank].view(-1, rows, rank), grid[:, rows * rank :].view(-1, columns, rank)
    z = (left @ right.mT).flatten(1) / (math.sqrt(rank) if normalize else 1)
    alignment = expected_alignment(LowRank(rank, normalize=normalize), [gradient])
    assert found(alignment) == pytest.approx(exact(z, mass, gradient.flatten()))


def test_a_matrix_and_a_vector_equal_quadrature():
    gradients = [draw(2, 2), draw(2, seed=1)]
    grid, mass = normals(6)
    matrix = (grid[:, :2, None] * grid[:, None, 2:4]).flatten(1)
    z = torch.cat([matrix, grid[:, 4:]], dim=1)
    expected = exact(z, mass, torch.cat([gradient.flatten() for gradient in gradients]))
    assert found(expected_alignment(LowRank(1), gradients)) == pytest.approx(expected)


def test_an_orthonormal_subspace_equals_quadrature_over_angles():
    gradient = draw(2, 2)
    angles = torch.arange(16, dtype=torch.float64) * math.pi / 8
    unit = torch.stack([angles.cos(), angles.sin()], dim=-1)
    grid, mass = normals(1)
    matrices = torch.einsum("ai,bj,k->abkij", unit, unit, 2 * grid[:, 0])  # sqrt(m n) / r = 2
    mass = mass.expand(16, 16, 3).flatten() / 256
    assert found(expected_alignment(Subspace(1), [gradient])) == pytest.approx(
        exact(matrices.reshape(-1, 4), mass, gradient.flatten())
    )


def test_a_subspace_of_full_rank_is_gaussian():
    gradient = draw(4, 4)
    whole = found(expected_alignment(Gaussian(), [gradient]))
    assert found(expected_alignment(Subspace(99), [gradient])) == pytest.approx(whole)


def test_a_random_block_is_the_mean_of_projectors_and_a_fixed_block_is_one():
    gradients = [draw(2), draw(3, seed=1), draw(1, seed=2)]
    whole = torch.cat(gradients)
    projectors = [torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 1])), torch.diag(torch.tensor([0.0, 0, 1, 1, 1, 0]))]
    each = [found(covariance_alignment(projector, whole)) for projector in projectors]
    blocks = [[0, 2], [1]]
    random = found(expected_alignment(Gaussian(), gradients, blocks=blocks))
    assert random == pytest.approx([statistics.fmean(column) for column in zip(*each, strict=True)])
    assert found(expected_alignment(Gaussian(), gradients, blocks=blocks[:1])) == pytest.approx(each[0])
    share = subspace_share(Gaussian(), gradients, blocks=blocks[:1])
    assert share == pytest.approx(each[0][0]) and subspace_share(Gaussian(), gradients) == pytest.approx(1)


def test_the_table_of_the_theory():
    """d = 24 numbers in N = 4 blocks: alpha, s, efficiency and best step, as the method's notes derive them."""
    d, n, p = 24, 4, 0.25
    gradients = [draw(6, seed=seed) for seed in range(n)]
    whole = expected_alignment(Gaussian(), gradients)
    assert (whole.efficiency, whole.best_step) == pytest.approx((1 / (d + 2), 1 / (d + 2)))
    block = expected_alignment(Gaussian(), gradients, blocks=[[i] for i in range(n)])
    assert (block.efficiency, block.best_step) == pytest.approx((1 / (d + 2 * n), 1 / (d // n + 2)))
    mask = expected_alignment(Sparse(p, "random"), [torch.cat(gradients)])
    assert mask.best_step == pytest.approx(1 / (3 + (d - 1) * p))
    matrix = torch.cat(gradients).view(4, 6)
    assert expected_alignment(LowRank(1), [matrix]).efficiency == pytest.approx(1 / (6 * 8))
    unscaled = expected_alignment(LowRank(2, normalize=False), [matrix])
    assert found(unscaled) == pytest.approx([2, 148])
    assert found(expected_alignment(LowRank(3, normalize=False), [matrix])) == pytest.approx([3, 300])
    assert expected_alignment(LowRank(2), [matrix]).efficiency == pytest.approx(unscaled.efficiency)
    assert found(expected_alignment(Subspace(2), [matrix])) == pytest.approx([1, 24 / 4 * 6])


KINDS = [
    Gaussian(),
    Rademacher(),
    LowRank(2),
    LowRank(1, normalize=False),
    Subspace(2),
    Sparse(0.3, "random"),
    Sparse(0.4),
]


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("blocks", [None, [[0, 1], [2]]], ids=["all", "blocks"])
def test_what_the_optimizers_draw_has_the_closed_form(kind, blocks):
    """Within 4 standard errors of 4,000 directions: 1 in 16,000 by chance."""
    shapes = ((4, 6), (5,), (3, 3))
    gradients = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    weights = [draw(*shape, seed=seed).float() for seed, shape in enumerate(shapes, start=9)]
    expected = expected_alignment(kind, gradients, weights=weights, blocks=blocks)
    sampled = sampled_alignment(kind, gradients, num_samples=4000, weights=weights, blocks=blocks)
    assert abs(sampled.alpha - expected.alpha) < 4 * sampled.alpha_error
    assert abs(sampled.second_moment - expected.second_moment) < 4 * sampled.second_moment_error
    assert sampled.alpha_error < 0.05 * expected.alpha and sampled.second_moment_error < 0.12 * expected.second_moment


@pytest.mark.parametrize("kind", [Subspace(2), LowRank(2), Sparse(0.4)], ids=repr)
def test_within_an_epoch_a_step_sees_the_share_of_its_subspace(kind):
    gradients, weights = [draw(5, 4)], [draw(5, 4, seed=3)]
    share = subspace_share(kind, gradients, weights=weights, seed=7, epoch=2)
    assert share != pytest.approx(subspace_share(kind, gradients, weights=weights, seed=7, epoch=3)) or kind == Sparse(
        0.4
    )
    sampled = sampled_alignment(kind, gradients, num_samples=4000, seed=7, weights=weights, epoch=2)
    if isinstance(kind, Subspace):  # a scaled projector of rank r^2
        scale = 20 / 4
        expected = [scale * share, scale**2 * (4 + 2) * share]
    elif isinstance(kind, Sparse):
        expected = [share, (8 + 2) * share]
    else:
        # Rows of U V' are N(0, V V' / r): no projector, but no energy outside of the span of V.
        other = sampled_alignment(kind, gradients, num_samples=4000, seed=7, epoch=3)
        assert abs(other.alpha - sampled.alpha) > 4 * math.hypot(other.alpha_error, sampled.alpha_error)
        assert 0.1 < share < 1
        return
    assert abs(sampled.alpha - expected[0]) < 4 * sampled.alpha_error
    assert abs(sampled.second_moment - expected[1]) < 4 * sampled.second_moment_error


def test_the_share_of_low_rank_directions_is_reached_by_the_best_of_them():
    """Least squares over U: what U V' can take of the gradient, V being that of the epoch."""
    from burnish.diagnose.directions import _direction, _rows

    gradient = draw(5, 4)
    direction = _direction(LowRank(2), 7, 0, 2)
    list(direction.walk(_rows(LowRank(2), [gradient], [gradient])))
    ((_, (right,)),) = direction.bases.values()
    best = torch.linalg.lstsq(right.mT, gradient.mT).solution.mT @ right
    share = 1 - (gradient - best).square().sum() / gradient.square().sum()
    assert subspace_share(LowRank(2), [gradient], seed=7, epoch=2) == pytest.approx(float(share))


def test_dimensions_of_diagonal_matrices():
    assert intrinsic_dimension(torch.diag(torch.tensor([4.0, 2, 1, 1]))) == pytest.approx(2)
    assert intrinsic_dimension(torch.eye(5)) == pytest.approx(5)
    assert stable_rank(torch.tensor([[3.0, 0, 0], [0, 0, -4]])) == pytest.approx(25 / 16)
    assert stable_rank(torch.ones(3, 7)) == pytest.approx(1)


LAYERS = 4
CASES = {
    "full": (Gaussian(), False),
    "signs": (Rademacher(), False),
    "block": (Gaussian(), True),
    "low rank": (LowRank(2, interval=1), False),
    "subspace": (Subspace(2, interval=1), False),
    "mask": (Sparse(0.25, "random"), False),
}


@pytest.mark.parametrize("name", CASES)
def test_on_a_round_bowl_the_loss_falls_as_the_alignment_says(name):
    """At the best step the mean of loss over last loss is 1 - alpha^2 / s, whatever the point: 4 standard errors."""
    kind, by_block = CASES[name]
    curvatures = [torch.full((8, 8), 3.0, dtype=torch.float64) for _ in range(LAYERS)]
    gradients = [draw(8, 8, seed=seed) for seed in range(LAYERS)]
    blocks = [[index] for index in range(LAYERS)] if by_block else None
    expected = expected_alignment(kind, gradients, blocks=blocks)
    options = {"lr": expected.best_step / 3, "eps": 10.0, "perturbation": kind}

    def build(named):
        return MeZOBCD(named, interval=1, seed=5, **options) if by_block else MeZO(named, seed=5, **options)

    losses = quadratic_course(build, curvatures, 1500)
    steps = [after / before for before, after in itertools.pairwise(losses)]
    error = statistics.stdev(steps) / math.sqrt(len(steps))
    assert abs(statistics.fmean(steps) - (1 - expected.efficiency)) < 4 * error
    assert error < 0.12 * expected.efficiency


def test_a_gradient_step_is_the_measure_of_efficiency():
    """A direction that is the gradient itself has efficiency 1 and the best step 1 / L."""
    gradient = draw(3)
    unit = gradient / gradient.norm()
    alignment = covariance_alignment(torch.outer(unit, unit), gradient)
    # z is the unit gradient times a normal number: E z^2 = 1, E z^4 = 3.
    assert found(alignment) == pytest.approx([1, 3])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="the gradient of 1 tensors is zero"):
        expected_alignment(Gaussian(), [torch.zeros(3)])
    with pytest.raises(ValueError, match="Sparse goes by the magnitude of the weights: give weights"):
        expected_alignment(Sparse(), [torch.ones(3)])
    with pytest.raises(ValueError, match=r"positions 0 to 0"):
        expected_alignment(Gaussian(), [torch.ones(3)], blocks=[[1]])
    with pytest.raises(ValueError, match="num_samples=1"):
        sampled_alignment(Gaussian(), [torch.ones(3)], num_samples=1)
