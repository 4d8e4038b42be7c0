"""The sum of singular values: matrices of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from burnish.penalties.penalty import Penalty, check_strength


@dataclass(frozen=True)
class Nuclear(Penalty):
    """strength times the sum of the singular values of a matrix.

    Two dimensions are a matrix, three a stack of them, four or more a kernel, flattened to (first dimension, rest).
    The map takes step strength off each singular value. It is known for multiples of the Euclidean metric only: in
    another diagonal metric singular vectors move too, no closed form exists, and it is refused.

    Raises:
        ValueError: a negative strength; a tensor with fewer than two dimensions.

    Source: Cai, Candès and Shen, arXiv 0810.3286.

    Examples:
        >>> Nuclear(1.0).prox(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        tensor([[2., 0.],
                [0., 0.]])
    """

    strength: float
    elementwise: ClassVar[bool] = False
    diagonal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def splits_along(self, dim: int, ndim: int) -> bool:
        return ndim == 3 and dim == 0

    def value(self, x: Tensor) -> Tensor:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        values: Tensor = torch.linalg.svdvals(_matrices(work))
        return self.strength * values.sum()

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        left, values, right = torch.linalg.svd(_matrices(x), full_matrices=False)
        values.sub_(step * self.strength).clamp_(min=0.0)
        x.copy_(((left * values.unsqueeze(-2)) @ right).reshape(x.shape)).add_(0.0)


def _matrices(x: Tensor) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"a tensor of shape {list(x.shape)} is no matrix: penalise it with Lq or GroupLasso")
    return x.flatten(1) if x.ndim > 3 else x
