"""Compose observe, decide and act into one conversion; the only file that knows all the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from burnish.checkpoint import PlannedTensor, Staging, parse_size
from burnish.checkpoint.card import front_matter
from burnish.checkpoint.staging import hash_file, refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.densify.assemble import assemble
from burnish.densify.card import model_card
from burnish.densify.control import random_tensors
from burnish.densify.decide import decide
from burnish.densify.observe import observe
from burnish.densify.plan import DensifyPlan
from burnish.densify.prepare import Job, prepare
from burnish.densify.score import Probability
from burnish.densify.statistics import RoutingStatistics
from burnish.densify.teacher import StreamedTeacher
from burnish.families import Family
from burnish.families.conversion import RECORD_FORMAT, Conversion, keep_statistics, now, open_staging, write_checkpoint
from burnish.families.streaming import Calibration
from burnish.runs import Progress, environment, peak_rss_bytes, ranks, write_json

STATISTICS_FILE = Path("statistics") / "routing.safetensors"


class DensifyResult(Conversion[DensifyPlan]):
    """What a conversion did; `plan` is None for a control, and for a dry run that would have to observe first."""


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
    init: str = "experts",
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
        init: "experts", or a control of the same shape to distil beside it: "random-ffn" keeps all but the
            feed-forwards, "random" keeps nothing.
        progress: where progress is shown; silent by default.

    Raises:
        BurnishError: the input cannot be used or the output cannot be written; see `burnish.errors`.
        ValueError: an option is out of range.

    Source: arXiv 2605.28207, Algorithm 1 as far as it could be reconstructed; distillation follows as a second step.

    Examples:
        >>> from burnish import densify
        >>> densify("Qwen/Qwen3-30B-A3B", "qwen3-dense", score="do-acp")  # doctest: +SKIP
    """
    progress, out, started = progress or Progress(quiet=True), Path(out), now()
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
        init=init,
    )
    require_apart(out, job.subject.teacher.path)
    require_disk_space(out, job.forecast.disk_bytes)
    job.options.update(plan_only=plan_only, max_shard_size=max_shard_size, revision=revision)
    record = _new_record(job, started)
    if dry_run:
        return DensifyResult(None, job.given, record, job.forecast)
    for note in job.notes:
        progress.say(note)

    staging = open_staging(out, _fingerprint(job), overwrite=overwrite, resume=resume)
    with staging.explaining("the output"):
        decided = _work(job, staging, record, plan_only, max_shard_bytes, progress)
    return DensifyResult(out, decided, ranks.of_first(record), job.forecast)


def _work(
    job: Job, staging: Staging, record: dict[str, Any], plan_only: bool, max_shard_bytes: int, progress: Progress
) -> DensifyPlan | None:
    """Observe, decide, act, and publish; every rank decides the same, the first one acts. A control decides nothing."""
    clock = time.perf_counter()
    seen = _observe(job, staging, progress)
    observed = time.perf_counter()
    decided = job.given or (None if seen is None else _decide(job, seen))
    done_deciding = time.perf_counter()
    if ranks.rank() == 0:
        keep_statistics(seen, job.tokens.sources if job.tokens else {}, STATISTICS_FILE, staging, record)
        if decided is not None:
            (staging.files / "plan.json").write_text(decided.to_json(), encoding="utf-8")
        if not plan_only:
            write_checkpoint(
                job.subject.teacher,
                job.student.config,
                job.student.tensors,
                _compute(job, decided),
                staging,
                record,
                converted=job.student.converted,
                copied=job.student.copied,
                dropped=job.student.dropped,
                max_shard_bytes=max_shard_bytes,
                progress=progress,
            )
        acted = time.perf_counter()
        record["seconds"] = {
            "observe": observed - clock,
            "decide": done_deciding - observed,
            "act": acted - done_deciding,
        }
        record |= {"finished": now(), "peak_rss_bytes": peak_rss_bytes(), "forecast": job.forecast.to_dict()}
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


def _fingerprint(job: Job) -> dict[str, Any]:
    """What determines the output."""
    return {
        "options": job.options,
        "plan": job.given.to_json() if job.given else None,
        "statistics": hash_file(Path(job.options["statistics"])) if job.options["statistics"] else None,
        "structure": xxhash.xxh3_128_hexdigest(repr((job.student.config, job.student.tensors)).encode()),
        "data": job.tokens.fingerprint if job.tokens else None,
        "teacher": job.subject.teacher.fingerprint(),
    }


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


def _decide(job: Job, seen: RoutingStatistics) -> DensifyPlan:
    model_type, shape = job.subject.family.model_type, job.subject.shape
    unused = seen.unused_experts()
    if unused:
        named = ", ".join(f"{layer}/{expert}" for layer, expert in unused[:8]) + (" ..." if len(unused) > 8 else "")
        job.notes.append(f"{len(unused)} experts were chosen by no calibration token (layer/expert): {named}")
    plan = decide(seen, job.choice, family=model_type, top_k=shape.top_k, notes=job.notes)
    return plan.require_fits(model_type, shape)


def _compute(job: Job, plan: DensifyPlan | None) -> Callable[[PlannedTensor], Tensor]:
    """What gives the student's tensors that are not copies."""
    compute = assemble(job.student, plan, job.subject.teacher, seed=job.choice.seed)
    return compute if plan else random_tensors(job.student, compute, seed=job.choice.seed)


def _write_card(job: Job, plan: DensifyPlan | None, record: dict[str, Any], staging: Staging) -> None:
    card = model_card(record, plan, front_matter(job.subject.teacher))
    (staging.files / "README.md").write_text(card, encoding="utf-8")
