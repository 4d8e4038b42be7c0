"""Top eigenpairs against known spectra and SciPy's `eigsh`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from burnish.diagnose import Eigenpairs, hessian_vector_product, top_eigenpairs

METHODS = ["lanczos", "power"]


def quadratic(
    spectrum: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """x^T A x / 2 with A of this spectrum in a random basis; loss, x, A."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)).Q
    matrix = (q * spectrum.double() @ q.mT).to(dtype)
    x = torch.zeros(len(spectrum), dtype=dtype, requires_grad=True)
    return lambda: x @ matrix @ x / 2, x, matrix


def trained_network() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    inputs, labels = torch.randn(60, 6, dtype=torch.float64), torch.arange(60) % 3
    inputs += 2 * torch.randn(3, 6, dtype=torch.float64)[labels]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model, lambda: F.cross_entropy(model(inputs), labels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_known_spectrum(method: str, dtype: torch.dtype, tol: float) -> None:
    spectrum = torch.cat([torch.tensor([-9.0, 7.0, 5.0, -4.0]), torch.linspace(-1, 1, 56)])
    loss, x, matrix = quadratic(spectrum, dtype=dtype)
    found = top_eigenpairs(loss, [x], 4, method=method, tol=tol)
    assert found.values.dtype == dtype
    assert found.values.tolist() == pytest.approx([7, 5, -4, -9], rel=tol)
    gaps = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert torch.allclose(gaps, found.residuals, rtol=1e-3, atol=20 * torch.finfo(dtype).eps)
    assert gaps.max() <= tol * 9.01
    assert torch.allclose(found.vectors.mT @ found.vectors, torch.eye(4, dtype=dtype), atol=30 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", METHODS)
def test_largest_in_magnitude_or_largest(method: str) -> None:
    loss, x, _ = quadratic(torch.tensor([-10.0, -8.0, 3.0, 2.0, *[0.1] * 30]))
    find = partial(top_eigenpairs, loss, [x], 2, method=method, tol=1e-8)
    assert find(which="LM").values.tolist() == pytest.approx([-8, -10])
    assert find(which="LA").values.tolist() == pytest.approx([3, 2])


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_among_many_that_are_larger_in_magnitude(method: str) -> None:
    loss, x, _ = quadratic(torch.cat([torch.linspace(-10, -9, 20), torch.tensor([3.0, 2.0]), torch.zeros(30)]))
    found = top_eigenpairs(loss, [x], 2, method=method, which="LA", tol=1e-6, max_iterations=2000)
    assert found.values.tolist() == pytest.approx([3, 2])


def test_vectors_stay_orthonormal_where_all_directions_are_alike() -> None:
    loss, x, _ = quadratic(torch.ones(24), dtype=torch.float32)
    vectors = top_eigenpairs(loss, [x], 24).vectors
    assert torch.allclose(vectors.mT @ vectors, torch.eye(24), atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_all_copies_of_a_repeated_eigenvalue(method: str) -> None:
    loss, x, _ = quadratic(torch.cat([torch.full((6,), 50.0), torch.linspace(0.05, 1, 294)]))
    assert top_eigenpairs(loss, [x], 6, method=method).values.tolist() == pytest.approx([50] * 6, rel=1e-6)


@pytest.mark.parametrize("which", ["LM", "LA"])
def test_equals_eigsh_on_a_trained_network(which: str) -> None:
    model, loss = trained_network()
    size = sum(p.numel() for p in model.parameters())

    def product(vector: np.ndarray) -> np.ndarray:
        return hessian_vector_product(loss, model, torch.from_numpy(vector.ravel().copy())).numpy()

    values, vectors = eigsh(LinearOperator((size, size), matvec=product, dtype=np.float64), 6, which=which, tol=1e-12)
    order = np.argsort(-values)
    for method in METHODS:
        found = top_eigenpairs(loss, model, 6, method=method, which=which, tol=1e-9, max_iterations=3000)
        assert np.allclose(found.values, values[order], atol=1e-12)
        overlap = np.abs(vectors[:, order].T @ found.vectors.numpy())
        assert np.allclose(overlap, np.eye(6), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.data())
def test_any_symmetric_matrix(seed: int, size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    found = top_eigenpairs(lambda: x @ matrix @ x / 2, [x], k, tol=1e-8, max_iterations=2000)
    values = torch.linalg.eigvalsh(matrix)
    largest = values[values.abs().argsort(descending=True)][:k].sort(descending=True).values
    assert torch.allclose(found.values, largest, rtol=1e-8, atol=1e-8 * float(values.abs().max()))


def test_no_curvature_at_all() -> None:
    x = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    for method in METHODS:
        found = top_eigenpairs(lambda: x.sum(), [x], 3, method=method)
        assert found.values.tolist() == [0, 0, 0]
        assert torch.allclose(found.vectors.mT @ found.vectors, torch.eye(3, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_products_are_counted_and_a_start_nearby_saves_them(method: str) -> None:
    loss, x, matrix = quadratic(torch.cat([torch.tensor([9.0, 8.0, 7.0]), torch.rand(200)]))
    evaluated = []

    def one() -> Tensor:
        evaluated.append(1)
        return loss()

    cold = top_eigenpairs([one], [x], 3, method=method)
    assert cold.products == len(evaluated)
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-5
    matrix += noise + noise.mT
    warm = top_eigenpairs(loss, [x], 3, method=method, start=cold)
    assert warm.products < 0.7 * cold.products
    fresh = top_eigenpairs(loss, [x], 3, method=method, seed=1)
    assert torch.allclose(warm.values, fresh.values, rtol=1e-7)


@pytest.mark.parametrize("known", [2, 3, 4])
def test_a_start_does_not_hide_a_direction_that_has_come_up(known: int) -> None:
    old = Eigenpairs(torch.ones(known), torch.eye(50)[:, :known], torch.zeros(known), 0)
    x = torch.zeros(50, requires_grad=True)
    curvature = torch.cat([torch.tensor([2.0, 1.0, 0.5, 0.2, 5.0]), torch.zeros(45)])
    found = top_eigenpairs(lambda: (curvature * x**2).sum() / 2, [x], 2, start=old)
    assert found.values.tolist() == pytest.approx([5, 2], rel=1e-5)


def test_u12_1_same_seed_same_result_and_no_global_state() -> None:
    loss, x, _ = quadratic(torch.linspace(1, 2, 40))
    state = torch.get_rng_state()
    first, second = (top_eigenpairs(loss, [x], 3, seed=5) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_what_did_not_converge_is_said(method: str) -> None:
    loss, x, matrix = quadratic(torch.linspace(1, 1.01, 300))
    with pytest.warns(RuntimeWarning, match=r"3 of 3 eigenpairs did not converge to tol=1e-08 in max_iterations=4"):
        found = top_eigenpairs(loss, [x], 3, method=method, tol=1e-8, max_iterations=4)
    assert torch.allclose((matrix @ found.vectors - found.vectors * found.values).norm(dim=0), found.residuals)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_eigenpairs(loss, [x], 3, method=method, tol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k=0: expected 1\.\.5"),
        ({"k": 6}, r"k=6: expected 1\.\.5"),
        ({"method": "qr"}, "method='qr': choose lanczos or power"),
        ({"which": "SM"}, "which='SM': choose LM"),
        ({"tol": 1e-8}, r"tol=1e-08: expected 1e-06\.\.1 for torch.float32"),
        ({"tol": 1.0}, "tol=1.0"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"start": Eigenpairs(torch.ones(1), torch.ones(4, 1), torch.zeros(1), 0)}, "of 4 elements: expected 5"),
    ],
)
def test_options_refused(options: dict[str, object], message: str) -> None:
    x = torch.zeros(5, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(lambda: (x**2).sum(), [x], **{"k": 2, **options})
