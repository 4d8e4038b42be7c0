"""Labels: closed forms of the formulas, and the file that people write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.align.labels import Question, ask, hard_labels, read_labels, reward_labels, sampled_labels, soft_labels
from burnish.errors import DataError, LabelsNeededError, ResumeMismatchError

FIRST, SECOND = torch.tensor([1.2, 0.0, -1.0, 2.0]), torch.tensor([0.0, 1.2, -1.0, 1.0])
QUESTIONS = [Question("0-0", "p", "yes", "no"), Question("0-1", [{"role": "user", "content": "é"}], "a", "b")]


def test_the_larger_reward_is_preferred_and_the_first_of_equal_ones() -> None:
    assert hard_labels(FIRST, SECOND).tolist() == [1, 0, 1, 1]


def test_soft_labels_are_those_of_the_worked_example() -> None:
    """Reward difference 1.2: 0.768525 in preference distillation."""
    assert soft_labels(FIRST, SECOND)[:3].tolist() == pytest.approx([0.768525, 1 - 0.768525, 0.5], abs=1e-6)
    assert float(soft_labels(FIRST, SECOND, scale=2.5)[3]) == pytest.approx(1 / (1 + 2.718281828**-2.5))


def test_sampled_labels_have_the_soft_ones_as_mean() -> None:
    count = 20_000
    first, second = torch.tensor([0.8]).expand(count), torch.zeros(count)
    drawn = sampled_labels(first, second, scale=0.5, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0.0, 1.0}
    share = 1 / (1 + 2.718281828**-0.4)
    assert abs(float(drawn.mean()) - share) < 3 * (share * (1 - share) / count) ** 0.5
    again = sampled_labels(first, second, scale=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


def test_each_kind_is_its_function() -> None:
    def labels(kind: str) -> list[float]:
        found = reward_labels(kind, FIRST, SECOND, scale=2.0, generator=torch.Generator().manual_seed(0))
        return found.tolist()

    assert labels("hard") == labels("best-worst") == hard_labels(FIRST, SECOND).tolist()
    assert labels("soft") == soft_labels(FIRST, SECOND, scale=2.0).tolist()
    generator = torch.Generator().manual_seed(0)
    assert labels("sampled") == sampled_labels(FIRST, SECOND, scale=2.0, generator=generator).tolist()


def write(directory: Path, *answers: Any) -> None:
    (directory / "labels.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def test_questions_are_written_once_and_answers_read_in_their_order(tmp_path: Path) -> None:
    with pytest.raises(
        LabelsNeededError, match=r"2 pairs wait for labels: write .*labels\.jsonl, a line .* run the same"
    ):
        ask(tmp_path, QUESTIONS)
    lines = (tmp_path / "to_label.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"id": "0-0", "prompt": "p", "a": "yes", "b": "no"}
    assert "é" in lines[1]
    with pytest.raises(LabelsNeededError):
        ask(tmp_path, QUESTIONS)
    write(tmp_path, {"id": "0-1", "label": 0.25, "who": "me"}, {"id": "0-0", "label": 1})
    assert ask(tmp_path, QUESTIONS).tolist() == [1.0, 0.25]
    with pytest.raises(ResumeMismatchError, match="holds other questions"):
        ask(tmp_path, QUESTIONS[:1])


GOOD = {"id": "0-0", "label": 1}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([GOOD, {"id": "0-1", "label": 1.5}], r"row 2: column 'label' is float 1.5, expected a number from 0 to 1"),
        ([GOOD, {"id": "0-1", "label": -0.1}], "row 2: column 'label' is float -0.1"),
        ([GOOD, {"id": "0-1", "label": float("nan")}], "row 2: column 'label' is float nan"),
        ([GOOD, {"id": "0-1", "label": True}], "row 2: column 'label' is bool True"),
        ([GOOD, {"id": "0-1", "label": "a"}], "row 2: column 'label' is str 'a'"),
        ([GOOD, {"id": "0-1"}], "row 2: column 'label' is missing; accepted"),
        ([{"label": 1}], "row 1: column 'id' is missing; accepted"),
        ([GOOD, {"id": "9-9", "label": 1}], "row 2: column 'id' is str '9-9', which was not asked"),
        ([GOOD, GOOD], "row 2: column 'id' is str '0-0' a second time"),
        ([GOOD, []], r"row 2: found list \[\], expected an object"),
        ([GOOD], "1 of 2 ids have no label, first '0-1'"),
        ([], "2 of 2 ids have no label, first '0-0'"),
    ],
)
def test_u9_3_answers_that_cannot_be_used(tmp_path: Path, answers: list[Any], message: str) -> None:
    write(tmp_path, *answers)
    with pytest.raises(DataError, match=message) as error:
        read_labels(tmp_path / "labels.jsonl", ["0-0", "0-1"])
    assert str(tmp_path / "labels.jsonl") in str(error.value)


def test_a_line_that_is_no_json_names_its_row(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text('{"id": "0-0", "label": 1}\nnothing\n')
    with pytest.raises(DataError, match="row 2: not JSON"):
        read_labels(tmp_path / "labels.jsonl", ["0-0"])
