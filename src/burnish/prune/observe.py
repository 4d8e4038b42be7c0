"""Observe: stream a dense model over calibration tokens and reduce the activations of each layer to sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.families.streaming import Calibration, StreamedModel, stream
from burnish.prune.statistics import ActivationStatistics, LayerStatistics, cosine_sum, magnitude_squares

INPUT_OF = {"neurons": "mlp.down_proj", "head_channels": "self_attn.o_proj"}
OUTPUT_OF = {"attention_channels": "input_layernorm", "feed_forward_channels": "post_attention_layernorm"}
"""Which module's input or output each sum of squares looks at."""


def observe(
    model: StreamedModel,
    calibration: Calibration,
    *,
    batch_size: int,
    work: Path,
    advance: Callable[[int], None] = lambda batches: None,
) -> ActivationStatistics:
    """Statistics of every layer over the calibration tokens; arguments as for `stream`.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    watches = {index: partial(_Sums, index) for index in range(len(model.layers))}
    files = stream(model, calibration, watches, batch_size=batch_size, work=work, advance=advance)
    return ActivationStatistics.load(*files)


class _Sums:
    """Collects the sums of one layer through hooks on the layer and four of its modules."""

    def __init__(self, index: int, layer: nn.Module) -> None:
        self.index = index
        self.live = torch.empty(0)
        self.total: dict[str, Tensor] = {}
        self.hooks = [layer.register_forward_hook(self._see_layer)]
        for name, path in INPUT_OF.items():
            self.hooks.append(layer.get_submodule(path).register_forward_pre_hook(partial(self._see_input, name)))
        for name, path in OUTPUT_OF.items():
            self.hooks.append(layer.get_submodule(path).register_forward_hook(partial(self._see_output, name)))

    def next_batch(self, live: Tensor) -> None:
        """See Watch."""
        self.live = live
        self._add("num_sequences", live.any(dim=1).sum())
        self._add("num_tokens", live.sum())

    def save(self, file: Path) -> None:
        """See Watch."""
        for hook in self.hooks:
            hook.remove()
        sums = LayerStatistics(**{name: value.cpu() for name, value in self.total.items()})
        ActivationStatistics({self.index: sums}).save(file)

    def _add(self, name: str, value: Tensor) -> None:
        self.total[name] = self.total[name] + value if name in self.total else value

    def _see_layer(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        self._add("cosine_sum", cosine_sum(args[0], after, self.live))

    def _see_input(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._add(name, magnitude_squares(args[0], self.live))

    def _see_output(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._add(name, magnitude_squares(output, self.live))
