"""The l2 norm of each group of numbers: rows, columns or filters that go to zero as wholes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from burnish.penalties.penalty import Penalty, check_strength

MOST_STEPS = 60


@dataclass(frozen=True)
class GroupLasso(Penalty):
    """strength times the sum of the l2 norms of groups.

    Args:
        strength: multiply it by the root of the group's size to have numbers of the lasso's scale.
        dim: every index of this dimension is a group, with all numbers of the other dimensions in it: 0 for the rows of
            a matrix [out, in] (output neurons) and the filters of a kernel, 1 for its columns (input neurons). Several
            dimensions: every pair of indices; (0, 1) for each kernel plane [height, width].

    Raises:
        ValueError: a negative strength, no or repeated dimensions; a tensor that lacks one.

    Source: ours in a diagonal metric: x = v r / (r + h / d) with h = step strength, where r, the norm of x, is the root
    of sum (v / (r + h / d))^2 = 1. Its inverse root is concave in r, as in trust regions, so that Newton climbs to it
    from below without a safeguard; in a multiple of the Euclidean metric the first guess is the answer.

    Examples:
        >>> GroupLasso(1.0).prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """

    strength: float
    dim: int | tuple[int, ...] = 0
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not self.dims or len(set(self.dims)) < len(self.dims) or min(self.dims) < 0:
            raise ValueError(f"dim={self.dim}: expected one dimension or several different ones, counted from 0")

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions whose indices tell groups apart."""
        return (self.dim,) if isinstance(self.dim, int) else tuple(self.dim)

    def splits_along(self, dim: int, ndim: int) -> bool:
        return dim in self.dims

    def value(self, x: Tensor) -> Tensor:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        within = self._within(x)
        norms = torch.linalg.vector_norm(work, dim=within) if within else work.abs()
        return self.strength * norms.sum()

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        h, within = step * self.strength, self._within(x)
        # Without a dimension left to sum over, each number is a group: a dimension of length 1 stands in.
        if not within:
            x, metric, within = x.unsqueeze(-1), None if metric is None else metric.unsqueeze(-1), (-1,)
        if metric is None:
            norm = torch.linalg.vector_norm(x, dim=within, keepdim=True)
            x.mul_((1 - h / norm).clamp_(min=0.0).nan_to_num_(0.0)).add_(0.0)
            return
        offset = metric.reciprocal_().mul_(h)
        norm = group_norm(x, offset, within)
        x.mul_((norm / (norm + offset)).nan_to_num_(0.0)).add_(0.0)

    def _within(self, x: Tensor) -> tuple[int, ...]:
        if max(self.dims) >= x.ndim:
            raise ValueError(f"dim={self.dim}: a tensor of shape {list(x.shape)} has no such dimension")
        return tuple(dim for dim in range(x.ndim) if dim not in self.dims)


def group_norm(v: Tensor, offset: Tensor, within: tuple[int, ...]) -> Tensor:
    """The norm r of each group after the map: the root of sum (v / (r + offset))^2 = 1; 0 where there is none above it.

    Args:
        v: Tensor, numbers before the map.
        offset: h / d, of the shape of v.
        within: dimensions to sum over; kept with length 1 in what is returned.
    """
    length = torch.linalg.vector_norm(v, dim=within, keepdim=True)
    norm: Tensor = (length - offset.amax(within, keepdim=True)).clamp_(min=0.0).nan_to_num_(0.0)
    precision = 2 * torch.finfo(v.dtype).eps
    for _ in range(MOST_STEPS):
        reach = norm + offset
        part = v / reach
        size = torch.linalg.vector_norm(part, dim=within, keepdim=True)
        slope = (part.square_() / reach).sum(within, keepdim=True)
        further = norm + size.square() * (size - 1) / slope
        # A group that has arrived only trembles; one that is zero altogether has no slope.
        further = torch.where(further > norm * (1 + precision), further, norm)
        if torch.equal(further, norm):
            break
        norm = further
    return norm
