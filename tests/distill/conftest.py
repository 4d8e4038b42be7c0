"""A teacher and its student, both tiny, and how to distil them in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.densify import densify
from burnish.distill import DistillResult, distill
from tests.conftest import TinyModel

SMALL = {
    "tokens": 12 * 64, "max_length": 32, "batch_size": 2, "lr": 3e-3, "eval_samples": 2, "eval_every": 4 * 64,
    "checkpoint_every": 4 * 64, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="session")
def teacher(tiny_model: TinyModel) -> Path:
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="session")
def student(teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "dense"
    densify(teacher, out, score="sf", dataset=str(text_file), num_samples=4, max_length=32)
    return out


@pytest.fixture
def run(teacher: Path, student: Path, text_file: Path) -> Callable[..., DistillResult]:
    def run(out: Path, **changes: Any) -> DistillResult:
        options = {"teacher": teacher, "dataset": text_file, "eval_dataset": text_file, **SMALL, **changes}
        return distill(options.pop("student", student), out, **options)

    return run
