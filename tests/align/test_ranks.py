"""Two processes of torchrun align as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.align import align
from burnish.align.reference import ReferenceLogps
from tests.align.test_align import SMALL, pairs_of, write
from tests.tune.conftest import save_llama

SCRIPT = """
import json, sys
from burnish.align import align
from tests.align.test_align import SMALL, lowercase
model, out, options = sys.argv[1:]
options = json.loads(options)
if options.pop("scored", False):
    options["reward_model"] = lowercase
align(model, out, **{**SMALL, **options})
"""


def two_processes(directory: Path, *words: str) -> str:
    """What they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *words]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=180,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("changes", [{}, {"lora": True, "objective": "ipo"}, {"objective": "pd", "scored": True}],
                         ids=["dpo", "lora", "pd"])  # fmt: skip
def test_two_processes_align_as_one_does(changes: dict[str, Any], tmp_path: Path) -> None:
    from tests.align.test_align import lowercase

    model = save_llama(tmp_path / "model")
    data = {"dataset": str(write(tmp_path / "pairs.jsonl", pairs_of(40, 0))),
            "eval_dataset": str(write(tmp_path / "held-out.jsonl", pairs_of(9, 1)))}  # fmt: skip
    common = {**data, "steps": 6, "eval_samples": 9, **changes}
    if needs := changes.get("objective") != "pd":
        common["reference_logps"] = str(tmp_path / "both.safetensors")
    (tmp_path / "script.py").write_text(SCRIPT)
    two_processes(tmp_path, "script.py", str(model), "both", json.dumps({**common, "batch_size": 2}))
    options = {**SMALL, **common, "batch_size": 4}
    if options.pop("scored", False):
        options["reward_model"] = lowercase
    if needs:
        options["reference_logps"] = tmp_path / "alone.safetensors"
    alone = align(model, tmp_path / "alone", **options)
    lines = [json.loads(line) for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(alone.history)
    for mine, theirs in zip(lines, alone.history, strict=True):
        assert (mine["step"], mine["examples"]) == (theirs["step"], theirs["examples"])
        for key in {"loss", "eval_loss", "margin", "eval_margin"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), (mine, theirs)
    assert json.loads((tmp_path / "both" / "burnish.json").read_text())["training"]["processes"] == 2
    if needs:
        both, one = (ReferenceLogps.load(tmp_path / f"{name}.safetensors") for name in ("both", "alone"))
        assert both.settings == one.settings and both.values == pytest.approx(one.values, rel=1e-5)


def test_the_command_of_two_processes_tells_once_what_they_did(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    write(tmp_path / "pairs.jsonl", pairs_of(20, 0))
    options = ["--dataset", "pairs.jsonl", "--eval-dataset", "pairs.jsonl", "--steps", "2", "--max-length", "32",
               "--batch-size", "2", "--device", "cpu", "--json"]  # fmt: skip
    told = json.loads(two_processes(tmp_path, "-m", "burnish", "align", str(model), "--out", "out", *options))
    assert told == {"out": "out", **json.loads((tmp_path / "out" / "burnish.json").read_text())}
    assert told["training"]["last_evaluation"]["step"] == 2


def test_every_process_returns_the_whole_record(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    data = str(write(tmp_path / "pairs.jsonl", pairs_of(20, 0)))
    (tmp_path / "script.py").write_text(
        "import os, sys\nfrom burnish.align import align\nfrom tests.align.test_align import SMALL\n"
        "result = align(sys.argv[1], 'out', **{**SMALL, 'steps': 1}, dataset=sys.argv[2])\n"
        "open('told-' + os.environ['RANK'], 'w').write(repr(result.record) + result.summary())\n"
    )
    two_processes(tmp_path, "script.py", str(model), data)
    first, second = ((tmp_path / f"told-{rank}").read_text() for rank in (0, 1))
    assert "peak memory" in first and first == second


def test_fewer_held_out_rows_than_processes_are_refused(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    write(tmp_path / "pairs.jsonl", pairs_of(20, 0))
    write(tmp_path / "one.jsonl", pairs_of(1, 0))
    options = ["--dataset", "pairs.jsonl", "--eval-dataset", "one.jsonl", "--steps", "2", "--max-length", "32",
               "--device", "cpu"]  # fmt: skip
    with pytest.raises(AssertionError, match="1 rows to evaluate on for 2 processes"):
        two_processes(tmp_path, "-m", "burnish", "align", str(model), "--out", "out", *options)
