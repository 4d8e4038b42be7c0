"""Observe: stream a teacher over calibration tokens and reduce what its routers and experts do to sums."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.densify.statistics import LayerStatistics, RoutingStatistics, add_sums, output_sums, router_sums
from burnish.densify.teacher import StreamedTeacher
from burnish.errors import BurnishError, CheckpointError
from burnish.families import Fused, RouterRule

CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
WEIGHT_COLUMNS = 2**16
RULE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens: `input_ids` [sequences, length] int64, `attention_mask` the same, bool, True = real."""

    input_ids: Tensor
    attention_mask: Tensor


class HiddenStates:
    """The hidden states of all calibration sequences at one layer boundary, in a file.

    The page cache keeps it in memory where there is room, the disk holds it where there is not, and a run that was
    killed finds it again.

    Args:
        file: where.
        shape: [sequences, length, hidden].
        dtype: of the hidden states.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.file, self.shape, self.dtype = file, shape, dtype
        self.row_bytes = shape[1] * shape[2] * dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Hidden states [stop - start, length, hidden]."""
        buffer = torch.empty((stop - start) * self.row_bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(start * self.row_bytes)
            if stream.readinto(buffer.numpy().data) != len(buffer):
                raise CheckpointError(f"{self.file}: truncated: delete it and start anew")
        return buffer.view(self.dtype).view(stop - start, *self.shape[1:])

    def write(self, batches: Iterator[Tensor]) -> None:
        """Write consecutive batches; the file has its name only when all are on disk."""
        partial = self.file.with_name(self.file.name + ".partial")
        with partial.open("wb", buffering=0) as stream:
            for batch in batches:
                view = batch.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
                while view:
                    view = view[stream.write(view) :]
            os.fsync(stream.fileno())
        partial.replace(self.file)


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

    Layer by layer: load the layer, run all sequences through it, keep the sums and the hidden states, release it.
    Finished layers are found again in `work` when the run is repeated.

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
    work.mkdir(parents=True, exist_ok=True)
    batches = _batches(len(calibration.input_ids), batch_size)
    shape = (*calibration.input_ids.shape, teacher.shape.hidden_size)
    states = [
        HiddenStates(work / f"hidden-{index:04d}.bin", shape, teacher.dtype)
        for index in range(teacher.shape.num_layers + 1)
    ]
    last = max(teacher.shape.moe_layers)
    start = _first_unfinished(teacher, states, work)
    padded = not bool(calibration.attention_mask.all())
    with torch.inference_mode():
        kwargs = _prepare(teacher, calibration, batches, padded, states[0], write=start == 0)
        advance(start * len(batches))
        for index in range(start, last + 1):
            sums = _Sums(rule, outputs)
            with teacher.layer(index) as layer:
                is_moe = index in teacher.shape.moe_layers
                if is_moe:
                    sums.attach(layer, teacher, index)
                states[index + 1].write(
                    _run_layer(layer, teacher, calibration, batches, states[index], kwargs, index, sums, advance)
                )
                if is_moe:
                    record = sums.record(expert_weight_gram(layer, teacher, index) if weights else None)
                    RoutingStatistics({index: record}).save(work / f"layer-{index:04d}.safetensors")
            states[index].file.unlink(missing_ok=True)
    layers: dict[int, LayerStatistics] = {}
    for index in teacher.shape.moe_layers:
        layers |= RoutingStatistics.load(work / f"layer-{index:04d}.safetensors").layers
    return RoutingStatistics(layers)


def _first_unfinished(teacher: StreamedTeacher, states: list[HiddenStates], work: Path) -> int:
    """The first layer that is not done: its input must be on disk, and the records of all MoE layers before it."""
    recorded = 0
    while recorded <= max(teacher.shape.moe_layers) and (
        recorded not in teacher.shape.moe_layers or (work / f"layer-{recorded:04d}.safetensors").exists()
    ):
        recorded += 1
    return next((index for index in range(recorded, 0, -1) if states[index].file.exists()), 0)


def _batches(num_sequences: int, batch_size: int) -> list[slice]:
    return [slice(start, min(start + batch_size, num_sequences)) for start in range(0, num_sequences, batch_size)]


def _prepare(
    teacher: StreamedTeacher,
    calibration: Calibration,
    batches: list[slice],
    padded: bool,
    states: HiddenStates,
    *,
    write: bool,
) -> list[list[dict[str, Any]]]:
    """Embed all batches, and keep how the model calls its layers for each; batches of one shape share one record."""
    shared: dict[int, list[dict[str, Any]]] = {}
    kwargs: list[list[dict[str, Any]]] = []

    def embedded() -> Iterator[Tensor]:
        for batch in batches:
            ids = calibration.input_ids[batch].to(teacher.device)
            mask = calibration.attention_mask[batch].to(teacher.device) if padded else None
            if not write and not padded and len(ids) in shared:
                kwargs.append(shared[len(ids)])
                continue
            hidden, calls = teacher.start(ids, mask)
            kwargs.append(calls if padded else shared.setdefault(len(ids), calls))
            yield hidden

    with teacher.embedding():
        if write:
            states.write(embedded())
        else:
            for _ in embedded():
                pass
    return kwargs


def _run_layer(
    layer: nn.Module,
    teacher: StreamedTeacher,
    calibration: Calibration,
    batches: list[slice],
    states: HiddenStates,
    kwargs: list[list[dict[str, Any]]],
    index: int,
    sums: _Sums,
    advance: Callable[[int], None],
) -> Iterator[Tensor]:
    for batch, calls in zip(batches, kwargs, strict=True):
        sums.live = calibration.attention_mask[batch].flatten().to(teacher.device)
        hidden = states.read(batch.start, batch.stop).to(teacher.device)
        output = layer(hidden, **calls[index])
        yield output[0] if isinstance(output, tuple) else output
        advance(1)


class _Sums:
    """Collects the sums of one layer through hooks on its router, its experts and its shared expert's gate.

    The hook on the experts sees exactly the input, the choice and the weights that the model uses, for every family.
    """

    def __init__(self, rule: RouterRule, outputs: bool) -> None:
        self.rule, self.outputs = rule, outputs
        self.live: Tensor = torch.empty(0)
        self.logits: Tensor = torch.empty(0)
        self.total: dict[str, Tensor] = {}
        self.checked = False

    def attach(self, layer: nn.Module, teacher: StreamedTeacher, index: int) -> None:
        """Register the hooks; `record` removes them."""
        self.storage, self.place = teacher.family.module_storage, f"layer {index}"
        self.chunk_bytes = CHUNK_BYTES["cuda" if teacher.device.type == "cuda" else "cpu"]
        block = layer.get_submodule(teacher.family.block.format(layer=index).removeprefix(f"model.layers.{index}."))
        self.router = block.get_submodule(teacher.family.router_module)
        self.hooks = [
            self.router.register_forward_hook(self._see_router),
            block.get_submodule("experts").register_forward_pre_hook(self._see_experts),
        ]
        shared = teacher.family.shared
        if shared is not None and shared.gate_module is not None:
            self.hooks.append(block.get_submodule(shared.gate_module).register_forward_hook(self._see_shared_gate))

    def record(self, weight_gram: Tensor | None) -> LayerStatistics:
        """The sums of all batches, on the CPU; removes the hooks, which would keep the last batch alive."""
        for hook in self.hooks:
            hook.remove()
        sums = {name: value.cpu() for name, value in self.total.items()}
        return LayerStatistics(**sums, weight_gram=weight_gram)

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
                f"{self.place}: the model's routing weights differ from {self.rule} by {difference:.1%}:"
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


def expert_weight_gram(layer: nn.Module, teacher: StreamedTeacher, index: int) -> Tensor:
    """Inner products of the experts' unit-norm flattened weights, [E, E] float64 on the CPU."""
    block = layer.get_submodule(teacher.family.block.format(layer=index).removeprefix(f"model.layers.{index}."))
    experts = block.get_submodule("experts")
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
