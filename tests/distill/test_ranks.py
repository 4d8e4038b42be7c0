"""Two processes of torchrun do what one does: the same losses, one output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distill.test_train import Run

SCRIPT = """
import sys, torch
from tests.distill.conftest import SMALL
from burnish.distill import distill
student, out, teacher, text, logits = sys.argv[1:]
options = {**SMALL, "batch_size": 1, "eval_samples": 4, "teacher_logits": logits if logits != "-" else None}
distill(student, out, teacher=teacher, dataset=text, eval_dataset=text, **options)
"""


@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
def test_two_processes_train_as_one_does(
    stored: bool, run: Run, teacher: Path, student: Path, text_file: Path, tmp_path: Path
) -> None:
    alone = run(tmp_path / "alone", batch_size=2, eval_samples=4)
    logits = str(tmp_path / "logits") if stored else "-"
    if stored:
        run(tmp_path / "writer", batch_size=2, eval_samples=4, teacher_logits=logits, top_logits=64)
        alone = run(tmp_path / "reader", batch_size=2, eval_samples=4, teacher_logits=logits, top_logits=64)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "script.py"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(student), "both", str(teacher), str(text_file), logits], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(alone.history)
    for mine, theirs in zip(lines, alone.history, strict=True):
        assert mine["step"] == theirs["step"] and mine["tokens"] == theirs["tokens"]
        for key in {"loss", "eval_kl", "eval_nll", "divergence", "nll", "grad_norm"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (mine, theirs)
    assert json.loads((tmp_path / "both" / "burnish.json").read_text())["training"]["processes"] == 2
    assert not (tmp_path / ".both.partial").exists()


SHARDED = """
import sys, torch, torch.distributed as dist
from types import MethodType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from burnish.distill import LiveTeacher, Objective
from burnish.distill.trainer import _token_losses

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

def loss(model, rows):
    ids = torch.randint(4, 96, (4, 16), generator=torch.Generator().manual_seed(0))[rows]
    live = torch.ones(len(ids), 15, dtype=torch.bool)
    target = LiveTeacher(load(sys.argv[2])).target({"input_ids": ids}, live, states=False)
    return model(ids, ids, live, target, Objective())[0]

whole, sharded = load(sys.argv[1]), load(sys.argv[1])
for model in (whole, sharded):
    model.forward = MethodType(_token_losses, model)
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
loss(whole, slice(None)).backward()
rank = dist.get_rank()
(loss(sharded, slice(2 * rank, 2 * rank + 2)) * 2).backward()  # FSDP averages over the ranks
for name, parameter in sharded.named_parameters():
    expected = whole.get_parameter(name).grad
    error = (parameter.grad.full_tensor() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < 1e-5, (name, float(error))
dist.barrier()
dist.destroy_process_group()
"""


def test_gradients_of_a_student_sharded_by_fsdp2_are_those_of_the_whole(
    teacher: Path, student: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "script.py"]
    done = subprocess.run(
        [*command, str(student), str(teacher)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
