"""Look at a model before converting it: its family, its sizes, and what each choice of `keep` would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.densify.forecast import forecast
from burnish.densify.prepare import Subject, compute_dtype
from burnish.families import Family, describe_student
from burnish.families.engines import obstacles
from burnish.families.forecast import Forecast

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Option:
    """What one choice of `keep` and `grouping` would give.

    Attributes:
        keep: experts kept per layer.
        grouping: "merged" into top_k blocks, or "none": a block for each.
        width: feed-forward width.
        parameters, bytes: of the student.
        forecast: of writing it (no observation).
    """

    keep: int
    grouping: str
    width: int
    parameters: int
    bytes: int
    forecast: Forecast


@dataclass(frozen=True)
class Inspection:
    """What `burnish inspect` shows.

    Attributes:
        model: what was asked for.
        family, model_type: what it is.
        architecture: the student's class.
        why: one sentence where that is not a plain dense class.
        parameters, bytes: of the teacher.
        shape: layers, experts, top-k and widths.
        router: the routing rule.
        options: one for each choice.
        observe_router, observe_outputs: forecasts of observing with router-only and with all-expert scores.
        engines: what is known of the student in the engines asked for.
    """

    model: str
    family: str
    model_type: str
    architecture: str
    why: str | None
    parameters: int
    bytes: int
    shape: dict[str, Any]
    router: dict[str, Any]
    options: tuple[Option, ...]
    observe_router: Forecast
    observe_outputs: Forecast
    engines: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def table(self) -> Group:
        """Facts, then a table of options."""
        from rich.console import Group
        from rich.filesize import decimal
        from rich.table import Table
        from rich.text import Text

        shape, router = self.shape, self.router
        facts = [
            f"{self.model}: {self.family} ({self.model_type}), {self.parameters:,} parameters, {decimal(self.bytes)}",
            f"{len(shape['moe_layers'])} of {shape['num_layers']} layers have {shape['num_experts']} experts of width"
            f" {shape['expert_width']}, top {shape['top_k']}; hidden size {shape['hidden_size']}"
            + (f"; shared experts of width {shape['shared_width']}" if shape["shared_width"] else ""),
            f"router: {router['activation']}, {'' if router['renormalize'] else 'not '}renormalised"
            + (f", times {router['scaling_factor']:g}" if router["scaling_factor"] != 1 else "")
            + (f", best {router['top_k_groups']} of {router['num_groups']} groups" if router["num_groups"] > 1 else ""),
            f"becomes {self.architecture}" + (f": {self.why}" if self.why else ""),
        ]
        table = Table()
        for heading in ("keep", "blocks", "width", "parameters", "bytes", "reads", "peak memory", "time to write"):
            table.add_column(heading, justify="right")
        for option in self.options:
            table.add_row(
                str(option.keep),
                f"{shape['top_k']} merged" if option.grouping == "merged" else str(option.keep),
                f"{option.width:,}",
                f"{option.parameters:,}",
                decimal(option.bytes),
                decimal(option.forecast.bytes_read),
                decimal(option.forecast.act_peak_bytes),
                _seconds(option.forecast.act_seconds),
            )
        costs = [
            f"observing {name}: peak memory {decimal(cost.observe_peak_bytes)},"
            f" {_seconds(cost.observe_seconds)} on this CPU, {decimal(cost.disk_bytes)} of free disk with the output"
            for name, cost in (("routers (sf, pp, cp)", self.observe_router), ("all experts", self.observe_outputs))
        ]
        return Group(*map(Text, facts), table, *map(Text, costs), *map(Text, self.engines))


def inspect(
    model: str | Path,
    *,
    num_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 4,
    family: Family | str | Path | None = None,
    revision: str | None = None,
    engines: Sequence[str] = (),
) -> Inspection:
    """Describe a Mixture-of-Experts checkpoint and forecast its conversion.

    Reads headers, and up to 64 MiB of weights to time the disk; times a few matrix products.

    Args:
        model: directory or hub name.
        num_samples, max_length, batch_size: the calibration whose cost is forecast.
        family, revision: as for `burnish.densify`.
        engines: of `burnish.families.engines.ENGINES`, whose known obstacles are listed.

    Raises:
        BurnishError: as `burnish.densify`.
        ValueError: an unknown engine.
    """
    subject = Subject.open(model, revision=revision, family=family)
    shape = subject.shape
    max_length = min(max_length, subject.config.get("max_position_embeddings") or max_length)
    sizes = [shape.top_k]
    while sizes[-1] * 2 <= shape.num_experts:
        sizes.append(sizes[-1] * 2)
    if sizes[-1] < shape.num_experts:
        sizes.append(shape.num_experts)
    choices = [(shape.top_k, "none")]
    choices += [(keep, grouping) for keep in sizes[1:] for grouping in ("merged", "none")]

    def expect(keep: int, grouping: str, num_tokens: int, outputs: bool) -> tuple[Option, Forecast]:
        groups = keep if grouping == "none" else shape.top_k
        student = describe_student(subject.teacher, subject.family, subject.config, groups)
        expected = forecast(
            subject.teacher,
            student,
            experts_read=keep,
            num_tokens=num_tokens,
            max_length=max_length,
            batch_size=batch_size,
            outputs=outputs,
            dtype=compute_dtype(subject.config, student),
        )
        return Option(keep, grouping, student.width, student.num_parameters, student.nbytes, expected), expected

    student = describe_student(subject.teacher, subject.family, subject.config, shape.top_k)
    tokens = num_samples * max_length
    return Inspection(
        model=subject.teacher.name,
        family=subject.family.name,
        model_type=subject.family.model_type,
        architecture=student.twin.architecture,
        why=student.twin.why,
        parameters=subject.num_parameters(),
        bytes=subject.teacher.nbytes,
        shape=asdict(shape),
        router=asdict(subject.rule),
        options=tuple(expect(keep, grouping, 0, False)[0] for keep, grouping in choices),
        observe_router=expect(shape.top_k, "none", tokens, False)[1],
        observe_outputs=expect(shape.top_k, "none", tokens, True)[1],
        engines=tuple(
            line for engine in engines for line in obstacles(engine, student.twin.architecture, subject.teacher.path)
        ),
    )


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
