"""Records: JSON that appears complete or not at all, versions, peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.runs import environment, peak_rss_bytes, write_json


def test_write_json_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    write_json(file, {"ä": [1, 2]})
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": [1, 2]}
    assert list(tmp_path.iterdir()) == [file]


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, float("nan"))
    assert json.loads(file.read_text()) == 1


def test_environment_names_the_packages_that_can_change_a_result() -> None:
    versions = environment()["versions"]
    assert isinstance(versions, dict)
    assert {"python", "burnish", "torch", "transformers", "tokenizers"} <= versions.keys()
    assert versions["torch"] == __import__("torch").__version__


def test_peak_memory_grows_with_what_is_held() -> None:
    code = (
        "from burnish.runs import peak_rss_bytes; a = peak_rss_bytes(); b = bytearray(200 * 2**20); b[::4096] = b'x' * "
    )
    code += "len(b[::4096]); print(peak_rss_bytes() - a)"
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 190 * 2**20 < grown < 300 * 2**20
    assert peak_rss_bytes() > 10 * 2**20
