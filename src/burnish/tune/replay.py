"""A base model and the log of a zeroth-order run are the tuned model: apply the log, write the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from burnish.checkpoint import Checkpoint, Staging
from burnish.checkpoint.load import foreign_bars_hidden
from burnish.checkpoint.staging import refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.errors import BurnishError
from burnish.families.conversion import RECORD_FORMAT, now, open_staging
from burnish.optim.perturbation import noise_layout
from burnish.optim.trajectory import Trajectory
from burnish.optim.trajectory import replay as apply_trajectory
from burnish.runs import Progress, choose_device, environment
from burnish.runs.randomness import random_state_kept
from burnish.training.adapters import NOT_OF_ADAPTERS, Lora, require_peft
from burnish.training.base import load_base, weights_hash, write_trained
from burnish.training.output import described, finish
from burnish.tune.card import replay_card


@dataclass(frozen=True)
class ReplayResult:
    """What a replay did.

    Attributes:
        out: the written directory; None for a dry run.
        record: the run record, as in `burnish.json`.
    """

    out: Path | None
    record: dict[str, Any]

    def summary(self) -> str:
        """A few lines for people."""
        training, name = self.record["training"], self.record["source"]["name"]
        lines = [f"{name}: {training['steps']:,} steps of {training['optimizer']}, {training['ends']}"]
        lines.append("dry run, nothing written" if self.out is None else f"wrote {self.out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out) if self.out else None, **self.record}


def replay(
    trajectory: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    merge: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ReplayResult:
    """Make the tuned model of its base and the log of the run: the same weights, bit for bit.

    Args:
        trajectory: `trajectory.jsonl` of a run of `burnish tune`, or the directory that holds it.
        model: directory or hub name of the base model that the run began with.
        out: directory to write; it appears complete or not at all.
        merge: write the model with the adapters added to its weights, in place of the adapters.
        dry_run: check the log and the base model; write nothing.
        overwrite: replace `out`.
        max_shard_size: with a unit, such as "5GB".
        trust_remote_code: run code beside the model.
        progress: where progress is shown; None is quiet.

    Returns:
        The output directory and the run record.

    Raises:
        BurnishError: the log is cut or changed, the model is not the one that the run began with, or the noise of this
            device is another than the log's.
        ValueError: `merge` of a run without adapters.

    Source: Malladi et al., arXiv 2305.17333, section 2.1 and appendix (a run is its seeds and scalars).

    Examples:
        >>> from burnish.tune import replay
        >>> replay("tuned/trajectory.jsonl", "facebook/opt-1.3b", "again")  # doctest: +SKIP
    """
    progress = progress or Progress(quiet=True)
    out, file, started = Path(out), Path(trajectory), now()
    file = file / "trajectory.jsonl" if file.is_dir() else file
    refuse_existing(out, overwrite=overwrite)
    log = Trajectory.read(file)
    base, noise = log.header.base, log.header.noise
    if not isinstance(base, dict) or not {"weights", "dtype", "lora"} <= base.keys():
        raise BurnishError(f"{file}: does not say which model it began with: it is no log of burnish tune")
    lora = Lora.of(base["lora"]) if base["lora"] else None
    if lora is not None:
        require_peft()
    elif merge:
        raise ValueError("merge=True, but this run has no adapters: leave it out")
    device = choose_device(noise.partition("/")[0])
    if noise_layout(device) != noise:
        raise BurnishError(f"{file}: its noise is {noise!r}, this version of burnish draws {noise_layout(device)!r}")
    source = Checkpoint.open(model)
    require_apart(out, source.path)
    require_disk_space(out, source.nbytes)
    progress.say(f"reading {source.name}")
    found = weights_hash(source)
    if found != base["weights"]:
        raise BurnishError(
            f"{source.name}: its weights have the hash {found}, the log began with {base['weights']}: give that model"
        )
    adapters = lora is not None and not merge
    described_source = described(source)
    record = {
        "format": RECORD_FORMAT,
        "verb": "replay",
        "started": started,
        "options": {"trajectory": str(file), "merge": merge, "max_shard_size": max_shard_size},
        "source": described_source,
        "output": {key: described_source[key] for key in ("architecture", "parameters", "bytes")},
        "training": {
            "steps": len(log.records),
            "optimizer": log.header.optimizer,
            "adapters": adapters,
            "ends": "whole" if log.result else "a run that did not end",
        },
        "environment": environment(),
        "notes": [] if log.result else ["the log has no end: these are the weights after its last step"],
    }
    if dry_run:
        return ReplayResult(None, record)
    fingerprint = {"log": asdict(log.header), "steps": len(log.records), "merge": merge}
    staging = open_staging(out, fingerprint, overwrite=True, resume=False)
    with _removed_on_failure(staging), staging.explaining("the output"), random_state_kept(), foreign_bars_hidden():
        base_model = load_base(source, base["dtype"], device, lora=lora, trust=trust_remote_code)
        with progress.task("replay", len(log.records), unit="steps") as advance:
            apply_trajectory(base_model, log, advance=advance)
        write_trained(source, base_model, staging, lora=lora, merge=merge, max_shard_size=max_shard_size)
        left = NOT_OF_ADAPTERS if adapters else frozenset()
        finish(record, source, staging, replay_card, device=device, leave=left)
    return ReplayResult(out, record)


@contextmanager
def _removed_on_failure(staging: Staging) -> Iterator[None]:
    """A replay is not resumed: nothing of one that failed stays."""
    try:
        yield
    except BaseException:
        shutil.rmtree(staging.path, ignore_errors=True)
        raise
