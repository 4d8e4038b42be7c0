"""The before/after table in a model card: what it says, where it stands, when it is refused."""

import math
import os

import pytest

from burnish.errors import OutputError
from burnish.evaluate import Comparison, Estimate, EvaluateResult, Row, Speed, TaskResult, update_card
from burnish.evaluate.card import BEGIN, END


@pytest.fixture
def student(tmp_path):
    directory = tmp_path / "student"
    directory.mkdir()
    (directory / "burnish.json").write_text("{}")
    return directory


def result(student, perplexity=12.5):
    speeds = [(Speed(4, 8, 8, 10.0, 3200.0, 5.0, 800.0, 4 * 10**9),), (Speed(4, 8, 8, 5.0, 6400.0, 8.0, 500.0, 10**9),)]
    comparison = Comparison(Estimate(0.21, 0.013), Estimate(0.753, 0.004), Estimate(-0.11, 0.0063))
    rows = (
        Row("/models/teacher|1", 4000, 8000, Estimate(2.2, 0.01), Estimate(9.0, 0.1), None, speeds[0]),
        Row(str(student), 1000, 2000, Estimate(2.5, math.nan), Estimate(perplexity, 0.2), comparison, speeds[1]),
    )
    values = (Estimate(0.5, 0.05), Estimate(0.4, 0.04))
    differences = (None, Estimate(-0.1, 0.02))
    task = TaskResult("quiz", "1", 5, 100, "ab", "cd", "acc", "none", True, 100, values, differences)
    return EvaluateResult(
        rows=rows, dataset="/data/held-out.txt", split="test", sources={}, fingerprint="f00d", tokenizer_hash="beef",
        chat_template_hash=None, num_samples=64, max_length=512, num_tokens=32768, vocab_size=10, batch_size=4,
        dtype="float32", device="cpu", seed=3, environment={"versions": {"burnish": "0.1.0"}}, tasks=(task,),
    )  # fmt: skip


def test_the_table_says_what_was_measured(student):
    text = update_card(student, result(student)).read_text()
    for line in (
        "| | before: teacher\\|1 | this model | difference |",
        "| parameters | 4,000 | 1,000 | 0.25× |",
        "| perplexity | 9.000 ± 0.100 | 12.500 ± 0.200 |  |",
        "| loss, nats per token | 2.2000 ± 0.0100 | 2.5000 | −0.1100 ± 0.0063 |",
        "| KL(before ‖ this model), nats per token |  | 0.2100 ± 0.0130 |  |",
        "| quiz acc, 5-shot, first 100, chat template | 0.5000 ± 0.0500 | 0.4000 ± 0.0400 | −0.1000 ± 0.0200 |",
        "| decode tokens/s, batch 4 | 800 | 500 | 0.625× |",
        "32,768 tokens of held-out.txt in 64 blocks of 512, float32 on cpu; ± one standard error; seed 3; text f00d,"
        " tokenizer beef; burnish 0.1.0.",
    ):
        assert line in text.splitlines()
    assert "/models" not in text and "/data" not in text
    cells = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert cells == {5}


def test_the_rest_of_the_card_stays_and_a_second_call_replaces_the_table(student):
    card = student / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n")
    update_card(student, result(student))
    once = card.read_text()
    assert once.startswith("---\nlicense: mit\n---\n\n# Mine\n\n" + BEGIN + "\n")
    update_card(student, result(student))
    assert card.read_text() == once
    card.write_text(once + "\nMore.\n")
    update_card(student, result(student, perplexity=11.0))
    assert card.read_text() == once.replace("12.500", "11.000") + "\nMore.\n"
    assert sorted(file.name for file in student.iterdir()) == ["README.md", "burnish.json"]


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_a_card_with_broken_marks_is_refused_and_kept(student, text):
    (student / "README.md").write_text(text)
    with pytest.raises(OutputError, match="expected one <!-- burnish evaluation -->"):
        update_card(student, result(student))
    assert (student / "README.md").read_text() == text


def test_only_a_model_that_burnish_wrote_and_measured_is_updated(tmp_path, student):
    with pytest.raises(OutputError, match=r"no local directory with a burnish\.json"):
        update_card(tmp_path, result(tmp_path))
    with pytest.raises(OutputError, match="Qwen/Qwen3-8B: no local directory"):
        update_card("Qwen/Qwen3-8B", result(student))
    with pytest.raises(ValueError, match="not one of the models after: elsewhere"):
        update_card(student, result("elsewhere"))
    assert not (student / "README.md").exists()


def test_a_failed_write_keeps_the_old_card(student, monkeypatch):
    (student / "README.md").write_text("mine")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        update_card(student, result(student))
    assert (student / "README.md").read_text() == "mine"
    assert sorted(file.name for file in student.iterdir()) == ["README.md", "burnish.json"]
