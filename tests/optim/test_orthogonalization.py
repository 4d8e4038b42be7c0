"""The scalar map of each method, and what orthogonalising must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.optim import orthogonalization
from burnish.optim.orthogonalization import exact_polar_factor, iteration, orthogonalize
from tests.optim.reference import SCHEMES, orthogonalized, scalar_map, tensors

METHODS = ["newton-schulz", "polar-express", "gram", "svd"]
SHAPES = [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1), (2, 3), (1, 1)]
TABLE = {  # of s after the scaling, by s: newton-schulz, polar-express
    0.001: (0.470543951, 0.858872644),
    0.01: (0.698917063, 1.027110178),
    0.1: (0.712120082, 1.059161138),
    0.5: (0.765438530, 0.910610876),
    1.0: (0.696436409, 0.859128963),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return tensors(shape, seed=seed)[0]


def with_singular_values(values: list[float], rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """U diag(values) V^T and its singular vectors."""
    u = torch.linalg.qr(random(rows, len(values), seed=1))[0]
    v = torch.linalg.qr(random(cols, len(values), seed=2))[0]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T, u, v


def singular_values_after(s: float, method: Any, rows: int, cols: int) -> Tensor:
    """What a matrix of norm 1 whose first scaled singular value is s is sent to, in its own singular basis."""
    scaled = s * iteration(method).margin
    matrix, u, v = with_singular_values([scaled, max(0.0, 1 - scaled**2) ** 0.5], rows, cols)
    return u.T @ orthogonalize(matrix, method=method) @ v


@pytest.mark.parametrize("s", TABLE)
@pytest.mark.parametrize("shape", [(2, 2), (3, 8), (8, 3)])
def test_singular_values_go_where_the_scalar_map_sends_them(s: float, shape: tuple[int, int]) -> None:
    for method, expected in (("newton-schulz", TABLE[s][0]), ("gram", TABLE[s][0]), ("polar-express", TABLE[s][1])):
        if method == "polar-express" and s == 1:
            continue  # its margin keeps singular values below 1 / 1.02
        after = singular_values_after(s, method, *shape)
        assert float(after[0, 0]) == pytest.approx(expected, abs=6e-10), method
        assert float((after - torch.diag(after.diagonal())).abs().max()) < 1e-13


def test_coefficients_give_the_table_the_ranges_and_the_slope() -> None:
    grid = torch.logspace(-3, 0, 200_001, dtype=torch.float64)
    upper = grid[grid >= 0.01]
    after = {method: scalar_map(grid, iteration(method).coefficients) for method in ("newton-schulz", "polar-express")}
    for s, row in TABLE.items():
        for method, expected in zip(after, row, strict=True):
            value = scalar_map(torch.tensor(s, dtype=torch.float64), iteration(method).coefficients)
            assert float(value) == pytest.approx(expected, abs=6e-10)
    newton = scalar_map(upper, iteration("newton-schulz").coefficients)
    assert (float(newton.min()), float(newton.max())) == pytest.approx((0.681831, 1.134357), abs=1e-6)
    assert float(after["newton-schulz"].max()) == pytest.approx(1.2024, abs=1e-4)
    polar = after["polar-express"]
    assert (float(polar.min()), float(polar.max())) == pytest.approx((0.858873, 1.141127), abs=1e-6)
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    assert float(scalar_map(tiny, iteration("newton-schulz").coefficients) / tiny) == pytest.approx(484.876, abs=1e-3)
    assert iteration("newton-schulz").coefficients == tuple(SCHEMES["newton-schulz"][0])
    assert iteration("polar-express").coefficients == tuple(SCHEMES["polar-express"][0])


def test_steps_beyond_the_table_of_polar_express_repeat_the_last() -> None:
    rows = iteration("polar-express", 7).coefficients
    assert rows[4:] == (rows[4],) * 3 and iteration("polar-express", 3).coefficients == rows[:3]
    a, b, c = rows[4]
    end = ((-b - (b * b - 4 * c * (a - 1)) ** 0.5) / (2 * c)) ** 0.5  # a + b s^2 + c s^4 = 1
    singular = torch.linalg.svdvals(orthogonalize(random(6, 9), method="polar-express", steps=60))
    assert end == pytest.approx(1.03539, abs=1e-5) and float((singular - end).abs().max()) < 1e-6


def test_two_by_two() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    newton, polar = orthogonalize(matrix).flatten().tolist(), orthogonalize(matrix, method="svd").flatten().tolist()
    # The published values divide by the norm plus 1e-7, which moves the eighth digit.
    assert newton == pytest.approx([-0.680660990, 0.825539610, 0.741295418, 0.259440027], abs=2e-8)
    assert polar == pytest.approx([-0.514495755, 0.857492926, 0.857492926, 0.514495755], abs=6e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_equals_the_map_on_its_singular_values(method: Any, shape: tuple[int, int]) -> None:
    torch.testing.assert_close(
        orthogonalize(random(*shape), method=method), orthogonalized(random(*shape), method), rtol=0, atol=2e-13
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 7), (4, 4), (9, 3)])
def test_transposing_commutes_and_the_length_of_the_input_does_not_matter(method: Any, shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    result = orthogonalize(matrix, method=method)
    turned = orthogonalize(matrix.T, method=method).T
    if shape[0] != shape[1]:
        assert torch.equal(turned, result) or method == "svd"
    torch.testing.assert_close(turned, result, rtol=0, atol=2e-13)
    for factor in (1e-3, 1e5):
        torch.testing.assert_close(orthogonalize(factor * matrix, method=method), result, rtol=0, atol=2e-12)
    torch.testing.assert_close(orthogonalize(-matrix, method=method), -result, rtol=0, atol=2e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gives_zero(method: Any, dtype: torch.dtype) -> None:
    assert not orthogonalize(torch.zeros(2, 3, 5, dtype=dtype), method=method).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (3, 0, 4), (0, 0)])
def test_nothing_gives_nothing(method: Any, shape: tuple[int, ...]) -> None:
    assert orthogonalize(torch.zeros(shape, dtype=torch.float64), method=method).shape == shape


def test_below_eps_a_matrix_is_divided_by_eps() -> None:
    """At a norm of 1e-6 eps the slope at zero is what is left of the map."""
    matrix = random(3, 5)
    tiny = matrix / matrix.norm() * 1e-13
    torch.testing.assert_close(orthogonalize(tiny), 3.4445**5 * tiny / 1e-7, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (7, 11), (5, 6), (6, 6), (3, 4, 9)])
def test_gram_equals_the_plain_form(shape: tuple[int, ...]) -> None:
    for steps in (1, 3, 5, 7):
        torch.testing.assert_close(
            orthogonalize(random(*shape), method="gram", steps=steps),
            orthogonalize(random(*shape), steps=steps),
            rtol=0,
            atol=2e-14,
        )


def test_gram_is_taken_on_the_short_side_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    plain = orthogonalization._gram_iterate
    monkeypatch.setattr(orthogonalization, "_gram_iterate", lambda x, c: (seen.append(x.shape), plain(x, c))[1])
    for shape in ((4, 6), (6, 4), (5, 6), (4, 4)):
        orthogonalize(random(*shape), method="gram")
        orthogonalize(random(*shape))
    assert seen == [(1, 4, 6), (1, 4, 6)]


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_a_loop(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random(2, 5, 4, 6)
    loop = torch.stack([torch.stack([orthogonalize(matrix, method=method) for matrix in row]) for row in batch])
    torch.testing.assert_close(orthogonalize(batch, method=method), loop, rtol=0, atol=1e-14)
    monkeypatch.setattr(orthogonalization, "CPU_WORKING_SET", 4 * 3 * 24 * 8)  # three matrices at a time
    torch.testing.assert_close(orthogonalize(batch, method=method), loop, rtol=0, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_columns_of_zeros_stay_zero_and_change_nothing_else(method: Any) -> None:
    matrix = random(3, 5)
    padded = torch.zeros(6, 9, dtype=torch.float64)
    padded[1:4, 2:7] = matrix
    result = orthogonalize(padded, method=method)
    torch.testing.assert_close(result[1:4, 2:7], orthogonalize(matrix, method=method), rtol=0, atol=1e-13)
    result[1:4, 2:7] = 0
    assert float(result.abs().max()) < 1e-14


@pytest.mark.parametrize("method", METHODS)
def test_directions_without_a_singular_value_stay_without(method: Any) -> None:
    matrix, u, v = with_singular_values([2.0, 0.7], 5, 4)
    after = torch.linalg.svdvals(orthogonalize(matrix, method=method))
    assert float(after[2:].max()) < 1e-12 and float(after[:2].min()) > 0.6
    if method == "svd":
        torch.testing.assert_close(orthogonalize(matrix, method="svd"), u @ v.T, rtol=0, atol=1e-13)


def test_svd_is_exact_in_float32_too_and_keeps_small_values_that_are_real() -> None:
    matrix, u, v = with_singular_values([3.0, 1e-3], 6, 3)
    result = orthogonalize(matrix.float(), method="svd", dtype=torch.float32)
    torch.testing.assert_close(result.double(), u @ v.T, rtol=0, atol=1e-4)  # float32 error over a gap of 3000
    assert torch.equal(exact_polar_factor(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_bfloat16_keeps_the_direction(method: Any, shape: tuple[int, int]) -> None:
    """The products have 8 bits: singular values stay near the range of the map, and the direction within 3 %."""
    matrix = random(*shape)
    result, exact = orthogonalize(matrix.float(), method=method), orthogonalize(matrix, method=method)
    assert result.dtype == torch.bfloat16
    cosine = (result.double() * exact).sum() / result.double().norm() / exact.norm()
    assert float(cosine) > 0.997
    singular = torch.linalg.svdvals(result.double())
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.22
    in_float32 = orthogonalize(matrix.float(), method=method, dtype=torch.float32)
    assert in_float32.dtype == torch.float32
    torch.testing.assert_close(in_float32.double(), exact, rtol=0, atol=2e-4)


def test_the_dtype_of_the_computation() -> None:
    expected = {torch.float64: torch.float64, torch.float32: torch.bfloat16, torch.bfloat16: torch.bfloat16,
                torch.float16: torch.bfloat16}  # fmt: skip
    for given, out in expected.items():
        assert orthogonalize(torch.eye(3, dtype=given)).dtype == out
        assert orthogonalize(torch.eye(3, dtype=given), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 3, 5), (2, 3, 6, 4), (0, 5)])
def test_the_result_may_be_written_to_a_tensor_or_over_the_input(
    method: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orthogonalization, "CPU_WORKING_SET", 4 * 2 * 24 * 8)  # about two matrices at a time
    matrix, target = random(*shape), torch.full(shape, 7.0, dtype=torch.float64)
    expected = orthogonalize(matrix, method=method)
    assert orthogonalize(matrix, method=method, out=target) is target and torch.equal(target, expected)
    part = torch.cat([matrix, matrix], -2)[..., : shape[-2], :]  # rows of a fused tensor: not contiguous
    assert orthogonalize(part, method=method, out=part) is part
    torch.testing.assert_close(part, expected, rtol=0, atol=1e-14)


def test_the_input_is_left_alone() -> None:
    for method in METHODS:
        matrix = random(3, 5)
        before = matrix.clone()
        orthogonalize(matrix, method=method)
        assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthogonalize(torch.ones(3)), r"\[\.\.\., m, n\]: got \[3\]"),
        (lambda: orthogonalize(torch.ones(3, 3, dtype=torch.int64)), "got .* torch.int64"),
        (lambda: orthogonalize(torch.ones(3, 3, dtype=torch.complex64)), "got .* torch.complex64"),
        (lambda: orthogonalize(torch.ones(3, 3), method="qr"), "'qr' is unknown: choose one of newton-schulz"),
        (lambda: orthogonalize(torch.ones(3, 3), steps=0), r"steps=0: choose a whole number from 1 to 99"),
        (lambda: orthogonalize(torch.ones(3, 3), steps=100), r"steps=100: choose a whole number from 1 to 99"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
