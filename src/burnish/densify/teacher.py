"""Run a teacher layer by layer: one layer's weights and the hidden states are all that is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from burnish.checkpoint import Checkpoint
from burnish.errors import CheckpointError
from burnish.families import ExpertStorage, Family, MoEShape
from burnish.families.family import Config
from burnish.runs import return_freed_memory


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


class StreamedTeacher:
    """A teacher whose decoder layers are loaded one at a time.

    The model's own code embeds the tokens and prepares masks and positions (its layers are replaced by recorders for
    that), and its own layers compute; nothing of a family's arithmetic is written again here.

    Args:
        checkpoint: the teacher.
        family: its family.
        config: its resolved config.
        storage: how its experts lie on disk.
        device: where layers compute.
        dtype: in which type.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        config: Config,
        storage: ExpertStorage,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        self.checkpoint, self.family, self.storage = checkpoint, family, storage
        self.shape: MoEShape = family.shape(config)
        self.device, self.dtype = device, dtype
        settings = {key: value for key, value in config.items() if key != "model_type"}
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family.model_type](**settings), dtype=dtype)
        self.decoder = model.model.eval()
        self.layers = list(self.decoder.layers)
        self.decoder.layers = nn.ModuleList(_Recorder(layer) for layer in self.layers)
        self.decoder.norm = nn.Identity()
        for buffer_owner in self.decoder.children():
            if not list(buffer_owner.parameters()):
                buffer_owner.to(device)  # rotary embeddings: the only buffers outside the layers
        self._disk_names = {family.module_name(name): name for name in checkpoint.tensors}

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
        with self._loaded(self.layers[index], f"model.layers.{index}.", index):
            yield self.layers[index]

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str, layer: int | None = None) -> Iterator[None]:
        state: dict[str, Tensor] = {}
        fused = {}
        if layer in self.shape.moe_layers:
            fused = self.family.module_storage.tensors(
                layer, self.shape.num_experts, self.shape.hidden_size, self.shape.expert_width
            )
        for name in module.state_dict():
            full = prefix + name
            if full in fused:
                assert layer is not None
                state[name] = self._fused_experts(layer, full, fused[full])
            else:
                disk_name = self._disk_names.get(full)
                if disk_name is None:
                    raise CheckpointError(f"{self.checkpoint.path}: tensor {full} is missing")
                state[name] = self.checkpoint.read(disk_name).to(self.device, self.dtype)
        module.load_state_dict(state, strict=True, assign=True)
        state.clear()
        try:
            yield
        finally:
            module.to("meta")
            return_freed_memory()

    def _fused_experts(self, layer: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """All experts of a layer in the 3-D form that transformers computes with, whatever the form on disk."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        module_storage = self.family.module_storage
        pieces = module_storage.pieces(layer, 0)[name]
        for expert in range(self.shape.num_experts):

            def part(name: str, expert: int = expert) -> Tensor:
                return self.storage.read(self.checkpoint, layer, expert, name)

            out[expert] = module_storage.compose(pieces, part).to(self.device, self.dtype)
        return out
