"""The command: exit codes, streams, spelling of flags, JSON, and the demo without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyModel

NO_SOCKETS = """
import socket, sys
calls = []
class Refused(socket.socket):
    def connect(self, *a):
        calls.append(a); raise OSError("the network is blocked")
    connect_ex = connect
socket.socket = Refused
def refuse(*a, **k):
    calls.append(a); raise OSError("the network is blocked")
socket.create_connection = socket.getaddrinfo = refuse
"""


def burnish(*arguments: str, code: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    script = f"{code}\nimport sys\nfrom burnish.cli.main import run\ntry:\n    run(sys.argv[1:])\n"
    script += "finally:\n    assert not globals().get('calls'), calls\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)


def test_help_names_every_verb_and_has_an_example() -> None:
    done = burnish("--help")
    assert done.returncode == 0
    verbs = "inspect densify distill prune tune replay align evaluate sweep report run demo claims"
    for verb in verbs.split():
        assert verb in done.stdout
        assert "Example" in burnish(verb, "--help").stdout


def test_u9_1_unknown_flag_suggests_the_nearest_and_exits_2() -> None:
    done = burnish("densify", "x", "--out", "y", "--scoer", "sf")
    assert done.returncode == 2 and "--score" in done.stderr


def test_failures_are_one_line_and_exit_1(tmp_path: Path) -> None:
    done = burnish("inspect", str(tmp_path / "nothing"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().count("\n") == 0 and "no such directory" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = burnish("inspect", str(tmp_path / "nothing"), "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_underscores_are_accepted_in_flags_and_json_is_the_only_output(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    arguments = ["--dataset", str(text_file), "--num_samples=2", "--max_length", "32", "--json"]
    done = burnish("densify", str(tiny_model("mixtral")), "--out", str(tmp_path / "o"), *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["output"]["architecture"] == "LlamaForCausalLM"
    assert result["options"]["num_samples"] == 2


def test_u13_1_dry_run_writes_nothing(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    arguments = ["--dataset", str(text_file), "--num-samples", "2", "--max-length", "32", "--dry-run"]
    done = burnish("densify", str(tiny_model("qwen3_moe")), "--out", str(tmp_path / "o"), *arguments)
    assert done.returncode == 0 and "nothing written" in done.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_u13_3_interrupt_exits_130_and_says_how_to_go_on() -> None:
    code = "import burnish.densify as d\ndef stop(*a, **k): raise KeyboardInterrupt\nd.densify = stop\n"
    done = burnish("densify", "m", "--out", "o", code=code)
    assert done.returncode == 130 and "run the same command again" in done.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
def test_u11_inspect_opens_no_socket(offline: str, tiny_model: TinyModel) -> None:
    done = burnish("inspect", str(tiny_model("olmoe")), "--json", code=NO_SOCKETS, env={"HF_HUB_OFFLINE": offline})
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["family"] == "OLMoE" and "one expert" in shown["why"]
    assert [option["keep"] for option in shown["options"]] == [3, 6, 6, 8, 8]


def test_u11_demo_opens_no_socket_and_writes_a_report(tmp_path: Path) -> None:
    done = burnish("demo", "--out", str(tmp_path / "demo"), code=NO_SOCKETS, env={"HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("sf-k4", "sf-k8", "do-acp-k4", "do-acp-k8", "do-acp-k4-distilled"):
        assert name in done.stdout
        assert (tmp_path / "demo" / name / "model.safetensors").exists()
    rows = json.loads((tmp_path / "demo" / "evaluation.json").read_text())["rows"]
    assert len(rows) == 6
    teacher, *starts, distilled = (row["perplexity"]["value"] for row in rows)
    assert teacher < 30 and all(start > 1000 for start in starts)
    assert teacher < distilled < 300
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()
