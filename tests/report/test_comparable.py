"""Which results stand side by side, and which do not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from burnish.cli.report import report
from burnish.report import read_run, render
from burnish.report.comparable import quality_groups, task_rows
from burnish.report.records import Evaluation
from tests.report.conftest import sample_evaluation, sample_task, write
from tests.report.test_page import Page


@pytest.fixture
def evaluation(tmp_path: Path, make_run: Callable[..., Path]) -> Callable[..., Evaluation]:
    """Reads back what `burnish evaluate` would have written of one student, with changes."""

    def make(student: str = "student", task: dict[str, Any] | None = None, **changes: Any) -> Evaluation:
        directory = make_run()
        value = sample_evaluation([(student, 10**9, 12.0, 1.5)], 3 * 10**9)
        value["tasks"] = [sample_task("quiz", [0.5, 0.4], **(task or {}))]
        write(directory / "evaluation.json", value | changes)
        return read_run(directory).evaluations["evaluation.json"]

    return make


def test_one_setting_is_one_table_with_each_model_once(evaluation: Callable[..., Evaluation]) -> None:
    (group,) = quality_groups({"a": evaluation("x"), "b": evaluation("y")})
    assert [row.model for row in group.rows] == ["Qwen/Qwen3-30B-A3B", "x", "y"]
    assert group.before is group.rows[0]
    assert group.files == ("a", "b")
    (row,) = task_rows({"a": evaluation("x"), "b": evaluation("y")})
    assert {model: value.value for model, (value, _) in row.values.items()} == {
        "Qwen/Qwen3-30B-A3B": 0.5,
        "x": 0.4,
        "y": 0.4,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "seed 7, not 0"),
        ({"tokenizer_hash": "f" * 32}, "tokenizer ffffffff, not 51c0ffee12ab90de"),
        ({"chat_template_hash": "ab"}, "chat template ab, not none"),
        ({"fingerprint": "c0de"}, "text c0de, not 9f2c51d0a77be310"),
        ({"num_samples": 32}, "samples 32, not 64"),
        ({"max_length": 256}, "length 256, not 512"),
    ],
)
def test_u10_1_another_setting_is_another_table(
    evaluation: Callable[..., Evaluation], changes: dict[str, Any], said: str
) -> None:
    pair = {"a": evaluation("x"), "b": evaluation("y", **changes)}
    first, second = quality_groups(pair)
    assert (first.apart, second.apart) == ((), (said,))
    assert [row.model for row in second.rows] == ["Qwen/Qwen3-30B-A3B", "y"]
    (mixed,) = quality_groups(pair, mix_settings=True)
    assert [row.model for row in mixed.rows] == ["Qwen/Qwen3-30B-A3B", "x", "y"]


def test_u10_1_another_model_before_is_another_table(evaluation: Callable[..., Evaluation]) -> None:
    one, other = evaluation("x"), evaluation("y")
    other = replace(other, rows=(replace(other.rows[0], model="/data/models/other"), other.rows[1]))
    _, second = quality_groups({"a": one, "b": other})
    assert second.apart == ("model before other, not Qwen3-30B-A3B",)
    assert len(task_rows({"a": one, "b": other})) == 2


@pytest.mark.parametrize(
    "change",
    [{"version": "2.0"}, {"num_fewshot": 0}, {"limit": 50}, {"chat_template_hash": "ab"}, {"fingerprint": "others"}],
)
def test_u10_1_a_task_of_another_setting_has_another_row(
    evaluation: Callable[..., Evaluation], change: dict[str, Any]
) -> None:
    pair = {"a": evaluation("x"), "b": evaluation("y", task=change)}
    first, second = task_rows(pair)
    assert ("x" in first.values, "y" in first.values) == (True, False)
    assert ("x" in second.values, "y" in second.values) == (False, True)
    assert (first.file, second.file) == (None, "b" if "fingerprint" in change else None)
    (mixed,) = task_rows(pair, mix_settings=True)
    assert {"x", "y"} <= mixed.values.keys()


@pytest.mark.parametrize("change", [{"seed": 1}, {"tokenizer_hash": "ff"}])
def test_u10_1_what_all_tasks_share_splits_them_too(
    evaluation: Callable[..., Evaluation], change: dict[str, Any]
) -> None:
    first, second = task_rows({"a": evaluation("x"), "b": evaluation("y", **change)})
    assert "y" not in first.values
    assert second.file == "b"


def test_dtype_device_and_batch_size_do_not_part_results(evaluation: Callable[..., Evaluation]) -> None:
    pair = {"a": evaluation("x"), "b": evaluation("y", dtype="float32", device="cpu", batch_size=1)}
    assert len(quality_groups(pair)) == len(task_rows(pair)) == 1


def test_the_page_says_what_is_apart_unless_told_to_mix(make_run: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_run()
    write(directory / "evaluation-b.json", sample_evaluation([("other", 10**9, 12.0, 1.5)], 3 * 10**9) | {"seed": 1})
    run = read_run(directory)
    assert list(run.evaluations) == ["evaluation.json", "evaluation-b.json"]
    shown = Page(render(run))
    assert len(shown.having("table", class_="models")) == 2
    assert "evaluation-b.json, not to be compared with the table above: seed 1, not 0." in shown.words
    app = typer.Typer()
    app.command()(report)
    out = tmp_path / "page.html"
    assert CliRunner().invoke(app, [str(directory), "--out", str(out), "--mix-settings"]).exit_code == 0
    shown = Page(out.read_text())
    assert len(shown.having("table", class_="models")) == 1
    assert "not to be compared" not in shown.words
    assert "they do not compare the models alone" in shown.words


def test_speeds_of_different_files_are_not_compared(make_run: Callable[..., Path]) -> None:
    directory = make_run()
    assert "2.14×" in Page(render(read_run(directory))).words
    write(directory / "evaluation-b.json", sample_evaluation([("other", 10**9, 12.0, 1.5)], 3 * 10**9))
    shown = Page(render(read_run(directory))).words
    assert "other" in shown and "prefill" not in shown
