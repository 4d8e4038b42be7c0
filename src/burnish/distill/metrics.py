"""The course of a training: lines of metrics.jsonl, and the live loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from burnish.runs import Progress


def metric_lines(log_history: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that a training's log comes to; without times, so that equal runs give equal files."""
    lines: list[dict[str, Any]] = []
    for entry in log_history:
        line: dict[str, Any] = {"step": entry["step"], "tokens": entry["step"] * tokens_per_step}
        if "eval_kl" in entry:
            line |= {"eval_kl": entry["eval_kl"], "eval_nll": entry["eval_nll"]}
        elif "loss" in entry:
            known = ("loss", "divergence", "nll", "hidden", "learning_rate", "grad_norm")
            line |= {("lr" if key == "learning_rate" else key): entry[key] for key in known if key in entry}
        else:
            continue
        if not (lines and "eval_kl" in line and lines[-1].get("eval_kl") == line["eval_kl"]
                and lines[-1]["step"] == line["step"]):  # fmt: skip
            lines.append(line)
    return lines


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl as training goes, and the live loss into the progress line."""

    def __init__(self, tokens_per_step: int, file: Path, progress: Progress) -> None:
        self.tokens_per_step, self.file, self.progress = tokens_per_step, file, progress
        self.kl = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write all lines so far; after a resume they are those of the checkpoint."""
        if not state.is_world_process_zero:
            return
        lines = metric_lines(state.log_history, self.tokens_per_step)
        if not lines:
            return
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        last = lines[-1]
        if "eval_kl" in (logs or {}):
            self.kl = f", held-out KL {last['eval_kl']:.4f}"
            if not self.progress.console.is_terminal:
                self.progress.say(f"step {last['step']}: KL {last['eval_kl']:.4f}, nll {last['eval_nll']:.4f}")
        elif "loss" in last:
            self.progress.note = f"loss {last['loss']:.4f}{self.kl}"


class Advance(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar."""

    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        self.advance(1)
