"""Which experts to keep: the K best, or K that are good and different (greedy D-optimal design)."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, keep: int) -> list[int]:
    """The `keep` experts of largest score, best first; ties go to the lowest index.

    Args:
        scores: [E].
        keep: K, 1..E.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return [int(expert) for expert in order[:keep]]


def importance_kernel(importance: Tensor, gram: Tensor, *, normalize_gram: bool = False) -> Tensor:
    """Kernel of DO-ACP: `sqrt(I_i I_j) G_ij`, [E, E] float64.

    Args:
        importance: [E], I >= 0.
        gram: [E, E], mean inner products of expert outputs.
        normalize_gram: use cosines instead, so that the diagonal is the importance alone. Which of the two the paper
            uses is not known; the independent implementation does not normalise.
    """
    if normalize_gram:
        norm = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
        gram = gram / torch.outer(norm, norm)
    root = importance.clamp(min=0).sqrt()
    return torch.outer(root, root) * gram


def d_optimal(kernel: Tensor, keep: int, *, ridge: float | None = None) -> list[int]:
    """Greedy maximisation of `log det(kernel[S, S] + lam * Id)` over |S| = keep; the experts in the order of choice.

    Each step conditions the remaining variances on the chosen expert (a pivoted Cholesky factorisation), so that the
    whole search is O(E K^2) and equals the naive search over determinants. Ties go to the lowest index.

    Args:
        kernel: [E, E] positive semidefinite.
        keep: K, 1..E.
        ridge: lam = ridge * mean(diagonal). None means 1 / keep, as the independent implementation has it; the
            paper's value is not known, and the choice depends on it.

    Source: arXiv 2605.28207 section 3.2 and appendix E (ingredients confirmed, lam and normalisation not).
    """
    diagonal = kernel.diagonal()
    lam = float((1.0 / keep if ridge is None else ridge) * diagonal.mean())
    variance = diagonal + lam
    floor = float(variance.max()) * torch.finfo(kernel.dtype).eps
    rows = kernel.new_zeros(keep, len(kernel))
    chosen: list[int] = []
    for step in range(keep):
        candidates = variance.clone()
        candidates[chosen] = -torch.inf
        expert = int(candidates.argmax())
        chosen.append(expert)
        row = kernel[expert] - rows[:step].mT @ rows[:step, expert]
        rows[step] = row / variance[expert].clamp(min=floor).sqrt() if floor > 0 else 0
        variance = variance - rows[step].square()
    return chosen


def effective_rank(gram: Tensor) -> float:
    """`exp(H(eigenvalues / sum))`: 1 for duplicates, n for n orthogonal outputs of equal size.

    Args:
        gram: [n, n] positive semidefinite.
    """
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    if eigenvalues.sum() == 0:
        return 0.0
    shares = eigenvalues / eigenvalues.sum()
    return float(torch.special.entr(shares).sum().exp())
