"""Forecasts: memory within 25 % of what a process then needs, time of the right size (measured in child processes)."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.data import bundled_model
from tests.densify.test_memory import peak


@pytest.mark.parametrize("score", ["sf", "do-acp"])
def test_u1_3_peak_memory_of_the_bundled_model_is_forecast(score: str, tmp_path: Path) -> None:
    result = peak(bundled_model(), tmp_path / "o", "--score", score, "--num-samples", "64", "--max-length", "256")
    assert result["forecast"]["observe_peak_bytes"] == pytest.approx(result["peak_rss_bytes"], rel=0.25)
    assert result["seconds"]["observe"] / 20 < result["forecast"]["observe_seconds"] < result["seconds"]["observe"] * 20
    assert result["forecast"]["bytes_written"] == result["bytes_written"]
    again = peak(bundled_model(), tmp_path / "p", "--plan", str(tmp_path / "o" / "plan.json"))
    assert again["forecast"]["act_peak_bytes"] == pytest.approx(again["peak_rss_bytes"], rel=0.25)
    assert again["forecast"]["observe_seconds"] == 0
