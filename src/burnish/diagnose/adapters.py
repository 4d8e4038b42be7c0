"""Observe the LoRA adapters of a model while it trains, in a Hugging Face `Trainer` or in a loop of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from burnish.diagnose.course import append, continue_at
from burnish.diagnose.spectrum import AdapterSpectrum, lora_singular_values
from burnish.errors import TrainingError

SPECTRUM_FILE = "spectrum.jsonl"
WRAPPERS = re.compile(
    r"^((module|_orig_mod)\.)*(base_model\.model\.)?"
    r"|(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)(\.|$)"
)
"""Parts of a module's name that say how it was wrapped: around the whole model, and anywhere in it."""


def adapter_spectra(model: nn.Module, adapter: str = "default") -> tuple[AdapterSpectrum, ...]:
    """Singular values of what each LoRA layer adds, in the order of the model's modules.

    Layers are recognised by the attributes that PEFT gives them, so that PEFT itself is not needed: linear ones
    (rsLoRA, DoRA and other scales and starts included), embeddings, convolutions (as the matrix [out, everything
    else]) and stacks of experts, each expert by itself. Sharded factors are gathered: call it on every rank.

    Args:
        model: with adapters in it, wrapped or not.
        adapter: the name under which the adapter was added.

    Raises:
        ValueError: no layer has this adapter, or its factors are not two matrices (such as AdaLoRA's) or not here
            (partitioned by ZeRO-3).
        TrainingError: a factor holds values that are not finite.
    """
    found = tuple(spectrum for name, layer in _layers(model) for spectrum in _spectra(name, layer, adapter))
    if not found:
        names = sorted({key for _, layer in _layers(model) for key in layer.scaling})
        known = f"its adapters are {', '.join(names)}" if names else "it has no LoRA layer: add one with PEFT"
        raise ValueError(f"adapter={adapter!r} is nowhere in the model: {known}")
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "scaling"):
            yield name, module


def _spectra(name: str, layer: Any, adapter: str) -> Iterator[AdapterSpectrum]:
    factors = _factors(name, layer, adapter)
    if factors is None:
        return
    name = WRAPPERS.sub("", name).removesuffix(".")
    if hasattr(layer, "parameter_name"):  # PEFT wraps a bare parameter of a module
        name = f"{name}.{layer.parameter_name}"
    scale, dora = float(layer.scaling[adapter]), adapter in getattr(layer, "lora_magnitude_vector", {})
    if not all(factor.isfinite().all() for factor in factors):
        raise TrainingError(f"{name}: the factors of adapter {adapter!r} hold values that are not finite")
    values = lora_singular_values(*factors, scale)
    for expert, row in enumerate(values.view(-1, values.shape[-1]).tolist()):
        yield AdapterSpectrum(name if values.dim() == 1 else f"{name}.{expert}", tuple(row), scale, dora)


def _factors(name: str, layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """B `[out, r]` and A `[r, in]`, or of a stack `[experts, out, r]` and `[experts, r, in]`; on the CPU."""
    if adapter in getattr(layer, "lora_embedding_A", ()):
        second, first = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    elif adapter not in layer.lora_A:
        return None
    elif not (hasattr(layer.lora_A[adapter], "weight") and hasattr(layer.lora_B[adapter], "weight")):
        raise ValueError(f"{name}: {type(layer).__name__} is not LoRA with two factors: expected lora_A and lora_B")
    else:
        second, first = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    b, a = _whole(second), _whole(first)
    if not (a.numel() and b.numel()):
        raise ValueError(f"{name}: the factors of adapter {adapter!r} are empty here: gather ZeRO-3 partitions first")
    b, a = b.flatten(1), a.flatten(1)
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:  # A is [experts * r, in], B is [out, r * experts]
        b = b.view(len(b), -1, experts).permute(2, 0, 1)
        a = a.view(experts, -1, a.shape[1])
    return b, a


def _whole(factor: Tensor) -> Tensor:
    """A parameter, gathered where it is sharded, in memory where any device's float64 works."""
    factor = factor.detach()
    gather = getattr(factor, "full_tensor", None)
    return (factor if gather is None else gather()).to("cpu", torch.float64)


class SpectrumTracker(TrainerCallback):  # type: ignore[misc]
    """Writes the spectra of all adapters to `spectrum.jsonl`, a line an adapter and measurement, as training goes.

    As a callback of `transformers.Trainer` it measures at the start, every so many steps and at the end. A resumed
    training goes on in its file, from the checkpoint's step.

    Args:
        directory: for `spectrum.jsonl`, such as the run directory.
        every: steps between measurements.
        adapter: the name under which the adapter was added.
        overwrite: let a training from step 0 replace the file of an earlier one.

    Raises:
        ValueError: `every` below 1.

    Examples:
        >>> Trainer(model, args, callbacks=[SpectrumTracker(args.output_dir, every=20)]).train()  # doctest: +SKIP
        >>> tracker = SpectrumTracker("run")  # doctest: +SKIP
        >>> tracker.measure(model, step)  # in a loop of one's own  # doctest: +SKIP
    """

    def __init__(
        self, directory: str | Path, *, every: int = 10, adapter: str = "default", overwrite: bool = False
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: expected 1 or more steps")
        self.file = Path(directory) / SPECTRUM_FILE
        self.every, self.adapter, self.overwrite = every, adapter, overwrite
        self._last: int | None = None

    def measure(self, model: nn.Module, step: int, *, write: bool = True) -> tuple[AdapterSpectrum, ...]:
        """The spectra now, added to the file.

        Args:
            model: with the adapter in it.
            step: of the training, larger than at the last measurement.
            write: False on all processes but one.

        Raises:
            ValueError, TrainingError: as `adapter_spectra`; or steps that do not ascend.
            OutputError: the first measurement is of step 0, and the file of an earlier training is there.
        """
        if self._last is not None and step <= self._last:
            raise ValueError(f"step={step} after step {self._last}: expected ascending steps")
        spectra = adapter_spectra(model, self.adapter)
        if write:
            if self._last is None:
                continue_at(self.file, step, overwrite=self.overwrite)
            append(self.file, (spectrum.line(step) for spectrum in spectra))
        self._last = step
        return spectra

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the start, or the checkpoint that is resumed."""
        self._last = None
        self.measure(model, state.global_step, write=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure every so many steps."""
        if state.global_step % self.every == 0:
            self.measure(model, state.global_step, write=state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the end, unless that was just done."""
        if self._last != state.global_step:
            self.measure(model, state.global_step, write=state.is_world_process_zero)
