"""Students filled in memory are those that `densify` writes, and their numbers those that `evaluate` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.data import bundled_model
from burnish.densify import RoutingStatistics, densify
from burnish.densify.decide import decide
from burnish.densify.prepare import Subject
from burnish.evaluate import evaluate
from burnish.families import describe_student
from burnish.recipes.sweep import SweepResult, sweep
from burnish.recipes.sweep.grid import Configuration
from burnish.recipes.sweep.student import FilledStudent
from tests.conftest import FAMILIES, TinyModel, logits_of


def every_statistic(model: Path, out: Path, text: Path) -> Path:
    experts = Subject.open(model).shape.num_experts
    densify(model, out, keep=experts, plan_only=True, dataset=str(text), num_samples=8, max_length=32)
    return out / "statistics" / "routing.safetensors"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_filled_student_is_the_one_that_densify_writes(
    model_type: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path, some_tokens: torch.Tensor
) -> None:
    model = tiny_model(model_type)
    statistics = every_statistic(model, tmp_path / "seen", text_file)
    subject, seen = Subject.open(model), RoutingStatistics.load(statistics)
    top_k, experts = subject.shape.top_k, subject.shape.num_experts
    structure = describe_student(subject.teacher, subject.family, subject.config, top_k)
    student = FilledStudent(subject.teacher, structure, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    for score, keep, scaling in (
        ("sf", experts, "uniform"),
        ("do-acp", experts - 1, "score"),
        ("ean", top_k, "marginal"),
    ):
        cell = Configuration("router", keep, score, scaling)
        plan = decide(seen, cell.choice(subject.shape, subject.rule, 0), family=model_type, top_k=top_k)
        out = tmp_path / cell.label
        densify(model, out, score=score, keep=keep, grouping="router", scaling=scaling, statistics=statistics)
        with torch.inference_mode():
            found = student.fill(plan)(some_tokens).logits
        torch.testing.assert_close(found, logits_of(out, some_tokens), rtol=1e-6, atol=1e-6)


def test_only_what_a_plan_changes_is_filled_again(
    tiny_model: TinyModel, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3_moe")
    seen = RoutingStatistics.load(every_statistic(model, tmp_path / "seen", text_file))
    subject = Subject.open(model)
    structure = describe_student(subject.teacher, subject.family, subject.config, 2)
    student = FilledStudent(subject.teacher, structure, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    filled: list[str] = []
    tensor = FilledStudent._tensor
    monkeypatch.setattr(
        FilledStudent, "_tensor", lambda self, place, c: filled.append(place.name) or tensor(self, place, c)
    )
    for scaling, expected in (("uniform", ("gate", "up", "down")), ("uniform", ()), ("marginal", ("down",))):
        filled.clear()
        choice = Configuration("router", 4, "sf", scaling).choice(subject.shape, subject.rule, 0)
        student.fill(decide(seen, choice, family="qwen3_moe", top_k=2))
        assert {name.split(".")[-2].removesuffix("_proj") for name in filled} == set(expected)


def hold_against_evaluate(result: SweepResult, model: Path, statistics: Path, tmp_path: Path, **setting: Any) -> None:
    """Rows against students that were written and evaluated from disk."""
    for row in result.rows:
        cell = row.configuration
        student = tmp_path / cell.label
        densify(
            model,
            student,
            statistics=statistics,
            **{name: getattr(cell, name) for name in ("score", "keep", "grouping", "scaling")},
        )
        _, found = evaluate(before=model, after=student, dtype="float32", speed=False, **setting).rows
        assert found.comparison is not None
        assert row.num_parameters == found.num_parameters
        for mine, theirs in ((row.nll, found.nll), (row.forward_kl, found.comparison.forward_kl)):
            assert mine.value == pytest.approx(theirs.value, rel=1e-5)
            assert mine.standard_error == pytest.approx(theirs.standard_error, rel=1e-4, nan_ok=True)
    assert result.teacher["nll"]["value"] == pytest.approx(
        evaluate(model, dtype="float32", speed=False, **setting).rows[0].nll.value, rel=1e-5
    )


def test_numbers_are_those_of_densify_and_evaluate(tmp_path: Path) -> None:
    model = bundled_model()
    result = sweep(
        model,
        tmp_path / "sweep",
        scores=["sf", "do-acp"],
        groupings=["outputs", "none"],
        keeps=[6],
        num_samples=8,
        max_length=96,
        eval_samples=6,
        dtype="float32",
    )
    statistics = tmp_path / "sweep" / "statistics" / "statistics" / "routing.safetensors"
    hold_against_evaluate(result, model, statistics, tmp_path, num_samples=6, max_length=96)


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss"])
def test_numbers_hold_for_scaled_logits_and_for_one_padded_block(
    model_type: str, tiny_model: TinyModel, text_file: Path, tmp_path: Path
) -> None:
    model, short = tiny_model(model_type), tmp_path / "short.txt"
    short.write_text("the expert and a router of one layer")
    options = {"dataset": str(text_file), "num_samples": 8, "max_length": 64, "batch_size": 2}
    with pytest.warns(UserWarning, match="padded"):
        result = sweep(
            model, tmp_path / "sweep", scores=["cp"], groupings=["router"], eval_dataset=str(short), **options
        )
        statistics = tmp_path / "sweep" / "statistics" / "statistics" / "routing.safetensors"
        hold_against_evaluate(result, model, statistics, tmp_path, dataset=short, num_samples=64, max_length=64)
