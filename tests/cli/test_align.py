"""`burnish align` as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.cli.main import run
from tests.align.test_align import pairs_of, write
from tests.cli.test_main import NO_SOCKETS, burnish
from tests.tune.conftest import save_llama

REWARD = """
def length(prompts, completions):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pairs_of(16, 0))


def test_u11_1_u11_2_align_and_report_without_a_network_with_or_without_the_offline_variable(
    model: Path, data: Path, tmp_path: Path
) -> None:
    options = ["--dataset", str(data), "--eval_dataset", str(data), "--max-length", "32", "--device", "cpu", "--lora"]
    options += ["--objective", "cdpo", "--beta=0.3", "--set", "label_smoothing=0.2", "--steps", "4", "--lr", "1e-3"]
    done = burnish("align", str(model), "--out", str(tmp_path / "out"), *options, "--json", code=NO_SOCKETS,
                   env={"HF_HUB_OFFLINE": "0"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["training"]["objective_options"] == {"beta": 0.3, "label_smoothing": 0.2}
    assert (result["options"]["eval_dataset"], result["training"]["adapters"]) == (str(data), True)
    assert burnish("report", str(tmp_path / "out")).returncode == 0
    assert "aligned with cdpo over 4 steps, adapters" in (tmp_path / "out" / "report.html").read_text()


def test_rounds_with_a_reward_of_the_user_s_own_file(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    options = ["--dataset", str(data), "--max-length", "32", "--rounds", "2", "--steps", "2", "--lora"]
    options += [
        "--reward-model",
        f"{tmp_path / 'reward.py'}:length",
        "--max-new-tokens",
        "4",
        "--reward-clip",
        "0",
        "2",
    ]
    options += [
        "--sampler",
        "design",
        "--sampler",
        "policy",
        "--cold-start",
        "--accumulate",
        "--samples-per-prompt",
        "3",
    ]
    done = burnish("align", str(model), "--out", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 rounds of 2 steps of 8 rows" in done.stdout
    told = json.loads((tmp_path / "out" / "burnish.json").read_text())
    assert told["options"]["sampler"] == ["design", "policy"] and told["options"]["warm_start"] is False
    assert told["options"]["reward_clip"] == [0.0, 2.0]
    assert [line["rounds"] for line in told["training"]["rounds"]] == [0, 1, 2]
    assert told["training"]["rounds"][2]["rows"] == 32  # of both rounds


def test_all_objectives_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    from burnish.align.objectives import OBJECTIVES

    with pytest.raises(SystemExit) as stopped:
        run(["align", "--objectives"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[::2]] == list(OBJECTIVES)
    dpo = said.index(next(line for line in said if line.startswith("dpo ")))
    assert "pairs, reference" in said[dpo] and "beta=0.1" in said[dpo + 1]


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--objective", "dop"], "nearest is 'dpo'", 2),
        (["--set", "beta"], "--set beta: expected key=value", 2),
        (["--set", "betta=1"], "nearest is 'beta'", 2),
        (["--rounds", "1"], "need --reward-model", 2),
        (["--obejctive", "dpo"], "--objective", 2),
        (["--dataset", "nothing.jsonl"], "nothing.jsonl: no such file", 1),
    ],
)
def test_failures_are_one_line(
    words: list[str], message: str, code: int, model: Path, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run(["align", str(model), "--out", str(tmp_path / "out"), "--dataset", str(data), "--max-length", "32", *words])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (code, "")
    assert message in said.err and len(said.err.strip().splitlines()) == 1, said.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_trl_says_what_to_install(model: Path, data: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['trl'] = None"
    done = burnish("align", str(model), "--out", str(tmp_path / "out"), "--dataset", str(data), code=code)
    assert done.returncode == 1 and 'pip install "burnish[align]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_recipe_aligns_in_two_passes(model: Path, data: Path, tmp_path: Path) -> None:
    common = f"model: {model}, dataset: {data}, steps: 2, max_length: 32, device: cpu, lr: 1e-3"
    (tmp_path / "recipe.yaml").write_text(
        f"steps:\n  - align: {{{common}, objective: simpo, options: {{gamma_beta_ratio: 0.5}}}}\n    as: guide\n"
        f"  - align: {{{common}, objective: dpo, reference: $guide, beta: 0.05}}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        run(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert not stopped.value.code
    record = json.loads((tmp_path / "run" / "02-align" / "burnish.json").read_text())
    assert record["options"]["reference"].endswith("01-guide") and record["training"]["objective"] == "dpo"
