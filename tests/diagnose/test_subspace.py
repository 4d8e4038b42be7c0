"""Dominant and bulk parts against closed forms and invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from burnish.diagnose import (
    Eigenpairs,
    alignment,
    bulk,
    bulk_share,
    dominant,
    loss_gradient,
    top_eigenpairs,
)
from burnish.optim import orthogonalize


def subspace(*columns: list[float]) -> Eigenpairs:
    vectors = torch.tensor(columns, dtype=torch.float64).mT
    return Eigenpairs(torch.ones(len(columns)), vectors, torch.zeros(len(columns)), 0)


def test_parts_by_hand() -> None:
    plane = subspace([1, 0, 0], [0, 0.6, 0.8])
    vector = torch.tensor([2.0, 5.0, 10.0], dtype=torch.float64)  # <vector, second> = 11
    assert dominant(vector, plane).tolist() == pytest.approx([2, 6.6, 8.8])
    assert bulk(vector, plane).tolist() == pytest.approx([0, -1.6, 1.2])
    assert alignment(vector, plane) == pytest.approx(math.sqrt(125 / 129))
    assert bulk_share(vector, plane) == pytest.approx(4 / 129)
    assert alignment([vector[:1], vector[1:].view(1, 2)], plane) == alignment(vector, plane)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.data())
def test_projections_add_up_are_orthogonal_and_idempotent(seed: int, size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q
    space = Eigenpairs(torch.ones(k), basis, torch.zeros(k), 0)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    inside, outside = dominant(vector, space), bulk(vector, space)
    assert torch.allclose(inside + outside, vector, atol=1e-14)
    assert abs(float(inside @ outside)) < 1e-13
    assert torch.allclose(dominant(inside, space), inside, atol=1e-13)
    assert dominant(outside, space).abs().max() < 1e-13
    assert alignment(vector, space) ** 2 + bulk_share(vector, space) == pytest.approx(1)
    assert alignment(-3 * vector, space) == pytest.approx(alignment(vector, space))


def test_a_small_bulk_share_has_its_digits() -> None:
    vector = torch.tensor([1.0, 1e-6], dtype=torch.float32)
    axis = Eigenpairs(torch.ones(1), torch.tensor([[1.0], [0.0]]), torch.zeros(1), 0)
    assert bulk_share(vector, axis) == pytest.approx(1e-12, rel=1e-6)
    assert alignment(vector, axis) == pytest.approx(1, abs=1e-12)


def test_a_zero_vector_has_no_direction() -> None:
    assert math.isnan(alignment(torch.zeros(3), subspace([1, 0, 0])))
    assert math.isnan(bulk_share(torch.zeros(3), subspace([1, 0, 0])))


def test_a_vector_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="vector has 2 elements: the eigenvectors have 3"):
        dominant(torch.zeros(2), subspace([1, 0, 0]))


def test_orthogonalisation_raises_the_bulk_share() -> None:
    """Curvature 50 in 3 rows of a 30 x 10 matrix, .05 to 1 in 27; the gradient at 0 has almost nothing in the bulk.

    Of the polar factor, whose 10 singular values are 1, the 3 directions of the gradient's 3 large singular values are
    in the dominant rows: chi^2 = 3/10 in the limit of infinite contrast.
    """
    generator = torch.Generator().manual_seed(0)
    curvature = torch.cat([torch.full((3,), 50.0), torch.logspace(math.log10(0.05), 0, 27)]).double()
    target = torch.randn(30, 10, generator=generator, dtype=torch.float64)
    weight = torch.zeros(30, 10, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return (curvature[:, None] * (weight - target) ** 2).sum() / 2

    space = top_eigenpairs(loss, [weight], 30, tol=1e-10)
    assert space.values.tolist() == pytest.approx([50] * 30)
    gradient = loss_gradient(loss, [weight]).view(30, 10)
    energies = (curvature * target.norm(dim=1)) ** 2
    share = float(energies[3:].sum() / energies.sum())
    assert bulk_share(gradient, space) == pytest.approx(share, rel=1e-6)
    assert alignment(gradient, space) == pytest.approx(0.99962, abs=2e-4)
    polar = orthogonalize(gradient, method="svd")
    assert alignment(polar, space) == pytest.approx(0.5477, abs=1e-3)
    assert bulk_share(polar, space) == pytest.approx(0.700, abs=1e-3)


def test_the_order_of_the_parameters_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs, labels = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,))
    order = list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(inputs), labels)

    results = [
        (alignment(loss_gradient(loss, params), space), space.values)
        for params in (order, order[::-1])
        for space in [top_eigenpairs(loss, params, 4, tol=1e-10)]
    ]
    assert 0.01 < results[0][0] < 0.99
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-8)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12)
