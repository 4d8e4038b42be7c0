"""What all verbs that make one checkpoint of another have in common: the record, the staging, the act, the result."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor

from burnish.checkpoint import (
    Checkpoint,
    PlannedTensor,
    Staging,
    copy_other_files,
    plan_shards,
    verify_output,
    write_shards,
)
from burnish.errors import BurnishError, OutputError
from burnish.families.forecast import Forecast
from burnish.runs import Progress, environment, ranks, write_json
from burnish.sums import ModelSums

RECORD_FORMAT = "burnish.run/1"
OWN_FILES = frozenset(
    {
        "config.json",
        "README.md",
        "plan.json",
        "burnish.json",
        "metrics.jsonl",
        "trajectory.jsonl",
        "evaluation.json",
        "report.html",
    }
)
"""Files of a run: they are about the source, and its descendants get their own or none."""
Plan = TypeVar("Plan")
PlanModel = TypeVar("PlanModel", bound=BaseModel)


@dataclass(frozen=True)
class Conversion(Generic[Plan]):
    """What a conversion did.

    Attributes:
        out: the written directory; None for a dry run.
        plan: the decision; None for a dry run that would have to observe first.
        record: the run record, as in `burnish.json`.
        forecast: what was expected before the start.
    """

    out: Path | None
    plan: Plan | None
    record: dict[str, Any]
    forecast: Forecast

    def summary(self) -> str:
        """A few lines for people: what became what, and what it took or would take."""
        source, output, expected = self.record["source"], self.record["output"], self.forecast
        lines = [
            f"{source['architecture']} -> {output['architecture']}: {source['parameters']:,} ->"
            f" {output['parameters']:,} parameters, {source['bytes']:,} -> {output['bytes']:,} bytes"
        ]
        if self.out is None:
            peak = max(expected.observe_peak_bytes, expected.act_peak_bytes)
            lines.append(
                f"dry run, nothing written: peak memory about {peak / 1e9:.2f} GB; reads {expected.bytes_read:,} and"
                f" writes {expected.bytes_written:,} bytes; free disk needed {expected.disk_bytes:,} bytes; time about"
                f" {expected.observe_seconds + expected.act_seconds:.0f} s on this CPU"
            )
            lines += self.record["notes"]
        else:
            seconds = ", ".join(f"{name} {value:.1f} s" for name, value in self.record["seconds"].items())
            lines.append(f"{seconds}; peak memory {self.record['peak_rss_bytes'] / 1e9:.2f} GB")
            lines.append(f"wrote {self.out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out) if self.out else None, **self.record, "forecast": self.forecast.to_dict()}


def load_plan(kind: type[PlanModel], file: Path) -> PlanModel:
    """Read a plan file.

    Raises:
        BurnishError: the file is missing or is not a plan of this kind; names the field.
    """
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BurnishError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BurnishError(f"{file}: not UTF-8 text ({error.reason})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BurnishError(f"{file}: not a plan: {where}: {first['msg']}") from error


def now() -> str:
    """The time of day, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def open_staging(out: Path, fingerprint: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Staging:
    """The work directory beside the output; the first rank opens it, the others follow.

    Args:
        out: the output.
        fingerprint: what determines the output; versions and the number of ranks are added.
        overwrite, resume: as for `Staging`.
    """
    versions = environment()["versions"]
    assert isinstance(versions, dict)
    whole = {
        **fingerprint,
        "versions": {name: versions[name] for name in ("burnish", "torch", "transformers")},
        "world_size": ranks.world_size(),
    }
    ranks.join_ranks()
    if ranks.rank() == 0:
        staging = Staging(out, whole, overwrite=overwrite, resume=resume)
        ranks.wait_for_all()
        return staging
    ranks.wait_for_all()
    return Staging(out, whole, overwrite=overwrite)


def keep_statistics(
    seen: ModelSums[Any] | None, documents: Mapping[str, int], file: Path, staging: Staging, record: dict[str, Any]
) -> None:
    """Keep what was seen with the output, and record how much that was.

    Args:
        seen: None where a given plan needed none.
        documents: used from each source of text.
        file: where in the output.
        staging, record: of the run.
    """
    record["statistics"] = {
        "num_tokens": seen.num_tokens if seen else 0,
        "bytes": seen.nbytes if seen else 0,
        "documents": documents,
    }
    if seen is not None:
        (staging.files / file).parent.mkdir(exist_ok=True)
        seen.save(staging.files / file)


def write_checkpoint(
    source: Checkpoint,
    config: dict[str, Any],
    tensors: Collection[PlannedTensor],
    compute: Callable[[PlannedTensor], Tensor],
    staging: Staging,
    record: dict[str, Any],
    *,
    converted: Collection[str],
    copied: Collection[str],
    dropped: Collection[str],
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """Write a checkpoint and what lies beside it into `staging`, verify it, and record the counts and files.

    Args:
        source: what it is made from.
        config: content of its `config.json`.
        tensors: all of its tensors.
        compute: gives those that are not copies.
        staging: where it is written.
        record: the run record, which is added to.
        converted, copied, dropped: what became of each tensor of the source, by name.
        max_shard_bytes: of a file of weights.
        progress: where progress is shown.

    Raises:
        OutputError: the written tensors are not those planned, or a tensor of the source is not accounted for.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    before = source.bytes_read
    with progress.task("write", sum(tensor.nbytes for tensor in tensors), unit="bytes") as advance:
        written = write_shards(source, shards, compute, staging, advance=advance)
    record |= {"bytes_read": source.bytes_read - before, "bytes_written": written}
    kinds = {"converted": converted, "copied": copied, "dropped": dropped}
    record["counts"] = {"read": len(source.tensors)} | {kind: len(names) for kind, names in kinds.items()}
    if sorted(name for names in kinds.values() for name in names) != sorted(source.tensors):
        raise OutputError(f"{staging.out}: tensors do not add up: {record['counts']}")
    record["dropped_tensors"] = sorted(dropped)
    others = copy_other_files(source, staging, OWN_FILES)
    changed = sorted(OWN_FILES & {str(file) for file in source.other_files()})
    record["files"] = {"copied": others, "changed": changed, "dropped": source.left_files()}
    write_json(staging.files / "config.json", config)
    verify_output(staging.files, shards)
