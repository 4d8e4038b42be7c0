"""Expert layouts: reading gives one orientation whatever the storage, and writing is its inverse, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from burnish.checkpoint import Checkpoint
from burnish.families.storage import BIASES, Fused, PackedMxfp4, Separate, dequantize_mxfp4

SEPARATE = Separate("l{layer}.e{expert}.gate", "l{layer}.e{expert}.up", "l{layer}.e{expert}.down")
LAYOUTS = {
    "separate": SEPARATE,
    "fused": Fused("l{layer}.gu", "l{layer}.d"),
    "interleaved": Fused("l{layer}.gu", "l{layer}.d", interleaved=True),
    "transposed": Fused("l{layer}.gu", "l{layer}.d", transposed=True),
    "gpt-oss": Fused("l{layer}.gu", "l{layer}.d", "l{layer}.gub", "l{layer}.db", interleaved=True, transposed=True),
}


def experts(width: int, hidden: int, count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width), "gate_bias": (width,),
              "up_bias": (width,), "down_bias": (hidden,)}  # fmt: skip
    return [{part: torch.randn(shape, generator=generator) for part, shape in shapes.items()} for _ in range(count)]


def saved(directory: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return Checkpoint.open(directory)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("width", "hidden"), [(4, 6), (6, 4), (5, 5)])
def test_u4_3_writing_then_reading_is_the_identity(name: str, width: int, hidden: int, tmp_path: Path) -> None:
    layout, wanted = LAYOUTS[name], experts(width, hidden)
    tensors: dict[str, torch.Tensor] = {}
    for number, expert in enumerate(wanted):
        for tensor_name, parts in layout.pieces(7, number).items():
            content = layout.compose(parts, expert.__getitem__)
            if isinstance(layout, Separate):
                tensors[tensor_name] = content
            else:
                tensors.setdefault(tensor_name, torch.empty(3, *content.shape))[number] = content
    assert {k: tuple(v.shape) for k, v in tensors.items()} == layout.tensors(7, 3, hidden, width)
    source = saved(tmp_path / "c", tensors)
    for number, expert in enumerate(wanted):
        for part in layout.parts:
            assert torch.equal(layout.read(source, 7, number, part), expert[part]), (number, part)


def test_interleaving_puts_gate_at_even_and_up_at_odd_positions() -> None:
    layout = LAYOUTS["gpt-oss"]
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    joined = layout.compose(("gate", "up"), {"gate": gate, "up": up}.__getitem__)
    assert joined.shape == (3, 4) and joined[0].tolist() == [0, 1, 0, 1]


def test_u1_4_one_expert_is_read_without_the_others(tmp_path: Path) -> None:
    layout = LAYOUTS["fused"]
    source = saved(tmp_path / "c", {"l0.gu": torch.randn(8, 12, 4), "l0.d": torch.randn(8, 4, 6)})
    layout.read(source, 0, 5, "up")
    assert source.bytes_read == 6 * 4 * 4  # the up half of one expert alone
    layout.read(source, 0, 5, "down")
    assert source.bytes_read == 2 * 6 * 4 * 4


def test_mxfp4_equals_the_dequantisation_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    width, hidden, count = 32, 64, 2
    tensors: dict[str, torch.Tensor] = {}
    for name, rows, columns in (("l0.gu", 2 * width, hidden), ("l0.d", hidden, width)):
        shape = (count, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8)
    tensors |= {"l0.gub": torch.randn(count, 2 * width), "l0.db": torch.randn(count, hidden)}
    packed = PackedMxfp4("l{layer}.gu", "l{layer}.d", "l{layer}.gub", "l{layer}.db")
    assert {k: tuple(v.shape) for k, v in tensors.items()} == packed.tensors(0, count, hidden, width)
    source = saved(tmp_path / "packed", tensors)
    plain = {
        name: convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        for name in ("l0.gu", "l0.d")
    }
    unpacked = saved(tmp_path / "plain", plain | {name: tensors[name] for name in ("l0.gub", "l0.db")})
    for expert in range(count):
        for part in ("gate", "up", "down", *BIASES):
            expected = LAYOUTS["gpt-oss"].read(unpacked, 0, expert, part)
            assert torch.equal(packed.read(source, 0, expert, part), expected), part


def test_mxfp4_values_by_hand() -> None:
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x7 | (0x9 << 4)  # low nibble 6.0, high nibble -0.5
    values = dequantize_mxfp4(blocks, torch.tensor([[128]], dtype=torch.uint8))
    assert values[0, :3].tolist() == [12.0, -1.0, 0.0]
