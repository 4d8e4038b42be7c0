"""Compose observe, decide and act into one conversion; the only file that knows all the others."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from burnish.checkpoint import Staging, copy_other_files, parse_size, plan_shards, verify_output, write_shards
from burnish.checkpoint.staging import hash_file, refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.densify import ranks
from burnish.densify.assemble import assemble
from burnish.densify.card import front_matter_of, model_card
from burnish.densify.decide import decide
from burnish.densify.forecast import Forecast
from burnish.densify.observe import Calibration, observe
from burnish.densify.plan import DensifyPlan
from burnish.densify.prepare import Job, prepare
from burnish.densify.score import Probability
from burnish.densify.statistics import RoutingStatistics
from burnish.densify.teacher import StreamedTeacher
from burnish.errors import OutputError
from burnish.families import Family
from burnish.runs import Progress, environment, peak_rss_bytes, write_json

STATISTICS_FILE = Path("statistics") / "routing.safetensors"
RECORD_FORMAT = "burnish.run/1"
OWN_FILES = frozenset({"config.json", "README.md", "plan.json", "burnish.json"})


@dataclass(frozen=True)
class DensifyResult:
    """What a conversion did.

    Attributes:
        out: the written directory; None for a dry run.
        plan: the decision; None for a dry run that would have to observe first.
        record: the run record, as in `burnish.json`.
        forecast: what was expected before the start.
    """

    out: Path | None
    plan: DensifyPlan | None
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
        else:
            seconds = ", ".join(f"{name} {value:.1f} s" for name, value in self.record["seconds"].items())
            lines.append(f"{seconds}; peak memory {self.record['peak_rss_bytes'] / 1e9:.2f} GB")
            lines.append(f"wrote {self.out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"out": str(self.out) if self.out else None, **self.record, "forecast": self.forecast.to_dict()}


def densify(
    model: str | Path,
    out: str | Path,
    *,
    score: str = "do-acp",
    keep: int | None = None,
    grouping: str = "weights",
    scaling: str = "auto",
    dataset: str | None = None,
    num_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 4,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    plan: DensifyPlan | str | Path | None = None,
    statistics: str | Path | None = None,
    plan_only: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    max_shard_size: str = "5GB",
    probability: Probability = "softmax",
    ridge: float | None = None,
    normalize_gram: bool = False,
    family: Family | str | Path | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> DensifyResult:
    """Convert a Mixture-of-Experts checkpoint into a dense one.

    The teacher is streamed layer by layer over calibration tokens (observe), experts are chosen from what was seen
    (decide), and their matrices are concatenated into ordinary feed-forward layers (act).

    Args:
        model: directory or hub name of the teacher.
        out: directory to write; it appears complete or not at all.
        score: "sf", "pp", "cp", "acp", "do-acp", "reap" or "ean"; see `burnish.densify.score`.
        keep: experts kept per layer, from the router's top-k (the default: pure pruning) to all.
        grouping: how `keep` > top_k experts are merged into top_k blocks: "weights", "outputs", "router", "dominant",
            "balanced"; or "none" to keep a block for each, in a wider student.
        scaling: "uniform", "score", "conditional", "mass", "marginal", "least-squares", or "auto": uniform where the
            router's weights sum to one, conditional elsewhere.
        dataset: calibration text: a file, a directory, a `datasets` name; None is the bundled corpus.
        num_samples: calibration sequences.
        max_length: tokens in each.
        batch_size: sequences per forward pass.
        seed: of the choice of calibration text, of random groups and of padding.
        dtype: "auto" keeps the stored type; "float32", "bfloat16" or "float16" casts the output.
        device: "auto", "cpu", "cuda" or "cuda:N": where the teacher computes.
        plan: apply this plan (or plan file) instead of observing and deciding.
        statistics: decide from this statistics file (`OUT/statistics/routing.safetensors` of an earlier run).
        plan_only: write the plan and the statistics, but no model.
        dry_run: check everything and forecast; write nothing.
        overwrite: replace `out`, and discard unfinished work of other inputs.
        resume: continue unfinished work of the same inputs.
        max_shard_size: with a unit, such as "5GB".
        probability: which router weight CP averages; see `burnish.densify.decide.Choice`, as for the next two.
        ridge: of the D-optimal selection.
        normalize_gram: cosines in the D-optimal kernel.
        family: a family, or a Python file that defines one, for models that are not built in.
        revision: branch, tag or commit on the hub.
        progress: where progress is shown; silent by default.

    Raises:
        BurnishError: the input cannot be used or the output cannot be written; see `burnish.errors`.
        ValueError: an option is out of range.

    Source: arXiv 2605.28207, Algorithm 1 as far as it could be reconstructed; distillation follows as a second step.

    Example:
        >>> from burnish import densify
        >>> densify("Qwen/Qwen3-30B-A3B", "qwen3-dense", score="do-acp")  # doctest: +SKIP
    """
    progress, out, started = progress or Progress(quiet=True), Path(out), _now()
    refuse_existing(out, overwrite=overwrite)
    max_shard_bytes = parse_size(max_shard_size)
    job = prepare(
        model,
        score=score,
        keep=keep,
        grouping=grouping,
        scaling=scaling,
        dataset=dataset,
        num_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        plan=plan,
        statistics=statistics,
        probability=probability,
        ridge=ridge,
        normalize_gram=normalize_gram,
        family=family,
        revision=revision,
    )
    require_apart(out, job.subject.teacher.path)
    require_disk_space(out, job.forecast.disk_bytes)
    job.options.update(plan_only=plan_only, max_shard_size=max_shard_size, revision=revision)
    record = _new_record(job, started)
    if dry_run:
        return DensifyResult(None, job.given, record, job.forecast)
    for note in job.notes:
        progress.say(note)

    staging = _open_staging(job, out, overwrite=overwrite, resume=resume)
    with staging.explaining("the output"):
        decided = _work(job, staging, record, plan_only, max_shard_bytes, progress)
    ranks.wait_for_all()
    return DensifyResult(out, decided, record, job.forecast)


def _work(
    job: Job, staging: Staging, record: dict[str, Any], plan_only: bool, max_shard_bytes: int, progress: Progress
) -> DensifyPlan:
    """Observe, decide, act, and publish; every rank decides the same, the first one acts."""
    clock = time.perf_counter()
    seen = _observe(job, staging, progress)
    observed = time.perf_counter()
    decided = job.given or _decide(job, seen)
    done_deciding = time.perf_counter()
    if ranks.rank() == 0:
        _record_statistics(job, seen, record, staging)
        (staging.files / "plan.json").write_text(decided.to_json(), encoding="utf-8")
        if not plan_only:
            _act(job, decided, staging, max_shard_bytes, record, progress)
        now = time.perf_counter()
        record["seconds"] = {
            "observe": observed - clock,
            "decide": done_deciding - observed,
            "act": now - done_deciding,
        }
        record |= {"finished": _now(), "peak_rss_bytes": peak_rss_bytes(), "forecast": job.forecast.to_dict()}
        if not plan_only:
            _write_card(job, decided, record, staging)
        write_json(staging.files / "burnish.json", record)
        staging.publish()
    return decided


def _new_record(job: Job, started: str) -> dict[str, Any]:
    subject, student = job.subject, job.student
    return {
        "format": RECORD_FORMAT,
        "verb": "densify",
        "started": started,
        "options": job.options,
        "source": {
            "name": subject.teacher.name,
            "family": subject.family.name,
            "model_type": subject.family.model_type,
            "architecture": (subject.teacher.config.get("architectures") or ["unknown"])[0],
            "parameters": subject.num_parameters(),
            "bytes": subject.teacher.nbytes,
        },
        "output": {
            "architecture": student.twin.architecture,
            "parameters": student.num_parameters,
            "bytes": student.nbytes,
        },
        "environment": environment(),
        "notes": job.notes,
    }


def _open_staging(job: Job, out: Path, *, overwrite: bool, resume: bool) -> Staging:
    """The work directory beside the output; the first rank opens it, the others follow."""
    versions = environment()["versions"]
    assert isinstance(versions, dict)
    fingerprint = {
        "options": job.options,
        "plan": job.given.to_json() if job.given else None,
        "statistics": hash_file(Path(job.options["statistics"])) if job.options["statistics"] else None,
        "structure": xxhash.xxh3_128_hexdigest(repr((job.student.config, job.student.tensors)).encode()),
        "data": job.tokens.fingerprint if job.tokens else None,
        "teacher": job.subject.teacher.fingerprint(),
        "versions": {name: versions[name] for name in ("burnish", "torch", "transformers")},
        "world_size": ranks.world_size(),
    }
    ranks.join_ranks()
    if ranks.rank() == 0:
        staging = Staging(out, fingerprint, overwrite=overwrite, resume=resume)
        ranks.wait_for_all()
        return staging
    ranks.wait_for_all()
    return Staging(out, fingerprint, overwrite=overwrite)


def _observe(job: Job, staging: Staging, progress: Progress) -> RoutingStatistics | None:
    """Statistics to decide from: seen now, or those given; None where a given plan needs none."""
    if job.tokens is None:
        return job.stored
    share = slice(ranks.rank(), None, ranks.world_size())
    calibration = Calibration(job.tokens.input_ids[share], job.tokens.attention_mask[share])
    teacher = StreamedTeacher(
        job.subject.teacher,
        job.subject.family,
        job.subject.config,
        job.student.storage,
        device=job.device,
        dtype=job.dtype,
    )
    batches = -(-len(calibration.input_ids) // job.batch_size)
    with progress.task("observe", (max(job.subject.shape.moe_layers) + 1) * batches, unit="batches") as advance:
        seen = observe(
            teacher,
            job.subject.rule,
            calibration,
            outputs=job.choice.needs_outputs,
            weights=job.choice.needs_weights,
            batch_size=job.batch_size,
            work=staging.work / f"rank-{ranks.rank()}",
            advance=advance,
        )
    return ranks.merge_over_ranks(seen)


def _decide(job: Job, seen: RoutingStatistics | None) -> DensifyPlan:
    assert seen is not None
    model_type, shape = job.subject.family.model_type, job.subject.shape
    unused = seen.unused_experts()
    if unused:
        named = ", ".join(f"{layer}/{expert}" for layer, expert in unused[:8]) + (" ..." if len(unused) > 8 else "")
        job.notes.append(f"{len(unused)} experts were chosen by no calibration token (layer/expert): {named}")
    plan = decide(seen, job.choice, family=model_type, top_k=shape.top_k, notes=job.notes)
    return plan.require_fits(model_type, shape)


def _record_statistics(job: Job, seen: RoutingStatistics | None, record: dict[str, Any], staging: Staging) -> None:
    record["statistics"] = {
        "num_tokens": seen.num_tokens if seen else 0,
        "bytes": seen.nbytes if seen else 0,
        "documents": job.tokens.sources if job.tokens else {},
    }
    if seen is not None:
        (staging.files / STATISTICS_FILE).parent.mkdir(exist_ok=True)
        seen.save(staging.files / STATISTICS_FILE)


def _act(
    job: Job, plan: DensifyPlan, staging: Staging, max_shard_bytes: int, record: dict[str, Any], progress: Progress
) -> None:
    """Write the student into the staging directory, verify it, and record the counts and files."""
    teacher, student = job.subject.teacher, job.student
    shards = plan_shards(student.tensors, max_shard_bytes)
    compute = assemble(student, plan, teacher, seed=job.choice.seed)
    before = teacher.bytes_read
    with progress.task("write", student.nbytes, unit="bytes") as advance:
        written = write_shards(teacher, shards, compute, staging, advance=advance)
    record |= {"bytes_read": teacher.bytes_read - before, "bytes_written": written}
    record["counts"] = {
        "read": len(teacher.tensors),
        "converted": len(student.converted),
        "copied": sum(tensor.copy_of is not None for tensor in student.tensors) + len(student.casts),
        "dropped": len(student.dropped),
    }
    if record["counts"]["read"] != sum(record["counts"][kind] for kind in ("converted", "copied", "dropped")):
        raise OutputError(f"{staging.out}: tensors do not add up: {record['counts']}")
    record["dropped_tensors"] = sorted(student.dropped)
    copied = copy_other_files(teacher, staging, OWN_FILES)
    changed = sorted(OWN_FILES & {str(file) for file in teacher.other_files()})
    record["files"] = {"copied": copied, "changed": changed, "dropped": teacher.left_files()}
    write_json(staging.files / "config.json", student.config)
    verify_output(staging.files, shards)


def _write_card(job: Job, plan: DensifyPlan, record: dict[str, Any], staging: Staging) -> None:
    card = job.subject.teacher.path / "README.md"
    front_matter = front_matter_of(card.read_text(encoding="utf-8", errors="replace")) if card.exists() else {}
    (staging.files / "README.md").write_text(model_card(record, plan, front_matter), encoding="utf-8")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
