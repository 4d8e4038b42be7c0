"""Top-K and greedy D-optimal selection: worked example, limits, and equality with the naive search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.densify.score import importance
from burnish.densify.select import d_optimal, effective_rank, importance_kernel, top_k
from tests.densify.records import constant_outputs, layer_statistics


def worked_kernel() -> torch.Tensor:
    stats = layer_statistics(constant_outputs())
    return importance_kernel(importance(stats, "acp"), stats.gram / stats.num_tokens)


def naive(kernel: torch.Tensor, keep: int, lam: float) -> list[int]:
    chosen: list[int] = []
    for _ in range(keep):
        best, best_value = -1, -torch.inf
        for expert in range(len(kernel)):
            if expert not in chosen:
                subset = [*chosen, expert]
                value = torch.linalg.slogdet(kernel[subset][:, subset] + lam * torch.eye(len(subset)).double())[1]
                if value > best_value + 1e-12:
                    best, best_value = expert, value
        chosen.append(best)
    return chosen


def test_top_k_breaks_ties_by_the_lowest_index() -> None:
    assert top_k(torch.tensor([1.0, 3, 3, 2]), 3) == [1, 2, 3]


def test_worked_kernel() -> None:
    expected = [[3.466667, 3.330666, 0], [3.330666, 3.2, 0], [0, 0, 0.55]]
    torch.testing.assert_close(worked_kernel(), torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_the_ridge_decides_whether_duplicates_are_kept() -> None:
    kernel = worked_kernel()
    assert sorted(d_optimal(kernel, 2)) == [0, 1]  # lam = mean(diagonal) / K = 1.2027778: duplicates!
    assert sorted(d_optimal(kernel, 2, ridge=1e-3)) == [0, 2]


def test_default_ridge_is_one_over_keep() -> None:
    kernel = worked_kernel()
    assert d_optimal(kernel, 2) == d_optimal(kernel, 2, ridge=0.5) == naive(kernel, 2, 1.2027778)


def test_default_ridge_decides_where_half_and_one_differ() -> None:
    kernel = torch.tensor([[3.0, 3, 0], [3, 3, 0], [0, 0, 1]]).double()
    assert d_optimal(kernel, 2) == d_optimal(kernel, 2, ridge=0.5) == [0, 2]
    assert d_optimal(kernel, 2, ridge=1.0) == [0, 1]


def test_a_normalised_gram_leaves_the_importance_on_the_diagonal() -> None:
    stats = layer_statistics(constant_outputs())
    scores = importance(stats, "acp")
    kernel = importance_kernel(scores, stats.gram / stats.num_tokens, normalize_gram=True)
    torch.testing.assert_close(kernel.diagonal(), scores)


def random_kernel(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    factor = torch.randn(size, rank or size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.mT


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(0, 10_000), st.sampled_from([1e-3, 0.1, 0.5, 3.0]))
def test_fast_greedy_equals_the_naive_search(size: int, seed: int, ridge: float) -> None:
    kernel = random_kernel(size, seed, rank=max(1, size // 2))
    keep = max(1, size // 2)
    assert d_optimal(kernel, keep, ridge=ridge) == naive(kernel, keep, float(ridge * kernel.diagonal().mean()))


def test_large_ridge_is_top_k_by_the_diagonal() -> None:
    kernel = random_kernel(12, 3)
    assert d_optimal(kernel, 5, ridge=1e9) == top_k(kernel.diagonal(), 5)


@pytest.mark.parametrize("ridge", [1e-6, 0.5, 100.0])
def test_orthogonal_outputs_make_the_ridge_irrelevant(ridge: float) -> None:
    diagonal = torch.tensor([3.0, 1, 4, 1.5, 9, 2.6]).double()
    assert d_optimal(torch.diag(diagonal), 3, ridge=ridge) == [4, 2, 0]


def test_vanishing_ridge_never_keeps_an_exact_duplicate() -> None:
    for seed in range(20):
        kernel = random_kernel(8, seed)
        order = [0, 1, 2, 3, 4, 5, 6, 7, 2]  # expert 8 repeats expert 2
        doubled = kernel[order][:, order]
        assert not {2, 8} <= set(d_optimal(doubled, 6, ridge=1e-10))


def test_scaling_the_kernel_changes_nothing() -> None:
    kernel = random_kernel(10, 5)
    assert d_optimal(kernel, 4) == d_optimal(1e6 * kernel, 4)


def test_a_kernel_of_zeros_keeps_the_first_experts() -> None:
    assert d_optimal(torch.zeros(5, 5).double(), 3) == [0, 1, 2]


def test_a_kernel_of_low_rank_still_gives_distinct_experts() -> None:
    chosen = d_optimal(random_kernel(10, 1, rank=2), 6, ridge=0.0)
    assert len(set(chosen)) == 6


def test_effective_rank_of_duplicates_two_eigenvalues_and_identity() -> None:
    assert effective_rank(torch.ones(4, 4).double()) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([4.0, 1]).double())) == pytest.approx(1.6493849, abs=1e-6)
    assert effective_rank(torch.eye(7).double()) == pytest.approx(7)
    assert effective_rank(torch.zeros(3, 3).double()) == 0
