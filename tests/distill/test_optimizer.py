"""`--optimizer`: what is written is the average where there is one, and a killed run ends with the same bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from burnish.distill import DistillResult, distill
from burnish.evaluate import evaluate
from burnish.optim.table import OPTIMIZERS
from burnish.runs import Progress
from tests.distill.conftest import SMALL
from tests.distill.test_train import Run, hashes, kill
from tests.optim.test_callback import Watch

AMUSE: dict[str, Any] = {"optimizer": "amuse", "lr": 1e-2, "warmup": 0.25, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def whole(teacher: Path, student: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    out = tmp_path_factory.mktemp("whole") / "out"
    return distill(
        student, out, teacher=teacher, dataset=text_file, eval_dataset=text_file, **{**SMALL, **AMUSE}
    )  # fmt: skip


@pytest.mark.parametrize("name", ["amuse", "muon", "normuon", "adamw-schedule-free"])
def test_u7_5_the_student_is_the_average_where_there_is_one(
    name: str, run: Run, teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    watch = Watch()
    lr = 1e-2 if name == "amuse" else 3e-3
    result = run(tmp_path / "out", optimizer=name, lr=lr, warmup=0.25, callbacks=[watch])
    written = load_file(tmp_path / "out" / "model.safetensors")
    steps = result.record["training"]["steps"]
    expected = (watch.x if OPTIMIZERS[name].averaged else watch.y)[steps]
    assert sum(name in expected for name in written) > 10
    for tensor, value in written.items():
        assert torch.equal(value, expected[tensor]), tensor
    if OPTIMIZERS[name].averaged:
        assert any(not torch.equal(value, watch.y[steps][tensor]) for tensor, value in written.items())

    first, last = result.record["training"]["first_evaluation"], result.record["training"]["last_evaluation"]
    assert last["eval_kl"] < first["eval_kl"]
    rows = evaluate(
        before=teacher, after=[tmp_path / "out"], dataset=text_file, num_samples=2, max_length=32, dtype="float32",
        speed=False,
    ).rows  # fmt: skip
    assert last["eval_kl"] == pytest.approx(rows[1].comparison.forward_kl.value, rel=1e-4)
    training = json.loads((tmp_path / "out" / "burnish.json").read_text())["training"]
    schedule = "constant" if OPTIMIZERS[name].averaged else "cosine"
    assert (training["optimizer"], training["schedule"]) == (name, schedule)
    assert f"optimizer: {name}, learning rate {lr}, {schedule} schedule" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("point", ["4", "7", "while saving", "before publishing"])
def test_u2_1_u2_4_killed_and_run_again_gives_the_same_bytes_and_losses(
    point: str, run: Run, whole: DistillResult, tmp_path: Path
) -> None:
    def amuse(out: Path, **changes: Any) -> DistillResult:
        return run(out, **AMUSE, **changes)

    out = tmp_path / "out"
    kill(point, amuse, out)
    assert not out.exists()
    again = amuse(out)
    assert again.record["training"]["resumed_at_step"] == {"7": 4, "before publishing": 12}.get(point, 0)
    assert hashes(out) == hashes(whole.out)
    assert again.history == whole.history


def test_u5_1_a_checkpoint_of_a_killed_run_is_the_average(run: Run, tmp_path: Path) -> None:
    kill("9", lambda out, **changes: run(out, **AMUSE, **changes), tmp_path / "out")
    watch = Watch()
    run(tmp_path / "other", **AMUSE, callbacks=[watch])
    saved = load_file(tmp_path / ".out.partial" / "work" / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(value, watch.x[8][name]) for name, value in saved.items())


def said(run: Callable[..., DistillResult], out: Path, **options: Any) -> str:
    stream = io.StringIO()
    run(out, tokens=128, progress=Progress(console=Console(file=stream, width=200)), **options)
    return stream.getvalue()


def test_u7_4_the_routing_is_shown_where_there_are_two_rules(run: Run, tmp_path: Path) -> None:
    shown = said(run, tmp_path / "amuse", **AMUSE)
    assert "tensor" in shown and "reason" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith(("model.", "lm_head"))}
    assert "auxiliary" in lines["model.embed_tokens.weight"] and "embedding" in lines["model.embed_tokens.weight"]
    assert "matrix" in lines["model.layers.0-2.mlp.down_proj.weight"]
    assert "reason" not in said(run, tmp_path / "other", optimizer="adamw-schedule-free")


def test_options_that_do_not_go_together_are_refused_in_one_line_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from burnish.cli.main import run as command

    cases = {
        ("--optimizer", "amuse", "--schedule", "cosine"): "schedule='cosine': amuse averages in place of decaying",
        ("--optimizer", "amsue"): "optimizer='amsue' is unknown: choose one of",
        ("--schedule", "step"): "schedule='step' is unknown: choose one of",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            command(
                ["distill", str(tmp_path / "no-model"), "--teacher", "none", "--out", str(tmp_path / "out"), *options]
            )
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == ""
        assert message in said.err and len(said.err.strip().splitlines()) == 1, said.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_optimizer_is_not_resumed(run: Run, tmp_path: Path) -> None:
    from burnish.errors import ResumeMismatchError

    kill("5", lambda out, **changes: run(out, **AMUSE, **changes), tmp_path / "out")
    with pytest.raises(ResumeMismatchError, match=r"options\.optimizer was 'amuse', is 'muon'"):
        run(tmp_path / "out", **{**AMUSE, "optimizer": "muon"})
