"""Muon: momentum, orthogonalised, for weight matrices; AdamW or SGD for the other tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from burnish.optim.base import Live, RoutedOptimizer, require_number
from burnish.optim.elementwise import sweep
from burnish.optim.matrix import Normalize, check_matrix_group, directions, matrix_options
from burnish.optim.orthogonalization import Method
from burnish.optim.routing import Routing

AUXILIARY = ("adamw", "sgd")


class Muon(RoutedOptimizer):
    """Momentum orthogonalised by Newton-Schulz, with decoupled weight decay; as `torch.optim.Muon`, for whole models.

    Unlike `torch.optim.Muon` it takes every tensor of a model (those that are no weight matrices get AdamW or SGD from
    torch), stacks of matrices and kernels, orthogonalises equal shapes as one batch, and works on FSDP2 shards.

    Args:
        params: a model, a `Routing`, tensors, (name, tensor) pairs, or groups (`use_muon` says which rule). Two or more
            dimensions go to the matrix rule where nothing else is said. See `burnish.optim.matrix` for the group keys
            `layout`, `transposed`, `splits` and `heads`.
        lr: of the matrix rule; the scale rule multiplies it.
        weight_decay: decoupled, times the lr that is not scaled: `p *= 1 - lr * weight_decay` before the step.
        momentum: of the gradient average, in [0, 1).
        nesterov: orthogonalise the gradient averaged once more with the momentum.
        momentum_form: "ema" (torch, Muon's own code) or "accumulate" (Moonlight, Dion).
        scale: "original", "match_rms_adamw", "spectral" or "none", see `burnish.optim.scale`.
        orthogonalization, steps, dtype, eps: see `burnish.optim.orthogonalization`.
        cautious: decay only where it does not work against the step.
        auxiliary: "adamw" or "sgd" for the other tensors.
        auxiliary_lr: their lr; `lr` where left out.
        betas, auxiliary_eps: of AdamW; SGD has `momentum` and `nesterov`.
        nonfinite: "raise" at a NaN in a gradient, or "skip" the step.
        process_group: of data parallel ranks, to share the orthogonalisation.
        maximize: go up instead of down.

    Raises:
        ValueError: an option out of range, see `RoutedOptimizer`.

    Source: K. Jordan et al. (2024); defaults as `torch.optim.Muon`; `match_rms_adamw` from arXiv 2502.16982.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = Muon(model.parameters(), lr=0.02)
        >>> [route.rule for route in optimizer.routing_table()]
        ['matrix', 'matrix', 'auxiliary', 'auxiliary']
    """

    def __init__(
        self,
        params: nn.Module | Routing | Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        momentum_form: Literal["ema", "accumulate"] = "ema",
        scale: str = "original",
        orthogonalization: Method = "newton-schulz",
        steps: int = 5,
        dtype: torch.dtype | None = None,
        eps: float = 1e-7,
        cautious: bool = False,
        auxiliary: Literal["adamw", "sgd"] = "adamw",
        auxiliary_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        auxiliary_eps: float = 1e-8,
        nonfinite: Literal["raise", "skip"] = "raise",
        process_group: ProcessGroup | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            **matrix_options(momentum, nesterov, momentum_form, scale, orthogonalization, steps, dtype, eps),
            "cautious": cautious,
            "auxiliary": auxiliary,
            "auxiliary_lr": auxiliary_lr,
            "betas": betas,
            "auxiliary_eps": auxiliary_eps,
            "nonfinite": nonfinite,
            "maximize": maximize,
        }
        super().__init__(params, defaults, process_group=process_group)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_matrix_group(group)
        if group["auxiliary"] not in AUXILIARY:
            raise ValueError(f"auxiliary={group['auxiliary']!r}: choose one of {', '.join(AUXILIARY)}")
        if group["auxiliary_lr"] is not None:
            require_number("auxiliary_lr", group["auxiliary_lr"], low=0)
        if len(group["betas"]) != 2:
            raise ValueError(f"betas={group['betas']}: expected two numbers")
        for index, beta in enumerate(group["betas"]):
            require_number(f"betas[{index}]", beta, low=0, high=1)
        require_number("auxiliary_eps", group["auxiliary_eps"], low=0)

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        value = parameter.detach()
        if group["use_muon"] or group["auxiliary"] == "sgd":
            return {"momentum_buffer": torch.zeros_like(value)}
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(value),
            "exp_avg_sq": torch.zeros_like(value),
        }

    def normalize(self, group: dict[str, Any]) -> Normalize | None:
        """What is done to directions before they are scaled; nothing in Muon itself."""
        return None

    def step_group(self, group: dict[str, Any], live: list[Live]) -> None:
        if not group["use_muon"]:
            auxiliary_step(group, live)
            return
        lr, decay, cautious = group["lr"], 1 - group["lr"] * group["weight_decay"], group["cautious"]
        for tensors, orthogonal, scale in directions(
            live, group, process_group=self.process_group, exchanges=self._exchanges, normalize=self.normalize(group)
        ):

            def move(data: list[Tensor], steps: list[Tensor], length: float = lr * scale) -> None:
                if cautious:
                    for tensor, step in zip(data, steps, strict=True):
                        tensor.addcmul_(tensor, (tensor * step > 0).to(tensor.dtype), value=decay - 1)
                elif decay != 1:
                    torch._foreach_mul_(data, decay)
                torch._foreach_add_(data, steps, alpha=-length)

            sweep(move, [tensor.data for tensor in tensors], orthogonal)


def auxiliary_step(group: dict[str, Any], live: list[Live]) -> None:
    """AdamW or SGD as torch has them."""
    if not live:
        return
    lr = group["lr"]
    data, gradients = [tensor.data for tensor in live], [tensor.gradient for tensor in live]
    columns = {key: [tensor.state[key] for tensor in live] for key in live[0].state}
    if group["auxiliary"] == "sgd":
        torch._foreach_mul_(data, 1 - lr * group["weight_decay"])
        sgd(
            data,
            gradients,
            columns["momentum_buffer"],  # type: ignore[arg-type]
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=lr,
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            foreach=True,
        )
        return
    adamw(
        data,
        gradients,
        columns["exp_avg"],
        columns["exp_avg_sq"],
        [],
        columns["step"],
        foreach=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["auxiliary_eps"],
        maximize=False,
    )
