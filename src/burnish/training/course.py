"""The course of a training: lines of metrics.jsonl, and the live loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from burnish.runs import Progress

METRICS_FILE = "metrics.jsonl"
TRAINED = (
    "loss", "divergence", "nll", "hidden", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "rewards", "logps/chosen", "logps/rejected", "logps", "reward", "entropy", "kl", "length",
    "learning_rate", "grad_norm", "projected_gradient",
)  # fmt: skip
LINE_NAMES = {"learning_rate": "lr"}


@dataclass(frozen=True)
class Course:
    """What the lines of metrics.jsonl hold besides the step and the values of training.

    Attributes:
        per_step: what one step counts, such as `{"tokens": 4096}`.
        evaluated: keys of an evaluation and how they are called in messages; the first is there in each.
        names: of values that the lines call otherwise than the trainer; an evaluation's with `eval_` before both.
    """

    per_step: Mapping[str, int]
    evaluated: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The key that every evaluation has."""
        return next(iter(self.evaluated))

    def named(self, key: str) -> str:
        """What a line calls a value of the trainer's log."""
        plain = key.removeprefix("eval_")
        return key.removesuffix(plain) + (LINE_NAMES | dict(self.names)).get(plain, plain)

    def lines(self, log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines that a trainer's log comes to; without times, so that equal runs give equal files."""
        lines: list[dict[str, Any]] = []
        for entry in log_history:
            counted = {name: entry["step"] * count for name, count in self.per_step.items()}
            line: dict[str, Any] = {"step": entry["step"]} | counted
            if self.main in entry:
                line |= {self.named(key): entry[key] for key in self.evaluated if key in entry}
            elif "loss" in entry:
                line |= {self.named(key): entry[key] for key in TRAINED if key in entry}
            else:
                continue
            if not (lines and self.main in line and lines[-1].get(self.main) == line[self.main]
                    and lines[-1]["step"] == line["step"]):  # fmt: skip
                lines.append(line)
        return lines

    def evaluations(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """The first and the last evaluation, for the record."""
        found = [line for line in lines if self.main in line]
        return {"first_evaluation": found[0] if found else None, "last_evaluation": found[-1] if found else None}


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl as training goes, and the live loss into the progress line."""

    def __init__(self, course: Course, file: Path, progress: Progress) -> None:
        self.course, self.file, self.progress = course, file, progress
        self.held_out = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write all lines so far; after a resume they are those of the checkpoint."""
        if not state.is_world_process_zero:
            return
        lines = self.course.lines(state.log_history)
        if not lines:
            return
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        last, main = lines[-1], self.course.main
        if main in (logs or {}):
            words = {self.course.named(key): name for key, name in self.course.evaluated.items()}
            named = [f"{name} {last[key]:.4f}" for key, name in words.items() if key in last]
            self.held_out = f", held-out {named[0]}"
            if not self.progress.console.is_terminal:
                self.progress.say(f"step {last['step']}: {', '.join(named)}")
        elif "loss" in last:
            self.progress.note = f"loss {last['loss']:.4f}{self.held_out}"


class Advance(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        self.advance(1)
