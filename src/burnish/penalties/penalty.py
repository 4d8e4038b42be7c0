"""What every regulariser here is: a value, and an exact proximal map in the metric of a diagonal preconditioner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Metric = Tensor | float | None


class Penalty:
    """strength times a function R of a tensor, with its proximal map.

    A subclass is a frozen dataclass of plain numbers, strings and tuples (so that a training state can hold it) with a
    `value` and a `shrink_`.

    Attributes:
        elementwise: R is a sum over numbers, so that pieces and shards of a tensor can be treated alone.
        diagonal: the map is known in any diagonal metric, not only in multiples of the Euclidean one.
        constraint: R is zero or infinite, so that its strength means nothing.
    """

    elementwise: ClassVar[bool] = True
    diagonal: ClassVar[bool] = True
    constraint: ClassVar[bool] = False
    strength: float

    def value(self, x: Tensor) -> Tensor:
        """strength R(x), a scalar Tensor; autograd can differentiate it where R is smooth."""
        raise NotImplementedError

    def shrink_(self, x: Tensor, step: float, metric: Tensor | None) -> None:
        """The proximal map in place.

        Args:
            x: Tensor of any shape, float32 or float64.
            step: times the strength, positive.
            metric: Tensor of the shape of x, which may be overwritten, or None for ones.
        """
        raise NotImplementedError

    def splits_along(self, dim: int, ndim: int) -> bool:
        """Whether parts of a tensor of `ndim` dimensions, cut along `dim`, can be treated alone."""
        return self.elementwise

    @torch.no_grad()
    def prox(self, x: Tensor, step: float = 1.0, preconditioner: Metric = None) -> Tensor:
        """argmin over y of strength R(y) + sum of d (y - x)^2 / (2 step).

        Args:
            x: Tensor of any shape, floating point; half precision is computed in float32.
            step: of the gradient step that led to x, in [0, inf).
            preconditioner: d, a positive number or a Tensor that broadcasts to x; 1 where left out.

        Returns:
            Tensor like x; a global minimiser, zero where zero is one, never -0.0.

        Raises:
            ValueError: a negative step or preconditioner; a metric in which the map is not known.
        """
        if not (0 <= step < math.inf):
            raise ValueError(f"step={step}: expected a number in [0, inf)")
        work = torch.promote_types(x.dtype, torch.float32)
        metric: Tensor | None = None
        if isinstance(preconditioner, Tensor):
            if not bool(((preconditioner >= 0) & preconditioner.isfinite()).all()):
                raise ValueError("preconditioner has negative or infinite entries: expected numbers in [0, inf)")
            metric = torch.broadcast_to(preconditioner.to(work), x.shape).clone()
        elif preconditioner is not None:
            if not (0 < preconditioner < math.inf):
                raise ValueError(f"preconditioner={preconditioner}: expected a number in (0, inf)")
            step = step / preconditioner
        moved = x.to(work, copy=True)
        self.prox_([moved], step, None if metric is None else [metric])
        return moved.to(x.dtype).add_(0.0)  # the smallest negative numbers round to -0.0 in half precision

    @torch.no_grad()
    def prox_(self, tensors: Sequence[Tensor], step: float, metric: Sequence[Tensor] | None = None) -> None:
        """`prox` of each tensor in place, without looks at the input.

        Args:
            tensors: float32 or float64.
            step: as in `prox`.
            metric: d for each tensor, of its shape and dtype; overwritten.

        Raises:
            ValueError: a metric is given and the map is known in the Euclidean one alone.
        """
        if metric is not None and not self.diagonal:
            raise ValueError(
                f"{type(self).__name__} has no proximal map in a diagonal metric: use metric='euclidean', or an"
                " optimizer without one (sgd, momentum)"
            )
        if not self.constraint and not self.strength * step:
            return
        for index, tensor in enumerate(tensors):
            if tensor.numel():
                self.shrink_(tensor, step, None if metric is None else metric[index])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; `restore` gives the penalty back."""
        assert is_dataclass(self) and not isinstance(self, type)
        return {"kind": type(self).__name__, **asdict(self)}


def check_strength(strength: float, name: str = "strength") -> None:
    """Refuse a strength that is negative or not a number."""
    if not (0 <= strength < math.inf):
        raise ValueError(f"{name}={strength}: expected a number in [0, inf)")


def mean_loss_strength(strength: float, num_examples: int) -> float:
    """The strength beside a loss that is a mean over examples, from the strength beside their sum.

    Source: the official ProxGen code divides its --lam by the number of training images.

    Examples:
        >>> mean_loss_strength(5.0, 50_000)
        0.0001
    """
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples}: expected 1 or more")
    return strength / num_examples
