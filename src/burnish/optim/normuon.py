"""NorMuon: Muon whose directions have their rows brought to one length."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from burnish.optim.base import require_number
from burnish.optim.matrix import Normalize, row_shape
from burnish.optim.muon import Muon
from burnish.optim.routing import Routing


def normalize_rows(directions: Tensor, second_moment: Tensor, *, beta2: float, eps: float) -> Tensor:
    """Divide each row by the root of its running mean square, and keep the Frobenius norm of the matrix.

    Args:
        directions: Tensor [..., rows, cols], orthogonalised.
        second_moment: Tensor [..., rows, 1], float32 or wider; updated in place, without bias correction.
        beta2: of that average.
        eps: added to the divisors.

    Returns:
        Tensor [..., rows, cols] in the dtype of `second_moment`.

    Source: arXiv 2510.05491, the authors' code. After the first step from zero all rows have one norm.
    """
    directions = directions.to(second_moment.dtype)
    norm = torch.linalg.vector_norm(directions, dim=(-2, -1), keepdim=True)
    second_moment.lerp_(directions.square().mean(-1, keepdim=True), 1 - beta2)
    scaled = directions / (second_moment.sqrt() + eps)
    kept: Tensor = norm / (torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True) + eps)
    return scaled * kept


class NorMuon(Muon):
    """Muon with a second moment for each row (output) of a matrix, so that no neuron moves further than others.

    Args:
        params, lr, options: as `Muon`; the defaults are of the authors' code where they differ: lr 0.02, no decay.
        beta2: of the row statistics, in [0, 1).
        row_eps: added to the divisors.

    Source: arXiv 2510.05491.
    """

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float = 0.02,
        *,
        beta2: float = 0.95,
        row_eps: float = 1e-10,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, weight_decay=weight_decay, **options)
        # Only steps read them, so they may come after the groups.
        row_options = {"beta2": beta2, "row_eps": row_eps}
        self.defaults |= row_options
        for group in self.param_groups:
            group |= row_options | group
            self.check_group(group)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        require_number("beta2", group.get("beta2", 0.0), low=0, high=1)
        require_number("row_eps", group.get("row_eps", 0.0), low=0)

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().create_state(parameter, group)
        if group["use_muon"]:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            shape = row_shape(parameter.shape, group)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                rows: Tensor = sharded_zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements)
            else:
                rows = torch.zeros(shape, dtype=dtype, device=parameter.device)
            state["row_second_moment"] = rows
        return state

    def normalize(self, group: dict[str, Any]) -> Normalize | None:
        return functools.partial(normalize_rows, beta2=group["beta2"], eps=group["row_eps"])
