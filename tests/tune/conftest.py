"""A tiny dense model, rows that it can learn, and how to tune it in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from burnish.tune import TuneResult, tune
from tests.conftest import COMMON, save_tokenizer

SMALL: dict[str, Any] = {
    "steps": 12, "max_length": 32, "batch_size": 4, "lr": 3e-3, "eval_samples": 6, "eval_every": 4,
    "checkpoint_every": 4, "device": "cpu",
}  # fmt: skip
ZEROTH = {"optimizer": "mezo-bcd", "interval": 3, "lr": 1e-3}

Run = Callable[..., TuneResult]


def build_llama(**changes: Any) -> Any:
    config = CONFIG_MAPPING["llama"](**{**COMMON, "intermediate_size": 48, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.2)
    return model


def save_llama(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    build_llama(**changes).to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def half_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("half"), torch.bfloat16)


def write_rows(file: Path, count: int, seed: int) -> Path:
    """Rows of different lengths whose answer is the first letter of the prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        letters = ["abcd"[int(pick)] for pick in torch.randint(4, (2 + int(torch.randint(5, (), generator=generator)),),
                                                              generator=generator)]  # fmt: skip
        rows.append({"prompt": f"{' '.join(letters)} > ", "completion": letters[0] * 2})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40, 0)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "held-out.jsonl", 9, 1)


@pytest.fixture
def run(llama: Path, rows: Path, held_out: Path) -> Run:
    def run(out: Path, **changes: Any) -> TuneResult:
        options = {"dataset": rows, "eval_dataset": held_out, **SMALL, **changes}
        return tune(options.pop("model", llama), out, **options)

    return run
