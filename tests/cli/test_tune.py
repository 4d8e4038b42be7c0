"""`burnish tune` and `burnish replay` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.cli.main import run
from tests.cli.test_main import NO_SOCKETS, burnish
from tests.tune.conftest import save_llama, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 16, 0)


def test_u11_1_tune_replay_and_report_without_a_network(model: Path, data: Path, tmp_path: Path) -> None:
    options = ["--dataset", str(data), "--eval_dataset", str(data), "--max-length", "32", "--device", "cpu"]
    options += ["--optimizer", "mezo-bcd", "--steps", "4", "--blocks", "*layers.0.*", "--blocks", "*layers.2.*"]
    options += ["--interval=2", "--order", "ascending", "--lr", "1e-4", "--json"]
    done = burnish("tune", str(model), "--out", str(tmp_path / "out"), *options, code=NO_SOCKETS)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert (result["training"]["steps"], result["options"]["interval"]) == (4, 2)
    assert result["options"]["blocks"] == ["*layers.0.*", "*layers.2.*"]
    done = burnish("replay", str(tmp_path / "out"), str(model), "--out", str(tmp_path / "again"), code=NO_SOCKETS)
    assert done.returncode == 0 and "4 steps of MeZOBCD" in done.stdout, done.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    for name, shown in (("out", "tuned with mezo-bcd over 4 steps"), ("again", "tuned with MeZOBCD over 4 steps")):
        assert burnish("report", str(tmp_path / name)).returncode == 0
        assert shown in (tmp_path / name / "report.html").read_text()


def test_a_number_of_weights_is_one_block_size(model: Path, data: Path, tmp_path: Path) -> None:
    options = ["--dataset", str(data), "--optimizer", "mezo-bcd", "--max-length", "32", "--json", "--dry-run"]
    done = burnish("tune", str(model), "--out", str(tmp_path / "out"), *options, "--blocks", "2k")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["options"]["blocks"] == 2000 and result["out"] is None
    assert 2000 <= result["forecast"]["block_weights"] < 2000 + 32 * 48


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--optimizer", "mezo", "--max-grad-norm", "1"], "max_grad_norm=1.0 has no effect", 2),
        (["--objective", "f1"], "has no gradient: take --optimizer mezo or mezo-bcd", 2),
        (["--optimizer", "mezo-bcd", "--blocks", "*q_prj*"], "'*q_prj*' matches no tensor", 2),
        (["--optimzer", "mezo"], "--optimizer", 2),
        (["--dataset", "nothing.jsonl"], "nothing.jsonl: no such file", 1),
    ],
)
def test_failures_are_one_line(
    words: list[str], message: str, code: int, model: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run(["tune", str(model), "--out", str(tmp_path / "out"), "--dataset", str(data), "--max-length", "32", *words])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (code, "")
    assert message in said.err and len(said.err.strip().splitlines()) == 1, said.err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_tunes_and_evaluates(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"steps:\n  - tune: {{model: {model}, dataset: {data}, steps: 2, max_length: 32, lora: true, merge: true,"
        " device: cpu, lr: 1e-3}\n"
        f"  - evaluate: {{before: {model}, after: [$tune], num_samples: 2, max_length: 32, speed: false}}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        run(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert not stopped.value.code
    assert (tmp_path / "run" / "01-tune" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"][1]["model"].endswith("01-tune")
