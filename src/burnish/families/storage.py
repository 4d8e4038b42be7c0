"""How the gated feed-forward matrices of experts lie in tensors: one tensor a matrix, fused 3-D, or packed MXFP4.

All layouts speak of an expert's matrices in one orientation: `gate` and `up` [width, hidden], `down` [hidden, width],
`gate_bias` and `up_bias` [width], `down_bias` [hidden]. Orientation is declared, never inferred from a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from burnish.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = ("gate", "up", "down")
BIASES = ("gate_bias", "up_bias", "down_bias")
Part = str
Shape = tuple[int, ...]


class ExpertStorage(Protocol):
    """What a layout can tell and do; templates hold `{layer}` and, where experts are separate, `{expert}`."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The matrices and biases that an expert has."""

    def tensors(self, layer: int, num_experts: int, hidden: int, width: int) -> dict[str, Shape]:
        """Names and shapes of all tensors that hold the experts of a layer."""

    def read(self, source: Checkpoint, layer: int, expert: int, part: Part) -> Tensor:
        """One matrix or bias of one expert, in the orientation above; reads no other expert's bytes."""


class WritableStorage(ExpertStorage, Protocol):
    """A layout that feed-forward matrices can also be written in."""

    def pieces(self, layer: int, expert: int) -> dict[str, tuple[Part, ...]]:
        """For each tensor name, the parts that it is made of."""

    def compose(self, pieces: tuple[Part, ...], get: Callable[[Part], Tensor]) -> Tensor:
        """One expert's content of the tensor made of `pieces`; `get(part)` gives a part in the orientation above."""


@dataclass(frozen=True)
class Separate:
    """One 2-D tensor for each matrix: `mlp.experts.{expert}.gate_proj.weight` and kin. No biases."""

    gate: str
    up: str
    down: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """gate, up and down."""
        return MATRICES

    def name(self, part: Part, layer: int, expert: int = 0) -> str:
        """The tensor that holds `part`."""
        template: str = getattr(self, part)
        return template.format(layer=layer, expert=expert)

    def tensors(self, layer: int, num_experts: int, hidden: int, width: int) -> dict[str, Shape]:
        """See ExpertStorage."""
        return {
            self.name(part, layer, expert): (hidden, width) if part == "down" else (width, hidden)
            for expert in range(num_experts)
            for part in MATRICES
        }

    def read(self, source: Checkpoint, layer: int, expert: int, part: Part) -> Tensor:
        """See ExpertStorage."""
        return source.read(self.name(part, layer, expert))

    def pieces(self, layer: int, expert: int) -> dict[str, tuple[Part, ...]]:
        """See WritableStorage."""
        return {self.name(part, layer, expert): (part,) for part in MATRICES}

    def compose(self, pieces: tuple[Part, ...], get: Callable[[Part], Tensor]) -> Tensor:
        """See WritableStorage."""
        return get(pieces[0])


@dataclass(frozen=True)
class Fused:
    """All experts of a layer in one 3-D tensor: `gate_up` [E, 2*width, hidden], `down` [E, hidden, width].

    Attributes:
        gate_up, down: name templates.
        gate_up_bias, down_bias: name templates of the biases [E, 2*width] and [E, hidden], where there are any.
        interleaved: gate and up rows alternate (gate first); otherwise all gate rows come first.
        transposed: matrices are stored as [E, hidden, 2*width] and [E, width, hidden].
    """

    gate_up: str
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None
    interleaved: bool = False
    transposed: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """gate, up and down, and their biases where there are any."""
        return MATRICES + (BIASES if self.gate_up_bias else ())

    def tensors(self, layer: int, num_experts: int, hidden: int, width: int) -> dict[str, Shape]:
        """See ExpertStorage."""
        gate_up, down = (2 * width, hidden), (hidden, width)
        if self.transposed:
            gate_up, down = gate_up[::-1], down[::-1]
        shapes: dict[str, Shape] = {self.gate_up.format(layer=layer): (num_experts, *gate_up)}
        shapes[self.down.format(layer=layer)] = (num_experts, *down)
        if self.gate_up_bias and self.down_bias:
            shapes[self.gate_up_bias.format(layer=layer)] = (num_experts, 2 * width)
            shapes[self.down_bias.format(layer=layer)] = (num_experts, hidden)
        return shapes

    def read(self, source: Checkpoint, layer: int, expert: int, part: Part) -> Tensor:
        """See ExpertStorage. A part that is contiguous in the file is read alone."""
        template: str = getattr(self, "down_bias" if part == "down_bias" else _fused_name(part))
        name = template.format(layer=layer)
        if part.startswith("down"):
            tensor = source.read(name, expert)
            return tensor.mT if self.transposed and part == "down" else tensor
        first, dim = (part.startswith("gate"), 1 if self.transposed and not part.endswith("bias") else 0)
        if dim == 0 and not self.interleaved:
            width = source.info(name).shape[1] // 2
            return source.read(name, expert, slice(0, width) if first else slice(width, 2 * width))
        tensor = source.read(name, expert)
        return split_gate_up(tensor.mT if dim else tensor, self.interleaved)[0 if first else 1]

    def pieces(self, layer: int, expert: int) -> dict[str, tuple[Part, ...]]:
        """See WritableStorage."""
        names = {self.gate_up.format(layer=layer): ("gate", "up"), self.down.format(layer=layer): ("down",)}
        if self.gate_up_bias and self.down_bias:
            names[self.gate_up_bias.format(layer=layer)] = ("gate_bias", "up_bias")
            names[self.down_bias.format(layer=layer)] = ("down_bias",)
        return names

    def compose(self, pieces: tuple[Part, ...], get: Callable[[Part], Tensor]) -> Tensor:
        """See WritableStorage."""
        import torch

        if len(pieces) == 2:
            gate, up = get(pieces[0]), get(pieces[1])
            joined = torch.stack((gate, up), dim=1).flatten(0, 1) if self.interleaved else torch.cat((gate, up))
        else:
            joined = get(pieces[0])
        return joined.mT.contiguous() if self.transposed and joined.dim() == 2 else joined


@dataclass(frozen=True)
class PackedMxfp4:
    """GPT-OSS as published: 4-bit floats in blocks of 32 that share an exponent; read only.

    `gate_up_blocks` [E, 2*width, hidden/32, 16] uint8 with gate and up rows alternating, `gate_up_scales`
    [E, 2*width, hidden/32] uint8; `down_blocks` [E, hidden, width/32, 16], `down_scales` [E, hidden, width/32];
    biases as in `Fused`.

    Source: OCP Microscaling Formats v1.0 (element type E2M1, scale type E8M0); names from the published checkpoints.
    """

    gate_up: str
    down: str
    gate_up_bias: str
    down_bias: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """gate, up, down and their biases."""
        return MATRICES + BIASES

    def tensors(self, layer: int, num_experts: int, hidden: int, width: int) -> dict[str, Shape]:
        """See ExpertStorage."""
        shapes: dict[str, Shape] = {}
        for template, rows, columns in ((self.gate_up, 2 * width, hidden), (self.down, hidden, width)):
            name = template.format(layer=layer)
            shapes[f"{name}_blocks"] = (num_experts, rows, columns // 32, 16)
            shapes[f"{name}_scales"] = (num_experts, rows, columns // 32)
        shapes[self.gate_up_bias.format(layer=layer)] = (num_experts, 2 * width)
        shapes[self.down_bias.format(layer=layer)] = (num_experts, hidden)
        return shapes

    def read(self, source: Checkpoint, layer: int, expert: int, part: Part) -> Tensor:
        """See ExpertStorage. Weights come as bfloat16, which holds every MXFP4 value exactly."""
        if part.endswith("bias"):
            name = (self.down_bias if part.startswith("down") else self.gate_up_bias).format(layer=layer)
            bias = source.read(name, expert)
            return bias if part == "down_bias" else split_gate_up(bias, True)[part.startswith("up")]
        name = (self.down if part == "down" else self.gate_up).format(layer=layer)
        weight = dequantize_mxfp4(source.read(f"{name}_blocks", expert), source.read(f"{name}_scales", expert))
        return weight if part == "down" else split_gate_up(weight, True)[part == "up"]


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values of MXFP4 blocks.

    Args:
        blocks: [rows, groups, 16] uint8: two 4-bit floats (sign, 2 exponent bits, 1 mantissa bit) a byte, low first.
        scales: [rows, groups] uint8: exponent of two with bias 127.

    Returns:
        [rows, 32 * groups] bfloat16.

    Source: OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4.1.
    """
    import torch

    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.bfloat16)
    values = torch.cat((magnitudes, -magnitudes))
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [rows, groups, 32]
    exponents = scales.to(torch.int32).unsqueeze(-1) - 127
    return torch.ldexp(values[nibbles.int()], exponents).to(torch.bfloat16).flatten(-2)


def split_gate_up(tensor: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Split the first dimension into gate and up: alternating rows, or first and second half."""
    if interleaved:
        return tensor[::2], tensor[1::2]
    half = tensor.shape[0] // 2
    return tensor[:half], tensor[half:]


def _fused_name(part: Part) -> str:
    if part.startswith("down"):
        return part
    return "gate_up_bias" if part.endswith("bias") else "gate_up"
