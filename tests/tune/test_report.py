"""The page of a tuning: its course, its tiles, and a word on what was done."""

from __future__ import annotations

from pathlib import Path

from burnish.report.page import courses, description, render, tiles
from burnish.report.records import read_run
from tests.tune.conftest import ZEROTH, Run


def test_the_course_is_that_of_the_loss_once(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "out", **ZEROTH)
    (conversion,) = (found := read_run(tmp_path / "out")).conversions
    (course,) = courses(conversion.metrics)
    assert (course.name, course.unit) == ("Negative log-likelihood, nats per token", "steps")
    assert course.trained and course.evaluated
    assert description(conversion) == "tuned with mezo-bcd over 12 steps"
    assert [tile.name for tile in tiles(found, ())] == ["Parameters", "Size on disk", "Held-out loss, nats"]
    assert "<svg" in render(found)


def test_a_score_has_its_own_drawing_and_rises(run: Run, tmp_path: Path) -> None:
    options = {"optimizer": "mezo", "objective": "f1", "lora": True, "steps": 2, "eval_every": 1}
    run(tmp_path / "out", **options | {"lr": 1e-3})
    (conversion,) = (found := read_run(tmp_path / "out")).conversions
    names = [course.name for course in courses(conversion.metrics)]
    assert names == ["Negative log-likelihood, nats per token", "Mean score of generated answers", "Training loss"]
    assert description(conversion) == "tuned with mezo over 2 steps, adapters"
    assert "Held-out score" in [tile.name for tile in tiles(found, ())]
