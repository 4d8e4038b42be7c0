"""A Mixture-of-Experts teacher, streamed: its experts are composed from whatever form they have on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.checkpoint import Checkpoint
from burnish.families import ExpertStorage, Family, MoEShape
from burnish.families.family import Config
from burnish.families.streaming import StreamedModel


class StreamedTeacher(StreamedModel):
    """A streamed model whose experts are read into the 3-D form that transformers computes with.

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
        super().__init__(checkpoint, config, device=device, dtype=dtype, module_name=family.module_name)
        self.family, self.storage = family, storage
        self.shape: MoEShape = family.shape(config)
        sizes = (self.shape.num_experts, self.shape.hidden_size, self.shape.expert_width)
        self._fused = {
            name: (layer, shape)
            for layer in self.shape.moe_layers
            for name, shape in family.module_storage.tensors(layer, *sizes).items()
        }

    def read(self, name: str) -> Tensor:
        """See StreamedModel; all experts of a layer at once where `name` holds them."""
        if name not in self._fused:
            return super().read(name)
        layer, shape = self._fused[name]
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        module_storage = self.family.module_storage
        pieces = module_storage.pieces(layer, 0)[name]
        for expert in range(self.shape.num_experts):

            def part(name: str, expert: int = expert) -> Tensor:
                return self.storage.read(self.checkpoint, layer, expert, name)

            out[expert] = module_storage.compose(pieces, part).to(self.device, self.dtype)
        return out
