"""The package as a whole: light to import, and its doors open."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_burnish_is_light_and_pulls_in_no_torch() -> None:
    code = "import time, sys; t = time.perf_counter(); import burnish; print(time.perf_counter() - t); "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    seconds = []
    for _ in range(3):
        first, second = run(code).splitlines()
        seconds.append(float(first))
        assert second == "False False"
    assert min(seconds) < 0.3


def test_the_command_helps_without_loading_torch() -> None:
    code = (
        "import sys\nfrom burnish.cli.main import run\ntry:\n    run(['densify', '--help'])\nexcept SystemExit: pass\n"
    )
    out = run(code + "print('torch' in sys.modules)")
    assert out.rstrip().endswith("False")
    assert "Example: burnish densify" in out


def test_a_verb_is_a_function_whether_or_not_its_room_was_imported_before() -> None:
    code = "import burnish; a = burnish.densify\nfrom burnish.densify.plan import DensifyPlan\n"
    code += "from burnish import densify\n"
    code += (
        "print(callable(a), callable(burnish.densify), callable(densify), burnish.densify.DensifyPlan is DensifyPlan)"
    )
    assert run(code).split() == ["True"] * 4
