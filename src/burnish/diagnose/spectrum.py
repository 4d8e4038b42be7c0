"""Singular values of a low-rank product, how evenly they grow, and in which order they arrive: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Order = Literal["smallest-first", "largest-first", "together", "mixed"]


def lora_singular_values(b: Tensor, a: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values of `scale * b @ a`, descending, without the product.

    With the triangular factors of `b = Q_b R_b` and `a^T = Q_a R_a`, they are those of the r x r matrix `R_b R_a^T`.

    Args:
        b: Tensor `[..., out, r]`, the second factor of an adapter.
        a: Tensor `[..., r, in]`, the first.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Returns:
        Tensor `[..., min(out, r, in)]`, float64.

    Raises:
        ValueError: the inner sizes differ.

    Source: ours; it takes O((out + in) r^2) where the product alone takes O(out in r).

    Examples:
        >>> lora_singular_values(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([10.], dtype=torch.float64)
    """
    if b.shape[-1] != a.shape[-2]:
        raise ValueError(f"b {list(b.shape)} and a {list(a.shape)}: expected [..., out, r] and [..., r, in]")
    upper_b = torch.linalg.qr(b.double(), mode="r").R  # [..., min(out, r), r]
    upper_a = torch.linalg.qr(a.double().mT, mode="r").R  # [..., min(in, r), r]
    values: Tensor = torch.linalg.svdvals(upper_b @ upper_a.mT)
    return abs(scale) * values


def effective_rank(values: Tensor) -> Tensor:
    """`exp(H(d / sum d))`: r for r equal singular values, 1 for a single one; NaN where all are zero.

    Args:
        values: Tensor `[..., r]`, singular values d.

    Returns:
        Tensor `[...]`.

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    shares = values / values.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy.exp()


def growth_variation(values: Tensor) -> Tensor:
    """Standard deviation of sqrt(d) over its mean: 0 where all modes have grown alike; NaN where all are zero.

    The square roots, because it is they that grow at the same constant rate under orthogonalised steps.

    Args:
        values: Tensor `[..., r]`, singular values d.

    Returns:
        Tensor `[...]`.

    Source: the rate is arXiv 2602.06385, Theorem 5.7 (as described by others); the measure is ours.
    """
    roots = values.sqrt()
    return roots.std(-1, correction=0) / roots.mean(-1)


def growth_rates(times: Tensor, values: Tensor, *, start: float, end: float) -> Tensor:
    """Slope of sqrt(d) of each mode over the times from `start` to `end`, by least squares.

    Args:
        times: Tensor `[measurements]`, in units of step times learning rate.
        values: Tensor `[measurements, r]`, singular values d.

    Returns:
        Tensor `[r]`.

    Raises:
        ValueError: fewer than two measurements in the window.
    """
    inside = (times >= start) & (times <= end)
    if inside.sum() < 2:
        raise ValueError(f"{int(inside.sum())} measurements from {start} to {end}: expected at least 2")
    centred = times[inside] - times[inside].mean()
    return centred @ values[inside].sqrt() / (centred @ centred)


def hit_steps(
    steps: Sequence[int], values: Tensor, final: Tensor | None = None, *, share: float = 0.9
) -> tuple[int | None, ...]:
    """The first measured step at which each mode has reached a share of its final value.

    Args:
        steps: of the measurements, ascending.
        values: Tensor `[measurements, r]`, singular values, descending in each row.
        final: Tensor `[r]`; the last row of `values` by default, or the singular values of a known target.
        share: between 0 and 1.

    Returns:
        One step a mode; None for a mode that never gets there, or whose final value is 0.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a number above 0 and at most 1")
    final = values[-1] if final is None else final
    reached = (values >= share * final) & (final > 0)  # [measurements, r]
    return tuple(steps[int(mode.int().argmax())] if mode.any() else None for mode in reached.mT)


def hit_order(hits: Sequence[int | None]) -> Order:
    """In which order modes arrived, the largest singular value first in `hits`; those that did not are left out.

    >>> hit_order([219, 196, 98]), hit_order([186, None, 930]), hit_order([5, 5]), hit_order([1, 3, 2])
    ('smallest-first', 'largest-first', 'together', 'mixed')
    """
    known = [hit for hit in hits if hit is not None]
    if len(set(known)) <= 1:
        return "together"
    if known == sorted(known):
        return "largest-first"
    return "smallest-first" if known == sorted(known, reverse=True) else "mixed"


@dataclass(frozen=True)
class AdapterSpectrum:
    """What one adapter adds to the weight that it sits on.

    Attributes:
        adapter: name of the adapted module; of a stack of experts, with the number of the expert.
        singular_values: of the product, its scale included, descending.
        scale: alpha / r, or what the adapter's kind makes of it.
        dora: the weight is normalised after the product was added and multiplied by a trained magnitude; what it gains
            in all is then not of low rank, and the values are those of the product alone.
    """

    adapter: str
    singular_values: tuple[float, ...]
    scale: float = 1.0
    dora: bool = False

    @cached_property
    def values(self) -> Tensor:
        """Tensor `[r]`, float64."""
        return torch.tensor(self.singular_values, dtype=torch.float64)

    @property
    def effective_rank(self) -> float | None:
        """None where all are zero."""
        return float(effective_rank(self.values)) if self.singular_values[0] > 0 else None

    @property
    def growth_variation(self) -> float | None:
        """None where all are zero."""
        return float(growth_variation(self.values)) if self.singular_values[0] > 0 else None

    def line(self, step: int) -> dict[str, Any]:
        """One line of `spectrum.jsonl`."""
        return {
            "step": step,
            "adapter": self.adapter,
            "singular_values": list(self.singular_values),
            "effective_rank": self.effective_rank,
            "growth_variation": self.growth_variation,
            "scale": self.scale,
            "dora": self.dora,
        }
