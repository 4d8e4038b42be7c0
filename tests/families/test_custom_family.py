"""A family from a user's own file: an invented disk layout is converted without editing the package (U3.2)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.cli.main import run
from burnish.densify import densify
from burnish.densify.inspect import inspect
from burnish.errors import BurnishError, UnsupportedModelError
from burnish.families import FAMILIES, Family, detect_family
from burnish.families.detect import load_family
from tests.conftest import TinyModel

Tensors = dict[str, torch.Tensor]

RENAMED = '''
"""Qwen3-MoE whose expert matrices and routers have other names."""

from dataclasses import replace

from burnish.families import FAMILIES
from burnish.families.storage import Separate

BANK = "model.layers.{layer}.moe.bank.{expert}"
FAMILY = replace(
    FAMILIES["qwen3_moe"],
    name="Renamed",
    storages=(Separate(gate=BANK + ".w_gate", up=BANK + ".w_in", down=BANK + ".w_out"),),
    router_tensors=("model.layers.{layer}.moe.selector",),
    renames=((".moe.selector", ".mlp.gate.weight"),),
)
'''

STACKED = '''
"""Qwen3-MoE whose experts lie under one another in one 2-D tensor a matrix, the down projections transposed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from burnish.checkpoint import Checkpoint
from burnish.families import FAMILIES


@dataclass(frozen=True)
class Stacked:
    prefix: str
    known: tuple[str, ...] = ("gate", "up", "down")

    @property
    def parts(self) -> tuple[str, ...]:
        return self.known

    def tensors(self, layer: int, num_experts: int, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
        return {self.prefix.format(layer=layer) + part: (num_experts * width, hidden) for part in self.known}

    def read(self, source: Checkpoint, layer: int, expert: int, part: str):
        rows = slice(expert * WIDTH, (expert + 1) * WIDTH)
        matrix = source.read(self.prefix.format(layer=layer) + part, rows=rows)
        return matrix.mT if part == "down" else matrix


WIDTH = 12
FAMILY = replace(FAMILIES["qwen3_moe"], name="Stacked", storages=(Stacked("model.layers.{layer}.ffn.all_"),))
'''


def renamed(tensors: Tensors) -> Tensors:
    names = {".mlp.experts.": ".moe.bank.", ".gate_proj.weight": ".w_gate", ".up_proj.weight": ".w_in",
             ".down_proj.weight": ".w_out", ".mlp.gate.weight": ".moe.selector"}  # fmt: skip
    out = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


def stacked(tensors: Tensors) -> Tensors:
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(3):
        for part in ("gate", "up", "down"):
            names = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(8)]
            matrices = [tensors[name].mT if part == "down" else tensors[name] for name in names]
            out[f"model.layers.{layer}.ffn.all_{part}"] = torch.cat(matrices)
    return out


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "renamed": (RENAMED, renamed),
    "stacked": (STACKED, stacked),
}


@pytest.fixture(params=LAYOUTS)
def custom(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A stock model, the same model in another disk layout, and the file that describes the layout."""
    text, convert = LAYOUTS[request.param]
    stock = tiny_model("qwen3_moe")
    model = Path(shutil.copytree(stock, tmp_path / "model"))
    tensors = convert(load_file(stock / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / "model.safetensors")
    file = tmp_path / "json.py"  # a name that must not get in the way of the standard library's module
    file.write_text(text)
    return stock, model, file


def test_u3_2_a_family_from_a_file_converts_its_layout_like_the_stock_one(
    custom: tuple[Path, Path, Path], text_file: Path, tmp_path: Path
) -> None:
    stock, model, file = custom
    options = {"score": "do-acp", "keep": 3, "dataset": str(text_file), "num_samples": 2, "max_length": 16}
    expected = densify(stock, tmp_path / "expected", **options)
    with pytest.raises(BurnishError):
        densify(model, tmp_path / "built-in", **options)
    found = densify(model, tmp_path / "found", family=file, **options)
    assert [layer.groups for layer in found.plan.layers] == [layer.groups for layer in expected.plan.layers]
    assert found.record["source"]["family"] in ("Renamed", "Stacked")
    assert found.record["counts"]["dropped"] == expected.record["counts"]["dropped"] == 3
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert sys.modules["json"] is json


def test_u3_2_the_command_and_a_family_object_do_the_same(
    custom: tuple[Path, Path, Path], text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, model, file = custom
    monkeypatch.setattr("warnings.showwarning", None)  # restored after the command has set its own
    words = ["--dataset", str(text_file), "--num-samples", "2", "--max-length", "16", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        run(["densify", str(model), "--out", str(tmp_path / "command"), "--family", str(file), *words])
    assert ended.value.code == 0, capfd.readouterr().err
    family = load_family(file)
    assert isinstance(family, Family)
    densify(model, tmp_path / "object", family=family, dataset=str(text_file), num_samples=2, max_length=16)
    name = "model.safetensors"
    assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "object" / name).read_bytes()


def test_u3_2_inspect_takes_the_same_file(custom: tuple[Path, Path, Path]) -> None:
    _, model, file = custom
    assert inspect(model, family=file).to_dict()["family"] in ("Renamed", "Stacked")
    with pytest.raises(BurnishError):
        inspect(model)


def test_u3_2_built_in_families_are_not_changed_by_a_file(custom: tuple[Path, Path, Path]) -> None:
    before = dict(FAMILIES)
    load_family(custom[2])
    assert before == FAMILIES
    assert detect_family({"model_type": "qwen3_moe"}) is FAMILIES["qwen3_moe"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("FAMILY = 3", "defines no FAMILY of type"),
        ("", "defines no FAMILY of type"),
        ("FAMILY = ", r"cannot be run \(SyntaxError"),
        ("1 / 0", r"cannot be run \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_u3_2_a_file_that_defines_no_family_is_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UnsupportedModelError, match=rf"mine\.py: {says}") as error:
        load_family(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gone.py", "family.txt", "."])
def test_u3_2_a_path_that_is_no_python_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "family.txt").write_text("FAMILY = 3")
    with pytest.raises(UnsupportedModelError, match="no Python file with a family"):
        load_family(tmp_path / name)


def test_u3_2_a_family_of_another_model_type_is_refused_with_both() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type is 'mixtral', but family Qwen3-MoE is 'qwen3_moe'"):
        detect_family({"model_type": "mixtral"}, FAMILIES["qwen3_moe"])


def test_u3_1_an_invented_model_type_names_the_nearest_family_and_all_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        detect_family({"model_type": "mixtrall", "num_local_experts": 4})
    message = str(error.value)
    assert "'mixtrall' is not supported; nearest is 'mixtral'" in message
    assert all(f"({name})" in message for name in FAMILIES)
