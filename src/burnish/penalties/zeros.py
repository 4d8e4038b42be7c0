"""How many weights of a model are exactly zero, tensor by tensor, and how many whole rows and columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class TensorSparsity:
    """Counts of one tensor.

    Attributes:
        name: in the model.
        shape: of the tensor.
        numel, zeros: how many numbers, and how many of them are exactly zero.
        zero_rows: indices of the first dimension (output neurons, filters) with nothing but zeros.
        zero_columns: the same of the second dimension (inputs).
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    zero_rows: int
    zero_columns: int

    @property
    def share(self) -> float:
        """Of numbers that are zero."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Sparsity:
    """Exact zeros of the tensors of a model with two dimensions or more; print it to see the table."""

    tensors: tuple[TensorSparsity, ...]

    def __iter__(self) -> Iterator[TensorSparsity]:
        return iter(self.tensors)

    @property
    def numel(self) -> int:
        """Of all tensors."""
        return sum(one.numel for one in self.tensors)

    @property
    def zeros(self) -> int:
        """Of all tensors."""
        return sum(one.zeros for one in self.tensors)

    @property
    def share(self) -> float:
        """Of numbers that are zero, of all tensors."""
        return self.zeros / self.numel if self.numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        return {"share": self.share, "tensors": [asdict(one) for one in self.tensors]}

    def __str__(self) -> str:
        rows = [("tensor", "shape", "zeros", "zero rows", "zero columns")]
        for one in self.tensors:
            columns = f"{one.zero_columns} of {one.shape[1]}"
            rows.append(
                (one.name, str(list(one.shape)), f"{one.share:.2%}", f"{one.zero_rows} of {one.shape[0]}", columns)
            )
        rows.append(("all", f"{self.numel:,}", f"{self.share:.2%}", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


@torch.no_grad()
def sparsity(model: nn.Module) -> Sparsity:
    """Count the exact zeros of a model's tensors with two dimensions or more; shared tensors once."""
    return Sparsity(tuple(_count(name, tensor) for name, tensor in model.named_parameters() if tensor.ndim > 1))


def _count(name: str, tensor: Tensor) -> TensorSparsity:
    filled = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor) != 0
    rows = filled.flatten(1).any(1)
    columns = filled.transpose(0, 1).flatten(1).any(1)
    return TensorSparsity(
        name,
        tuple(tensor.shape),
        filled.numel(),
        filled.numel() - int(filled.sum()),
        rows.numel() - int(rows.sum()),
        columns.numel() - int(columns.sum()),
    )
