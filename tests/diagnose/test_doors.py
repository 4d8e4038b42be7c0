"""The room's names open, and nothing is loaded before they are used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

from burnish import diagnose


def test_every_name_opens_and_type_checkers_see_the_same_ones() -> None:
    for name, home in diagnose.NAMES.items():
        assert getattr(diagnose, name) is getattr(importlib.import_module(f"burnish.diagnose.{home}"), name)
    tree = ast.parse(Path(str(diagnose.__file__)).read_text())
    seen = {
        node.names[0].asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
    }
    typed = {name: module.rpartition(".")[2] for name, module in seen.items() if name and module}
    assert typed == diagnose.NAMES


def test_importing_the_room_loads_no_torch() -> None:
    code = "import sys, burnish.diagnose; print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"]
