"""Compose observe, decide and act into one pruning; the only file that knows all the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from burnish.checkpoint import Staging, parse_size
from burnish.checkpoint.card import front_matter
from burnish.checkpoint.staging import hash_file, refuse_existing, require_apart
from burnish.checkpoint.write import require_disk_space
from burnish.families.conversion import RECORD_FORMAT, Conversion, keep_statistics, now, open_staging, write_checkpoint
from burnish.families.streaming import Calibration, StreamedModel
from burnish.prune.card import model_card
from burnish.prune.cut import cutter, describe_student
from burnish.prune.decide import decide
from burnish.prune.layout import DENSE_FAMILIES
from burnish.prune.observe import observe
from burnish.prune.plan import PrunePlan
from burnish.prune.prepare import Job, prepare
from burnish.prune.statistics import ActivationStatistics
from burnish.runs import Progress, environment, peak_rss_bytes, ranks, write_json

STATISTICS_FILE = Path("statistics") / "activations.safetensors"


class PruneResult(Conversion[PrunePlan]):
    """What a pruning did; `plan` is None for a dry run that would have to observe first."""


def prune(
    model: str | Path,
    out: str | Path,
    *,
    layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    parameters: int | str | None = None,
    dataset: str | None = None,
    num_samples: int = 512,
    max_length: int = 2048,
    batch_size: int = 4,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    plan: PrunePlan | str | Path | None = None,
    statistics: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    max_shard_size: str = "5GB",
    revision: str | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Cut a dense checkpoint down to a smaller dense one.

    The model is streamed layer by layer over calibration tokens (observe), what matters least is found from what was
    seen (decide), and each tensor is cut down to the rows and columns that stay (act).

    The target is one of: exact sizes (those left out stay as they are), a number of parameters, or a plan.

    Args:
        model: directory or hub name of a dense model.
        out: directory to write; it appears complete or not at all.
        layers: layers to keep.
        hidden_size: channels of the residual stream to keep.
        intermediate_size: feed-forward neurons to keep in each layer.
        heads: query heads to keep in each layer, equally many for each key-value head.
        kv_heads: key-value heads to keep in each layer.
        parameters: at most this many, such as "1.5B" or 1_246_592; see `burnish.prune.target.sizes_for`.
        dataset: calibration text: a file, a directory, a `datasets` name; None is the bundled corpus.
        num_samples: calibration sequences.
        max_length: tokens in each.
        batch_size: sequences per forward pass.
        seed: of the choice of calibration text.
        dtype: "auto" keeps the stored type; "float32", "bfloat16" or "float16" casts the output.
        device: "auto", "cpu", "cuda" or "cuda:N": where the model computes.
        plan: apply this plan (or plan file) instead of observing and deciding.
        statistics: decide from this statistics file (`OUT/statistics/activations.safetensors` of an earlier run).
        dry_run: check everything and forecast; write nothing.
        overwrite: replace `out`, and discard unfinished work of other inputs.
        resume: continue unfinished work of the same inputs.
        max_shard_size: with a unit, such as "5GB".
        revision: branch, tag or commit on the hub.
        progress: where progress is shown; silent by default.

    Raises:
        BurnishError: the input cannot be used or the output cannot be written; see `burnish.errors`.
        ValueError: an option is out of range, or there is not exactly one target.

    Source: arXiv 2407.14679 (Minitron): one-shot width and depth pruning by activations; distillation follows as a
    second step.

    Examples:
        >>> from burnish import prune
        >>> prune("Qwen/Qwen3-32B", "qwen3-3b", layers=48, hidden_size=2048)  # doctest: +SKIP
    """
    progress, out, started = progress or Progress(quiet=True), Path(out), now()
    refuse_existing(out, overwrite=overwrite)
    max_shard_bytes = parse_size(max_shard_size)
    job = prepare(
        model,
        exact={
            "layers": layers,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "heads": heads,
            "kv_heads": kv_heads,
        },
        parameters=parameters,
        dataset=dataset,
        num_samples=num_samples,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        plan=plan,
        statistics=statistics,
        revision=revision,
    )
    require_apart(out, job.model.checkpoint.path)
    require_disk_space(out, job.forecast.disk_bytes)
    job.options.update(max_shard_size=max_shard_size, revision=revision)
    record = _new_record(job, started)
    if dry_run:
        return PruneResult(None, job.given, record, job.forecast)
    for note in job.notes:
        progress.say(note)

    staging = open_staging(out, _fingerprint(job), overwrite=overwrite, resume=resume)
    with staging.explaining("the output"):
        decided = _work(job, staging, record, max_shard_bytes, progress)
    return PruneResult(out, decided, ranks.of_first(record), job.forecast)


def _work(job: Job, staging: Staging, record: dict[str, Any], max_shard_bytes: int, progress: Progress) -> PrunePlan:
    """Observe, decide, act, and publish; every rank decides the same, the first one acts."""
    clock = time.perf_counter()
    seen = _observe(job, staging, progress)
    observed = time.perf_counter()
    plan = job.given or _decide(job, seen)
    decided = time.perf_counter()
    if ranks.rank() == 0:
        keep_statistics(seen, job.tokens.sources if job.tokens else {}, STATISTICS_FILE, staging, record)
        (staging.files / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        kept = tuple(layer.layer for layer in plan.layers)
        student = describe_student(job.model, job.target, kept, job.output_dtype)
        write_checkpoint(
            job.model.checkpoint,
            student.config,
            student.tensors,
            cutter(job.model, plan, student),
            staging,
            record,
            converted=student.cut,
            copied=student.copied,
            dropped=student.dropped,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        acted = time.perf_counter()
        record["seconds"] = {"observe": observed - clock, "decide": decided - observed, "act": acted - decided}
        record |= {"finished": now(), "peak_rss_bytes": peak_rss_bytes(), "forecast": job.forecast.to_dict()}
        card = model_card(record, plan, front_matter(job.model.checkpoint))
        (staging.files / "README.md").write_text(card, encoding="utf-8")
        write_json(staging.files / "burnish.json", record)
        staging.publish()
    return plan


def _new_record(job: Job, started: str) -> dict[str, Any]:
    model, model_type = job.model, job.model.config["model_type"]
    architecture = (model.checkpoint.config.get("architectures") or ["unknown"])[0]
    return {
        "format": RECORD_FORMAT,
        "verb": "prune",
        "started": started,
        "options": job.options,
        "source": {
            "name": model.checkpoint.name,
            "family": DENSE_FAMILIES[model_type],
            "model_type": model_type,
            "architecture": architecture,
            "parameters": model.num_parameters(),
            "bytes": model.checkpoint.nbytes,
        },
        "output": {
            "architecture": architecture,
            "parameters": model.num_parameters(job.target),
            "bytes": job.student.nbytes,
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
        "data": job.tokens.fingerprint if job.tokens else None,
        "model": job.model.checkpoint.fingerprint(),
    }


def _observe(job: Job, staging: Staging, progress: Progress) -> ActivationStatistics | None:
    """Statistics to decide from: seen now, or those given; None where a given plan needs none."""
    if job.tokens is None:
        return job.stored
    share = slice(ranks.rank(), None, ranks.world_size())
    calibration = Calibration(job.tokens.input_ids[share], job.tokens.attention_mask[share])
    model = StreamedModel(job.model.checkpoint, job.model.config, device=job.device, dtype=job.dtype)
    batches = -(-len(calibration.input_ids) // job.batch_size)
    with progress.task("observe", job.model.sizes.layers * batches, unit="batches") as advance:
        seen = observe(
            model, calibration, batch_size=job.batch_size, work=staging.work / f"rank-{ranks.rank()}", advance=advance
        )
    return ranks.merge_over_ranks(seen)


def _decide(job: Job, seen: ActivationStatistics | None) -> PrunePlan:
    assert seen is not None
    plan = decide(
        seen,
        job.target,
        family=job.model.config["model_type"],
        source=job.model.sizes,
        head_dim=job.model.head_dim,
        notes=job.notes,
    )
    return plan.require_fits(plan.family, job.model.sizes)
