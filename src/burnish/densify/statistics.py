"""What was seen of a Mixture-of-Experts model: sums over calibration tokens, so that two records merge exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from burnish.errors import CheckpointError

FORMAT = "burnish.routing-statistics/1"
DOUBLE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Expert outputs held in float64 at a time: on a CPU they should stay in its cache."""


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the calibration tokens of one MoE layer with E experts; float64, counts int64.

    In the names of the docstrings: p is the router probability before the top-k cut, T the chosen experts, g the
    weight that the model uses (0 outside T), f_e the output of expert e, y = sum_e g_e f_e the routed block output.

    Attributes:
        num_tokens: [] int64, N.
        counts: [E] int64, tokens that chose e.
        probability_sum: [E], sum of p_e.
        selected_probability_sum: [E], sum of p_e over the tokens that chose e.
        gate_sum: [E], sum of g_e.
        logit_gram: [E, E], sum of z_i z_j of the router logits z.
        shared_gate_sum: [], sum of the shared expert's gate; None without one.
        gram: [E, E], sum of <f_i, f_j> over all tokens; None in router-only records, as are the next four.
        cross: [E], sum of <f_e, y>.
        output_energy: [], sum of ||y||^2.
        routed_norm_sum: [E], sum of ||f_e|| over the tokens that chose e.
        gated_norm_sum: [E], sum of g_e ||f_e||.
        weight_gram: [E, E], inner products of the experts' unit-norm flattened weights; None unless asked for. A
            property of the model and not a sum: merging keeps it.
    """

    num_tokens: Tensor
    counts: Tensor
    probability_sum: Tensor
    selected_probability_sum: Tensor
    gate_sum: Tensor
    logit_gram: Tensor
    shared_gate_sum: Tensor | None = None
    gram: Tensor | None = None
    cross: Tensor | None = None
    output_energy: Tensor | None = None
    routed_norm_sum: Tensor | None = None
    gated_norm_sum: Tensor | None = None
    weight_gram: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)

    def tensors(self) -> dict[str, Tensor]:
        """The sums that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __add__(self, other: Self) -> Self:
        """The record of both sets of tokens.

        Raises:
            ValueError: the records hold different statistics or different numbers of experts.
        """
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys() or self.num_experts != other.num_experts:
            raise ValueError(f"statistics differ in kind: {sorted(mine)} and {sorted(theirs)}")
        merged = {name: mine[name] if name == "weight_gram" else mine[name] + theirs[name] for name in mine}
        return type(self)(**merged)


@dataclass(frozen=True)
class RoutingStatistics:
    """The record of a whole model: layer index -> LayerStatistics."""

    layers: dict[int, LayerStatistics]

    def __add__(self, other: Self) -> Self:
        """The record of both sets of tokens; exact, so that shards and machines add up."""
        if self.layers.keys() != other.layers.keys():
            raise ValueError(f"statistics cover different layers: {list(self.layers)} and {list(other.layers)}")
        return type(self)({layer: stats + other.layers[layer] for layer, stats in self.layers.items()})

    @property
    def num_tokens(self) -> int:
        """Calibration tokens seen by the first layer (by all of them)."""
        return int(next(iter(self.layers.values())).num_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(tensor.nbytes for stats in self.layers.values() for tensor in stats.tensors().values())

    def unused_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) pairs that no calibration token chose."""
        return [
            (layer, int(expert)) for layer, stats in self.layers.items() for expert in (stats.counts == 0).nonzero()
        ]

    def save(self, file: Path) -> None:
        """Write one safetensors file; tensors are named `layers.<layer>.<sum>`."""
        tensors = {
            f"layers.{layer}.{name}": tensor.contiguous()
            for layer, stats in self.layers.items()
            for name, tensor in stats.tensors().items()
        }
        partial = file.with_name(file.name + ".partial")
        partial.write_bytes(save(tensors, metadata={"format": FORMAT}))
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or of another format.
        """
        layers: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(file, framework="pt") as stored:
                if (stored.metadata() or {}).get("format") != FORMAT:
                    raise CheckpointError(f"{file}: holds no routing statistics ({FORMAT})")
                for key in stored.keys():  # noqa: SIM118 (not a mapping)
                    _, layer, name = key.split(".")
                    layers.setdefault(int(layer), {})[name] = stored.get_tensor(key)
            return cls({layer: LayerStatistics(**layers[layer]) for layer in sorted(layers)})
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as routing statistics ({error})") from error


def router_sums(logits: Tensor, probabilities: Tensor, gates: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """The router's part of LayerStatistics for some tokens.

    Args:
        logits, probabilities: [tokens, E].
        gates: [tokens, E], the weight used, 0 for experts that were not chosen.
        selected: [tokens, E] bool.
    """
    logits, probabilities = logits.double(), probabilities.double()
    return {
        "num_tokens": torch.tensor(len(logits), device=logits.device),
        "counts": selected.sum(dim=0),
        "probability_sum": probabilities.sum(dim=0),
        "selected_probability_sum": (probabilities * selected).sum(dim=0),
        "gate_sum": gates.double().sum(dim=0),
        "logit_gram": logits.mT @ logits,
    }


def output_sums(outputs: Tensor, gates: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """The all-expert part of LayerStatistics for some tokens.

    Args:
        outputs: [E, tokens, hidden], f_e of every expert on every token.
        gates: [tokens, E], the weight used, 0 for experts that were not chosen.
        selected: [tokens, E] bool.
    """
    num_experts, num_tokens, hidden = outputs.shape
    step = max(1, DOUBLE_BYTES["cuda" if outputs.is_cuda else "cpu"] // (8 * num_experts * hidden))
    return add_sums(
        _output_sums(outputs[:, first : first + step], gates[first : first + step], selected[first : first + step])
        for first in range(0, max(1, num_tokens), step)
    )


def _output_sums(outputs: Tensor, gates: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """Each token's Gram matrix gives all the sums: <f_e, y> = sum_j g_j <f_e, f_j>, and ||f_e||^2 is its diagonal."""
    outputs, gates = outputs.transpose(0, 1).double(), gates.double()
    grams = outputs @ outputs.mT  # [tokens, E, E]
    cross = (grams @ gates.unsqueeze(-1)).squeeze(-1)  # [tokens, E]
    norms = grams.diagonal(dim1=1, dim2=2).sqrt()  # [tokens, E]
    return {
        "gram": grams.sum(dim=0),
        "cross": cross.sum(dim=0),
        "output_energy": (cross * gates).sum(),
        "routed_norm_sum": (norms * selected).sum(dim=0),
        "gated_norm_sum": (norms * gates).sum(dim=0),
    }


def add_sums(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum dictionaries of the same keys."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total
