"""The example trains, and its checkpoints give the losses that they were evaluated with."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_without_schedule.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_without_schedule", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_u7_5_every_checkpoint_is_the_model_that_was_evaluated(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--steps", "40", "--every", "10"])
    printed = capsys.readouterr().out
    losses = {int(step): float(loss) for step, loss in re.findall(r"^ +(\d+) +(\d\.\d{4}) ", printed, re.M)}
    assert list(losses) == [10, 20, 30, 40]
    assert list(losses.values()) == sorted(losses.values(), reverse=True)
    assert losses[40] < losses[10] - 0.5
    checkpoint, loss = re.findall(r"checkpoint-(\d+), loaded without burnish: (\d\.\d{4})", printed)[0]
    assert float(loss) == pytest.approx(losses[int(checkpoint)], abs=2e-4)
    assert "embedding, tied to the output head" in printed
