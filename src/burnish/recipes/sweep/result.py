"""What a sweep found: one row a configuration, the effects of its factors, and what became of the finalists."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.evaluate import Estimate, perplexity
from burnish.recipes.sweep.effects import Effect, log_divergence, main_effects, pareto_front
from burnish.recipes.sweep.grid import Configuration

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = "burnish.sweep/1"
FACTORS = ("score", "grouping", "scaling", "keep")
ROWS_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """A configuration and the quality of its student before distillation.

    Attributes:
        configuration: the cell of the grid.
        num_parameters: of the student.
        nll: negative log-likelihood of the held-out text, nats per token.
        forward_kl: KL(teacher || student), nats per token.
        shared_with: label of the configuration whose student is the same one, and was measured in its place.
    """

    configuration: Configuration
    num_parameters: int
    nll: Estimate
    forward_kl: Estimate
    shared_with: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "label": self.configuration.label,
            **self.configuration.to_dict(),
            "num_parameters": self.num_parameters,
            "nll": plain(self.nll),
            "perplexity": plain(perplexity(self.nll)),
            "forward_kl": plain(self.forward_kl),
            "shared_with": self.shared_with,
        }


@dataclass(frozen=True)
class Final:
    """A finalist's distillation; `evaluations` are (tokens trained on, held-out KL), the last one when it ended."""

    configuration: Configuration
    evaluations: tuple[tuple[int, float], ...]
    complete: bool

    @property
    def forward_kl(self) -> float:
        """Held-out KL when it ended."""
        return self.evaluations[-1][1] if self.evaluations else math.inf

    @property
    def tokens(self) -> int:
        """Trained on when it ended."""
        return self.evaluations[-1][0] if self.evaluations else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "label": self.configuration.label,
            **self.configuration.to_dict(),
            "complete": self.complete,
            "evaluations": [{"tokens": tokens, "forward_kl": kl} for tokens, kl in self.evaluations],
        }


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        out: the sweep's directory; None for a dry run.
        rows: one for each configuration, in the order of the grid; none of a dry run.
        teacher: name and parameters.
        evaluation: the setting that all rows share: text, tokens, dtype.
        record: the run record, as in `burnish.json`.
        finals: the finalists in the order of their rank before distillation.
        best: directory of the best finalist, where this machine has it.
    """

    out: Path | None
    rows: tuple[Row, ...]
    teacher: dict[str, Any]
    evaluation: dict[str, Any]
    record: dict[str, Any]
    finals: tuple[Final, ...] = ()
    best: Path | None = None
    forecast: list[str] = field(default_factory=list)

    @property
    def ranked(self) -> list[Row]:
        """Rows that were measured themselves, the smallest divergence first."""
        own = [row for row in self.rows if row.shared_with is None]
        return sorted(own, key=lambda row: (row.forward_kl.value, row.num_parameters, row.configuration))

    def effects(self) -> list[Effect]:
        """Main effect of every factor with more than one level on log KL, over all rows with a finite one."""
        if not self.rows or not all(math.isfinite(row.forward_kl.value) for row in self.rows):
            return []
        factors = {name: [getattr(row.configuration, name) for row in self.rows] for name in FACTORS}
        varied = {name: levels for name, levels in factors.items() if len(set(levels)) > 1}
        return main_effects(varied, [log_divergence(row.forward_kl.value) for row in self.rows])

    def front(self) -> list[Row]:
        """Rows that no other beats in both parameters and divergence, the smallest student first."""
        ranked = self.ranked
        return [ranked[index] for index in pareto_front([(r.num_parameters, r.forward_kl.value) for r in ranked])]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the content of `sweep.json`, the same for the same inputs."""
        return {
            "format": FORMAT,
            "teacher": self.teacher,
            "evaluation": self.evaluation,
            "rows": [row.to_dict() for row in self.rows],
            "front": [row.configuration.label for row in self.front()],
            "effects": [_effect(effect) for effect in self.effects()],
            "finals": [final.to_dict() for final in self.finals],
        }

    def table(self) -> Table:
        """The best rows."""
        from rich.table import Table

        measured = len(self.ranked)
        table = Table(
            caption=f"best {min(ROWS_SHOWN, measured)} of {measured} different students of {len(self.rows)}"
            f" configurations, before distillation; {self.evaluation['num_tokens']:,} held-out tokens, ± one standard"
            " error",
        )
        table.add_column("score")
        table.add_column("grouping")
        for heading in ("keep", "scaling", "parameters", "KL (nats)", "perplexity"):
            table.add_column(heading, justify="left" if heading == "scaling" else "right")
        for row in self.ranked[:ROWS_SHOWN]:
            cell, quality = row.configuration, perplexity(row.nll)
            table.add_row(
                *(cell.score, cell.grouping, str(cell.keep), cell.scaling, f"{row.num_parameters:,}"),
                f"{row.forward_kl.value:.4f} ± {row.forward_kl.standard_error:.4f}",
                f"{quality.value:,.1f} ± {quality.standard_error:,.1f}",
            )
        return table

    def summary(self) -> str:
        """A few lines for people, below the table; of a dry run, what it would do."""
        if self.out is None:
            return "\n".join([*self.forecast, "dry run, nothing written"])
        lines = [
            f"{effect.factor}: {effect.share:.0%} of the variance of log KL, {math.exp(effect.spread):.2f}x from best"
            " to worst level"
            for effect in sorted(self.effects(), key=lambda effect: -effect.share)
        ]
        for final in sorted(self.finals, key=lambda final: (not final.complete, final.forward_kl)):
            ended = "distilled" if final.complete else f"stopped after {final.tokens:,} tokens"
            lines.append(f"final {final.configuration.label}: {ended}, held-out KL {final.forward_kl:.4f}")
        if self.best is not None:
            lines.append(f"the best of them is {self.best}")
        return "\n".join([*lines, f"wrote {self.out}"])


def plain(estimate: Estimate) -> dict[str, float | None]:
    """What is not a finite number becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(estimate).items()}


def _effect(effect: Effect) -> dict[str, Any]:
    found = effect.to_dict()
    levels = [
        level | {"deviation": level["deviation"] if math.isfinite(level["deviation"]) else None}
        for level in found["levels"]
    ]
    return found | {"levels": levels}
