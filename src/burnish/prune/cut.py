"""Act: cut each tensor down to the rows and columns that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.checkpoint import Checkpoint, PlannedTensor
from burnish.checkpoint.tensors import has_values, torch_dtype
from burnish.errors import OutputError
from burnish.prune.layout import Axis, DenseModel, Sizes, axes_of, layer_of
from burnish.prune.plan import PrunePlan

PIECE_BYTES = 64 * 2**20
"""Rows of a source tensor in memory at a time."""


@dataclass(frozen=True)
class Student:
    """The structure of a pruned model.

    Attributes:
        config: content of its `config.json`.
        tensors: all of them.
        sources: output name -> the tensor of the source that it is cut from, cast from or a copy of.
        cut: tensors of the source that lose rows or columns.
        copied: those that stay as they are, or only change type.
        dropped: those that go: of layers that do not stay, and redundant ones.
    """

    config: dict[str, Any]
    tensors: tuple[PlannedTensor, ...]
    sources: dict[str, str]
    cut: tuple[str, ...]
    copied: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def describe_student(
    model: DenseModel, target: Sizes, layers: tuple[int, ...] | None = None, dtype: str | None = None
) -> Student:
    """The structure that a model has when it is pruned.

    Args:
        model: what is pruned.
        target: to which sizes.
        layers: those that stay; None where only counts and bytes are wanted: the first ones.
        dtype: safetensors type of all tensors; None keeps each as it is.
    """
    layers = tuple(range(target.layers)) if layers is None else layers
    position = {layer: index for index, layer in enumerate(layers)}
    tensors: list[PlannedTensor] = []
    sources: dict[str, str] = {}
    cut: list[str] = []
    copied: list[str] = []
    dropped = list(model.redundant)
    for name in model.names():
        info, layer = model.checkpoint.info(name), layer_of(name)
        if layer is not None and layer not in position:
            dropped.append(name)
            continue
        new = name if layer is None else name.replace(f".{layer}.", f".{position[layer]}.", 1)
        shape, type_name = model.shape_at(name, target), dtype or info.dtype
        whole = shape == info.shape
        sources[new] = name
        (copied if whole else cut).append(name)
        tensors.append(PlannedTensor(new, type_name, shape, name if whole and type_name == info.dtype else None))
    return Student(
        model.config_at(target, layers, dtype), tuple(tensors), sources, tuple(cut), tuple(copied), tuple(dropped)
    )


def cutter(model: DenseModel, plan: PrunePlan, student: Student) -> Callable[[PlannedTensor], Tensor]:
    """The function that computes each tensor of the pruned model that is not a plain copy.

    Args:
        model: what is pruned.
        plan: what stays.
        student: the structure of the output.
    """
    layers = {layer.layer: layer for layer in plan.layers}

    def compute(planned: PlannedTensor) -> Tensor:
        name = student.sources[planned.name]
        layer = layer_of(name)
        kept = {Axis.HIDDEN: torch.tensor(plan.hidden)}
        if layer is not None:
            heads, neurons = torch.tensor(layers[layer].heads), torch.tensor(layers[layer].neurons)
            kept |= {
                Axis.NEURONS: neurons,
                Axis.HEADS: channels_of(heads, model.head_dim),
                Axis.KV_HEADS: channels_of(torch.unique(heads // model.sizes.group), model.head_dim),
            }
        return remaining(model.checkpoint, name, [kept.get(axis) for axis in axes_of(name)], torch_dtype(planned.dtype))

    return compute


def channels_of(heads: Tensor, head_dim: int) -> Tensor:
    """Indices of all channels of some heads."""
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def remaining(source: Checkpoint, name: str, kept: list[Tensor | None], dtype: torch.dtype) -> Tensor:
    """The rows and columns of a tensor that stay; its source is never in memory whole.

    Args:
        source: where it is read.
        name: which tensor.
        kept: ascending indices for each dimension; None keeps all of it.
        dtype: of the result.

    Raises:
        OutputError: nothing but zeros would be left of a tensor that has other values.
    """
    info = source.info(name)
    rows = torch.arange(info.shape[0]) if kept[0] is None else kept[0]
    columns = [] if len(kept) == 1 else [info.shape[1] if kept[1] is None else len(kept[1])]
    out = torch.empty([len(rows), *columns], dtype=dtype)
    done = 0
    for start, piece in _pieces(source, name):
        chosen = rows[(rows >= start) & (rows < start + len(piece))] - start
        part = piece if len(chosen) == len(piece) else piece[chosen]
        if len(kept) == 2 and kept[1] is not None:
            part = part[:, kept[1]]
        out[done : done + len(part)] = part
        done += len(part)
    if not has_values(out) and any(has_values(piece) for _, piece in _pieces(source, name)):
        raise OutputError(f"tensor {name}: only zeros stay of it: the plan keeps what does nothing")
    return out


def _pieces(source: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor's rows, some at a time, each with the index of the first."""
    info = source.info(name)
    step = max(1, PIECE_BYTES * info.shape[0] // max(1, info.nbytes))
    for start in range(0, info.shape[0], step):
        yield start, source.read(name, rows=slice(start, start + step))
