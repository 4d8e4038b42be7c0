"""The example raises its reward, by pairs of the policy more than by pairs of the reference."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from burnish.report import write_report

SCRIPT = Path(__file__).parents[2] / "examples" / "on_policy_rounds.py"


def test_pairs_of_the_policy_bring_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("on_policy_rounds", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--rounds", "2", "--out", str(tmp_path)])
    rows = re.findall(r"^ +(\d) +(\d+) +(\d\.\d+) ± (\d\.\d+) +(\S+) +(\d+) %", capsys.readouterr().out, re.M)
    assert [(int(row[0]), int(row[1])) for row in rows] == [(0, 0), (1, 84), (2, 84)] * 2
    assert rows[:2] == rows[3:5]  # the policy is the reference until it has been trained
    rewards = [float(row[2]) for row in rows]
    assert rewards[0] < rewards[1] < rewards[5] < rewards[2]
    assert rewards[2] > rewards[0] + 4 * float(rows[2][3])
    page = write_report(tmp_path / "policy").read_text()
    assert "Win rate against the reference" in page and f">{rewards[2]:.2f} ±" in page
