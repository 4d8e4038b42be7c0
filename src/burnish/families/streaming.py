"""Run a model over text layer by layer: one layer's weights and one batch are all that is in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from burnish.checkpoint import Checkpoint
from burnish.errors import CheckpointError
from burnish.families.family import Config
from burnish.runs import return_freed_memory


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens: `input_ids` [sequences, length] int64, `attention_mask` the same, bool, True = real."""

    input_ids: Tensor
    attention_mask: Tensor


class Watch(Protocol):
    """Sees one layer at work through hooks of its own, and reduces what it sees to a record."""

    def next_batch(self, live: Tensor) -> None:
        """A batch comes; `live` [batch, seq] bool is True where a token is real."""

    def save(self, file: Path) -> None:
        """After the last batch: remove the hooks, which would keep it alive, and write the record."""


class _Recorder(nn.Module):
    """Stands in the place of a decoder layer and records how the model calls it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(original, "attention_type", None)
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states


class StreamedModel:
    """A model whose decoder layers are loaded one at a time.

    The model's own code embeds the tokens and prepares masks and positions (its layers are replaced by recorders for
    that), and its own layers compute; nothing of a family's arithmetic is written again here.

    Args:
        checkpoint: the model.
        config: its resolved config.
        device: where layers compute.
        dtype: in which type.
        module_name: the state-dict name of a tensor by its name on disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        *,
        device: torch.device,
        dtype: torch.dtype,
        module_name: Callable[[str], str] = str,
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.hidden_size = int(config["hidden_size"])
        settings = {key: value for key, value in config.items() if key != "model_type"}
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**settings), dtype=dtype)
        self.decoder = model.model.eval()
        self.layers = list(self.decoder.layers)
        self.decoder.layers = nn.ModuleList(_Recorder(layer) for layer in self.layers)
        self.decoder.norm = nn.Identity()
        for buffer_owner in self.decoder.children():
            if not list(buffer_owner.parameters()):
                buffer_owner.to(device)  # rotary embeddings: the only buffers outside the layers
        self._disk_names = {module_name(name): name for name in checkpoint.tensors}

    @contextmanager
    def embedding(self) -> Iterator[nn.Module]:
        """The decoder with its embedding loaded, for `start`."""
        with self._loaded(self.decoder.embed_tokens, "model.embed_tokens."):
            yield self.decoder

    def start(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, list[dict[str, Any]]]:
        """Embed a batch.

        Args:
            input_ids: [batch, seq] int64.
            attention_mask: [batch, seq] bool, None when every token is real.

        Returns:
            Hidden states [batch, seq, hidden], and the keyword arguments of each layer for batches of this mask.
        """
        mask = None if attention_mask is None else attention_mask.long()
        self.decoder(input_ids=input_ids, attention_mask=mask, use_cache=False)
        recorders = list(self.decoder.layers)
        hidden = recorders[0].hidden
        return hidden, [recorder.kwargs for recorder in recorders]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights loaded; they are released on exit."""
        with self._loaded(self.layers[index], f"model.layers.{index}."):
            yield self.layers[index]

    def read(self, name: str) -> Tensor:
        """The tensor of a state-dict name, on the device and in the type that layers compute in.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        disk_name = self._disk_names.get(name)
        if disk_name is None:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name} is missing")
        return self.checkpoint.read(disk_name).to(self.device, self.dtype)

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str) -> Iterator[None]:
        state = {name: self.read(prefix + name) for name in module.state_dict()}
        module.load_state_dict(state, strict=True, assign=True)
        state.clear()
        try:
            yield
        finally:
            module.to("meta")
            return_freed_memory()


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


def stream(
    model: StreamedModel,
    calibration: Calibration,
    watches: Mapping[int, Callable[[nn.Module], Watch]],
    *,
    batch_size: int,
    work: Path,
    advance: Callable[[int], None] = lambda batches: None,
) -> list[Path]:
    """Run calibration tokens through a model up to its last watched layer; gives each watched layer's record file.

    Layer by layer: load the layer, run all sequences through it, keep the record and the hidden states, release it.
    Finished layers are found again in `work` when the run is repeated.

    Args:
        model: the streamed model.
        calibration: tokens.
        watches: what to do with each layer that is watched: made of the loaded layer, asked to save at its end.
        batch_size: sequences per forward pass.
        work: directory for finished layers and hidden states.
        advance: called with 1 after each batch of each layer.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    work.mkdir(parents=True, exist_ok=True)
    records = {index: work / f"layer-{index:04d}.safetensors" for index in sorted(watches)}
    batches = _batches(len(calibration.input_ids), batch_size)
    shape = (*calibration.input_ids.shape, model.hidden_size)
    states = [HiddenStates(work / f"hidden-{index:04d}.bin", shape, model.dtype) for index in range(max(watches) + 2)]
    start = _first_unfinished(records, states)
    padded = not bool(calibration.attention_mask.all())
    with torch.inference_mode():
        kwargs = _prepare(model, calibration, batches, padded, states[0], write=start == 0)
        advance(start * len(batches))
        for index in range(start, max(watches) + 1):
            with model.layer(index) as layer:
                watch = watches[index](layer) if index in watches else None
                states[index + 1].write(
                    _run_layer(layer, model, calibration, batches, states[index], kwargs, index, watch, advance)
                )
                if watch is not None:
                    watch.save(records[index])
            states[index].file.unlink(missing_ok=True)
    return list(records.values())


def _first_unfinished(records: Mapping[int, Path], states: list[HiddenStates]) -> int:
    """The first layer that is not done: its input must be on disk, and the records of all layers before it."""
    done = next((index for index, file in records.items() if not file.exists()), max(records) + 1)
    return next((index for index in range(done, 0, -1) if states[index].file.exists()), 0)


def _batches(num_sequences: int, batch_size: int) -> list[slice]:
    return [slice(start, min(start + batch_size, num_sequences)) for start in range(0, num_sequences, batch_size)]


def _prepare(
    model: StreamedModel,
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
            ids = calibration.input_ids[batch].to(model.device)
            mask = calibration.attention_mask[batch].to(model.device) if padded else None
            if not write and not padded and len(ids) in shared:
                kwargs.append(shared[len(ids)])
                continue
            hidden, calls = model.start(ids, mask)
            kwargs.append(calls if padded else shared.setdefault(len(ids), calls))
            yield hidden

    with model.embedding():
        if write:
            states.write(embedded())
        else:
            for _ in embedded():
                pass
    return kwargs


def _run_layer(
    layer: nn.Module,
    model: StreamedModel,
    calibration: Calibration,
    batches: list[slice],
    states: HiddenStates,
    kwargs: list[list[dict[str, Any]]],
    index: int,
    watch: Watch | None,
    advance: Callable[[int], None],
) -> Iterator[Tensor]:
    for batch, calls in zip(batches, kwargs, strict=True):
        if watch is not None:
            watch.next_batch(calibration.attention_mask[batch].to(model.device))
        hidden = states.read(batch.start, batch.stop).to(model.device)
        output = layer(hidden, **calls[index])
        yield output[0] if isinstance(output, tuple) else output
        advance(1)
