"""Inspecting: what is shown is what a conversion then gives, and nothing is read but headers."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from burnish.densify import densify
from burnish.densify.inspect import inspect
from tests.conftest import FAMILIES, TinyModel


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_what_densify_then_writes(
    family: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    shown = inspect(tiny_model(family))
    pure = shown.options[0]
    result = densify(
        tiny_model(family), tmp_path / "o", score="sf", dataset=str(text_file), num_samples=2, max_length=32
    )
    assert (pure.parameters, pure.bytes) == (result.record["output"]["parameters"], result.record["output"]["bytes"])
    assert pure.bytes == sum(file.stat().st_size for file in (tmp_path / "o").glob("*.safetensors")) - header(
        tmp_path / "o"
    )
    assert shown.parameters == result.record["source"]["parameters"]
    assert shown.architecture == result.record["output"]["architecture"]
    assert pure.forecast.bytes_read == pytest.approx(result.record["bytes_read"], rel=0.25)
    assert pure.forecast.bytes_written == result.record["bytes_written"] == pure.bytes


def header(directory: Path) -> int:
    with (directory / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_the_table_says_family_router_and_options(tiny_model: TinyModel) -> None:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(inspect(tiny_model("deepseek_v2")).table())
    text = console.export_text()
    assert "DeepSeek-V2 (deepseek_v2)" in text and "2 of 3 layers have 8 experts of width 16, top 2" in text
    assert "not renormalised, times 1.5, best 2 of 4 groups" in text and "shared experts of width 32" in text
    assert "2 merged" in text and "observing all experts" in text


def test_u5_4_engine_lists_known_obstacles(tiny_model: TinyModel) -> None:
    lines = inspect(tiny_model("deepseek_v2"), engines=["vllm", "llama.cpp", "sglang"]).engines
    assert any("vllm" in line and "no: loads, but" in line for line in lines)
    assert any("sglang" in line and "untested" in line for line in lines)
    assert any("TokenizersBackend" in line for line in lines)
    with pytest.raises(ValueError, match="engine='tgi': choose one of"):
        inspect(tiny_model("deepseek_v2"), engines=["tgi"])
