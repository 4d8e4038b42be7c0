"""Observe: stream a teacher over calibration tokens and reduce what its routers and experts do to sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.densify.statistics import LayerStatistics, RoutingStatistics, add_sums, output_sums, router_sums
from burnish.densify.teacher import StreamedTeacher
from burnish.errors import BurnishError
from burnish.families import Fused, RouterRule
from burnish.families.streaming import Calibration, stream

CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
WEIGHT_COLUMNS = 2**16
RULE_TOLERANCE = 0.02


def observe(
    teacher: StreamedTeacher,
    rule: RouterRule,
    calibration: Calibration,
    *,
    outputs: bool,
    weights: bool,
    batch_size: int,
    work: Path,
    advance: Callable[[int], None] = lambda batches: None,
) -> RoutingStatistics:
    """Statistics of every MoE layer over the calibration tokens.

    Args:
        teacher: the streamed model.
        rule: its routing rule; held against what the model really does on the first batch of each layer.
        calibration: tokens; padding counts for nothing.
        outputs: run every expert on every token and collect norms, Gram and cross-moments (num_experts / top_k times
            the work).
        weights: collect the similarity of the experts' weights.
        batch_size: sequences per forward pass.
        work: directory for finished layers and hidden states.
        advance: called with 1 after each batch of each layer.

    Raises:
        BurnishError: the model routes by another rule than its family's.
        CheckpointError: a tensor cannot be read.
    """
    watches = {
        index: partial(_Sums, teacher=teacher, index=index, rule=rule, outputs=outputs, weights=weights)
        for index in teacher.shape.moe_layers
    }
    files = stream(teacher, calibration, watches, batch_size=batch_size, work=work, advance=advance)
    return RoutingStatistics.load(*files)


class _Sums:
    """Collects the sums of one layer through hooks on its router, its experts and its shared expert's gate.

    The hook on the experts sees exactly the input, the choice and the weights that the model uses, for every family.
    """

    def __init__(
        self, layer: nn.Module, *, teacher: StreamedTeacher, index: int, rule: RouterRule, outputs: bool, weights: bool
    ) -> None:
        self.index, self.rule, self.outputs = index, rule, outputs
        self.live: Tensor = torch.empty(0)
        self.logits: Tensor = torch.empty(0)
        self.total: dict[str, Tensor] = {}
        self.checked = False
        self.storage = teacher.family.module_storage
        self.chunk_bytes = CHUNK_BYTES["cuda" if teacher.device.type == "cuda" else "cpu"]
        block = layer.get_submodule(teacher.family.block.format(layer=index).removeprefix(f"model.layers.{index}."))
        self.router, experts = block.get_submodule(teacher.family.router_module), block.get_submodule("experts")
        self.weight_gram = expert_weight_gram(experts) if weights else None
        self.hooks = [
            self.router.register_forward_hook(self._see_router),
            experts.register_forward_pre_hook(self._see_experts),
        ]
        shared = teacher.family.shared
        if shared is not None and shared.gate_module is not None:
            self.hooks.append(block.get_submodule(shared.gate_module).register_forward_hook(self._see_shared_gate))

    def next_batch(self, live: Tensor) -> None:
        """See Watch."""
        self.live = live.flatten()

    def save(self, file: Path) -> None:
        """See Watch."""
        for hook in self.hooks:
            hook.remove()
        sums = {name: value.cpu() for name, value in self.total.items()}
        RoutingStatistics({self.index: LayerStatistics(**sums, weight_gram=self.weight_gram)}).save(file)

    def _add(self, part: dict[str, Tensor]) -> None:
        self.total = self.total | add_sums(({k: v for k, v in self.total.items() if k in part}, part))

    def _see_router(self, module: nn.Module, args: Any, output: Any) -> None:
        self.logits = output[0] if isinstance(output, tuple) else output

    def _see_shared_gate(self, module: nn.Module, args: Any, output: Tensor) -> None:
        gate = output.reshape(-1)[self.live].double().sigmoid()
        self._add({"shared_gate_sum": gate.sum()})

    def _see_experts(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, indices, weights = (tensor.reshape(-1, tensor.shape[-1])[self.live] for tensor in args[:3])
        logits = self.logits.reshape(-1, self.logits.shape[-1])[self.live]
        gates = torch.zeros_like(logits, dtype=torch.float64).scatter_(1, indices, weights.double())
        selected = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, indices, True)
        self._check_rule(logits, gates)
        self._add(router_sums(logits, self.rule.probabilities(logits), gates, selected))
        if self.outputs:
            step = tokens_per_chunk(module, self.storage, self.chunk_bytes)
            for first in range(0, len(hidden), step):
                chunk = slice(first, first + step)
                outputs = expert_outputs(module, self.storage, hidden[chunk])
                self._add(output_sums(outputs, gates[chunk], selected[chunk]))

    def _check_rule(self, logits: Tensor, gates: Tensor) -> None:
        """Once a layer: the family's rule must give the weights that the model gave, ties and rounding aside."""
        if self.checked:
            return
        self.checked = True
        bias = getattr(self.router, "e_score_correction_bias", None)
        indices, weights = self.rule.route(logits, bias)
        expected = torch.zeros_like(gates).scatter_(1, indices, weights.double())
        difference = float((expected - gates).abs().sum(dim=1).mean() / gates.sum(dim=1).mean())
        if not difference < RULE_TOLERANCE:
            raise BurnishError(
                f"layer {self.index}: the model's routing weights differ from {self.rule} by {difference:.1%}:"
                " the family's router rule does not describe this model"
            )


def tokens_per_chunk(experts: nn.Module, storage: Fused, chunk_bytes: int) -> int:
    """Tokens whose outputs of all experts fit into `chunk_bytes`, with what their computation holds beside them."""
    down = _matrices(experts, storage)[1]
    num_experts, width, hidden = down.shape
    return max(1, chunk_bytes // (num_experts * max(4 * width, width + hidden) * down.itemsize))


def expert_outputs(experts: nn.Module, storage: Fused, hidden: Tensor) -> Tensor:
    """f_e(x) of every expert on every token.

    Args:
        experts: the fused experts module of transformers.
        storage: how its tensors are laid out.
        hidden: [tokens, hidden].

    Returns:
        [E, tokens, hidden].
    """
    gate_up, down = _matrices(experts, storage)
    between = hidden @ gate_up  # [E, tokens, 2 * width]
    if storage.gate_up_bias is not None:
        between = between + experts.gate_up_proj_bias.unsqueeze(1)  # type: ignore[operator]
    between = experts._apply_gate(between)  # type: ignore[operator]
    outputs: Tensor = between @ down  # [E, tokens, hidden]
    if storage.down_bias is not None:
        outputs = outputs + experts.down_proj_bias.unsqueeze(1)  # type: ignore[operator]
    return outputs


def expert_weight_gram(experts: nn.Module) -> Tensor:
    """Inner products of the experts' unit-norm flattened weights, [E, E] float64 on the CPU."""
    gram = torch.zeros(())
    for matrix in (experts.gate_up_proj, experts.down_proj):
        for columns in matrix.flatten(1).split(WEIGHT_COLUMNS, dim=1):  # type: ignore[operator]
            part = columns.float()
            gram = gram + (part @ part.mT).double().cpu()
    norm = gram.diagonal().sqrt()
    return gram / torch.outer(norm, norm)


def _matrices(experts: nn.Module, storage: Fused) -> tuple[Tensor, Tensor]:
    """gate_up [E, hidden, 2 * width] and down [E, width, hidden], ready to be multiplied from the right."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    return (gate_up, down) if storage.transposed else (gate_up.mT, down.mT)
