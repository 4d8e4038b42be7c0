"""Wells at given levels: weights fall to the nearest of them, and stay there exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.penalties.lq import shrink_lq_
from burnish.penalties.penalty import Penalty, check_strength

FEW = 16


@dataclass(frozen=True)
class Wells(Penalty):
    """strength times the sum of |x - level|^q, each x with its nearest level: the W of ProxQuant for (-1, 1) and q = 1.

    Args:
        strength: beside a mean loss; grows over the training, see `burnish.optim.penalty_schedule`.
        levels: two or more, ascending; `uniform_levels(bits)` for k bits, (-1, 0, 1) for ternary weights.
        q: in [0, 1]; 1 as in ProxQuant, 0 snaps what is near and leaves the rest.
        clip: also forbid what lies outside of the levels, as ProxQuant does after each step.

    Raises:
        ValueError: a negative strength, q outside of [0, 1], fewer than two levels, or levels not ascending.

    Source: revised ProxQuant, arXiv 2007.07484; the original, arXiv 1810.00861, is its map without a metric. The
    Moreau envelope of |x|^q grows with distance, so that the nearest level always wins, and the map is that of Lq
    around it. With `clip` it is the map of the sum, because clipping moves towards a level that was nearest already.
    A number half way between levels goes up.

    Examples:
        >>> Wells(0.1).prox(torch.tensor([0.7, -0.2, 1.05]))
        tensor([ 0.8000, -0.3000,  1.0000])
    """

    strength: float
    levels: tuple[float, ...] = (-1.0, 1.0)
    q: float = 1.0
    clip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(map(float, self.levels)))
        check_strength(self.strength)
        if not (0 <= self.q <= 1):
            raise ValueError(f"q={self.q}: expected a number in [0, 1]")
        if len(self.levels) < 2 or any(b <= a for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels={self.levels}: expected two or more, ascending")

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest level to each number."""
        return nearest(x, self.levels)

    def value(self, x: Tensor) -> Tensor:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        away = (work - nearest(work.detach(), self.levels)).abs()
        total = away.count_nonzero().to(work.dtype) if self.q == 0 else away.pow(self.q).sum()
        if self.clip and not (work.amin() >= self.levels[0] and work.amax() <= self.levels[-1]):
            return torch.full_like(total, torch.inf)
        return self.strength * total

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        wells = nearest(x, self.levels)
        # Where the shrunk distance is zero the level itself must come out, not level + rounding.
        distance = x - wells
        shrink_lq_(distance, self.q, step * self.strength, metric)
        torch.add(wells, distance, out=x)
        if self.clip:
            x.clamp_(self.levels[0], self.levels[-1])
        x.add_(0.0)


def nearest(x: Tensor, levels: Sequence[float]) -> Tensor:
    """The nearest of ascending levels to each number; half way between two, the upper one."""
    grid = torch.tensor(levels, dtype=x.dtype, device=x.device)
    middles = (grid[1:] + grid[:-1]) / 2
    if len(levels) > FEW:
        return grid[torch.bucketize(x.contiguous(), middles, right=True)]
    # A look-up takes ten times as long as a comparison; lerp is exact at weights of 0 and 1.
    found, above = grid[0].expand_as(x), torch.empty_like(x)
    for middle, level in zip(middles.tolist(), grid[1:], strict=True):
        found = torch.lerp(found, level, torch.ge(x, middle, out=above))
    return found


def uniform_levels(bits: int, largest: float = 1.0) -> tuple[float, ...]:
    """2^bits equally spaced levels from -largest to largest; without zero, as it is never half way.

    Raises:
        ValueError: bits other than 1 to 8.

    Examples:
        >>> uniform_levels(2)
        (-1.0, -0.333..., 0.333..., 1.0)
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits={bits}: expected a whole number from 1 to 8")
    steps = 2**bits - 1
    return tuple(largest * (2 * index - steps) / steps for index in range(2**bits))
