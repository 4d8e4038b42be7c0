"""Lines of metrics.jsonl from a trainer's log."""

from __future__ import annotations

from burnish.training.course import Course

LOG = [
    {"step": 0, "eval_loss": 9.0, "eval_nll": 2.5, "eval_runtime": 1.0},
    {"step": 2, "loss": 2.0, "nll": 1.5, "learning_rate": 0.1, "epoch": 0.5, "grad_norm": 3.0},
    {"step": 4, "eval_nll": 1.0, "eval_score": 0.25},
    {"step": 4, "eval_nll": 1.0, "eval_score": 0.25, "eval_runtime": 2.0},
    {"step": 4, "train_runtime": 3.0, "total_flos": 1.0},
]


def test_lines_hold_steps_counts_and_values_without_times() -> None:
    course = Course({"tokens": 64, "examples": 2}, {"eval_nll": "nll", "eval_score": "f1"})
    lines = course.lines(LOG)
    assert lines == [
        {"step": 0, "tokens": 0, "examples": 0, "eval_nll": 2.5},
        {"step": 2, "tokens": 128, "examples": 4, "loss": 2.0, "nll": 1.5, "lr": 0.1, "grad_norm": 3.0},
        {"step": 4, "tokens": 256, "examples": 8, "eval_nll": 1.0, "eval_score": 0.25},  # once, also after a resume
    ]
    assert course.evaluations(lines) == {"first_evaluation": lines[0], "last_evaluation": lines[2]}
    assert course.evaluations(lines[1:2]) == {"first_evaluation": None, "last_evaluation": None}


def test_an_evaluation_is_told_by_its_first_key() -> None:
    lines = Course({}, {"eval_score": "f1", "eval_nll": "nll"}).lines(LOG)
    assert lines == [{"step": 2, "loss": 2.0, "nll": 1.5, "lr": 0.1, "grad_norm": 3.0},
                     {"step": 4, "eval_score": 0.25, "eval_nll": 1.0}]  # fmt: skip
