"""Compose observe, decide and act into one conversion; the only file that knows all the others."""

from __future__ import annotations

import datetime
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.checkpoint import (
    Checkpoint,
    Staging,
    copy_other_files,
    parse_size,
    plan_shards,
    verify_output,
    write_shards,
)
from burnish.checkpoint import dtype_name as safetensors_dtype
from burnish.checkpoint.staging import refuse_existing
from burnish.checkpoint.tensors import FLOATING, num_bytes
from burnish.checkpoint.write import require_disk_space
from burnish.data import TokenBlocks, token_blocks
from burnish.densify import ranks
from burnish.densify.assemble import assemble
from burnish.densify.card import front_matter_of, model_card
from burnish.densify.decide import Choice, decide, make_choice
from burnish.densify.forecast import Forecast, forecast
from burnish.densify.observe import Calibration, observe
from burnish.densify.plan import DensifyPlan
from burnish.densify.score import Probability
from burnish.densify.statistics import RoutingStatistics
from burnish.densify.teacher import StreamedTeacher
from burnish.errors import BurnishError, OutputError
from burnish.families import Family, RouterRule, Student, describe_student, detect_family, resolve_config
from burnish.runs import Progress, environment, peak_rss_bytes, write_json

STATISTICS_FILE = Path("statistics") / "routing.safetensors"
RECORD_FORMAT = "burnish.run/1"


@dataclass(frozen=True)
class Subject:
    """A teacher, understood: its checkpoint, family, resolved config and router rule."""

    teacher: Checkpoint
    family: Family
    config: dict[str, Any]
    rule: RouterRule

    @classmethod
    def open(
        cls, model: str | Path, *, revision: str | None = None, family: Family | str | Path | None = None
    ) -> Subject:
        """Open a checkpoint and recognise its family; raises as `Checkpoint.open` and `detect_family`."""
        teacher = Checkpoint.open(model, revision)
        found = detect_family(teacher.config, family)
        config = resolve_config(teacher.config)
        return cls(teacher, found, config, found.router(config))


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
        num_samples, max_length: calibration sequences and tokens in each.
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
        probability, ridge, normalize_gram: see `burnish.densify.decide.Choice`.
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
    progress = progress or Progress(quiet=True)
    out = Path(out)
    started = _now()
    refuse_existing(out, overwrite=overwrite or ranks.rank() > 0)
    max_shard_bytes = parse_size(max_shard_size)
    subject = Subject.open(model, revision=revision, family=family)
    shape = subject.family.shape(subject.config)
    choice, notes = make_choice(
        shape,
        subject.rule,
        score=score,
        keep=keep,
        grouping=grouping,
        scaling=scaling,
        probability=probability,
        ridge=ridge,
        normalize_gram=normalize_gram,
        seed=seed,
    )
    given = DensifyPlan.load(Path(plan)) if isinstance(plan, str | Path) else plan
    if given is not None:
        given.require_fits(subject.family.model_type, shape)
        num_groups, experts_read = given.num_groups, sum(len(group) for group in given.layers[0].groups)
    else:
        num_groups, experts_read = (choice.keep if choice.grouping == "none" else shape.top_k), choice.keep
    output_dtype = None if dtype == "auto" else safetensors_dtype(dtype)
    if output_dtype is not None and output_dtype not in FLOATING:
        raise ValueError(f"dtype={dtype!r}: choose auto, float32, bfloat16 or float16")
    student = describe_student(subject.teacher, subject.family, subject.config, num_groups, output_dtype)
    if student.twin.why:
        notes.append(student.twin.why)
    require_sound_tokens(subject.teacher, student)
    stored = None if statistics is None else RoutingStatistics.load(Path(statistics))
    blocks = None
    if given is None and stored is None:
        blocks = load_calibration(subject.teacher, dataset, num_samples, max_length, seed)
    compute_device = _device(device)
    compute_dtype = _compute_dtype(subject.config, student)
    expected = forecast(
        subject.teacher,
        student,
        experts_read=experts_read,
        num_tokens=blocks.num_tokens if blocks else 0,
        max_length=blocks.input_ids.shape[1] if blocks else max_length,
        batch_size=batch_size,
        outputs=choice.needs_outputs,
        dtype=compute_dtype,
    )
    require_disk_space(out, expected.disk_bytes)
    options = {
        "score": choice.score if given is None else given.score,
        "keep": choice.keep if given is None else given.keep,
        "grouping": choice.grouping if given is None else given.grouping,
        "scaling": choice.scaling if given is None else given.scaling,
        "dataset": dataset,
        "num_samples": num_samples,
        "max_length": max_length,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": dtype,
        "device": str(compute_device),
        "plan_only": plan_only,
        "max_shard_size": max_shard_size,
        "probability": probability,
        "ridge": ridge,
        "normalize_gram": normalize_gram,
    }
    record: dict[str, Any] = {
        "format": RECORD_FORMAT,
        "verb": "densify",
        "started": started,
        "options": options,
        "source": {
            "name": subject.teacher.name,
            "revision": revision,
            "family": subject.family.name,
            "model_type": subject.family.model_type,
            "architecture": (subject.teacher.config.get("architectures") or ["unknown"])[0],
            "parameters": count_parameters(subject.teacher, student),
            "bytes": subject.teacher.nbytes,
        },
        "output": {
            "architecture": student.twin.architecture,
            "parameters": student.num_parameters,
            "bytes": student.nbytes,
        },
        "environment": environment(),
        "notes": notes,
    }
    if dry_run:
        return DensifyResult(None, given, record, expected)
    for note in notes:
        progress.say(note)
    fingerprint = {
        "options": options | {"plan": given.to_json() if given else None},
        "data": blocks.fingerprint if blocks else None,
        "statistics": str(statistics) if statistics else None,
        "teacher": subject.teacher.fingerprint(),
        "versions": {name: record["environment"]["versions"][name] for name in ("burnish", "torch", "transformers")},
        "world_size": ranks.world_size(),
    }
    ranks.join_ranks()
    if ranks.rank() == 0:
        staging = Staging(out, fingerprint, overwrite=overwrite, resume=resume)
        ranks.wait_for_all()
    else:
        ranks.wait_for_all()
        staging = Staging(out, fingerprint, overwrite=True)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()
    if blocks is not None:
        work = staging.work / f"rank-{ranks.rank()}"
        mine = Calibration(
            blocks.input_ids[ranks.rank() :: ranks.world_size()],
            blocks.attention_mask[ranks.rank() :: ranks.world_size()],
        )
        stored = _observe(subject, student, choice, mine, batch_size, compute_device, compute_dtype, work, progress)
        stored = ranks.merge_over_ranks(stored)
    seconds["observe"] = time.perf_counter() - clock
    clock = time.perf_counter()
    if given is None:
        assert stored is not None
        given = decide(stored, choice, family=subject.family.model_type, top_k=shape.top_k, notes=notes)
        given.require_fits(subject.family.model_type, shape)
        for layer, expert in stored.unused_experts()[:5]:
            notes.append(f"layer {layer}, expert {expert}: no calibration token chose it")
    seconds["decide"] = time.perf_counter() - clock
    clock = time.perf_counter()
    record["statistics"] = {
        "num_tokens": stored.num_tokens if stored else 0,
        "bytes": stored.nbytes if stored else 0,
        "documents": blocks.sources if blocks else {},
    }
    if ranks.rank() == 0:
        if stored is not None:
            (staging.files / STATISTICS_FILE).parent.mkdir(exist_ok=True)
            stored.save(staging.files / STATISTICS_FILE)
        (staging.files / "plan.json").write_text(given.to_json(), encoding="utf-8")
        if not plan_only:
            _act(subject, student, given, staging, max_shard_bytes, seed, record, progress)
        record["seconds"] = {**seconds, "act": time.perf_counter() - clock}
        record["finished"] = _now()
        record["peak_rss_bytes"] = peak_rss_bytes()
        record["forecast"] = expected.to_dict()
        if not plan_only:
            card = subject.teacher.path / "README.md"
            front = front_matter_of(card.read_text(encoding="utf-8")) if card.exists() else {}
            (staging.files / "README.md").write_text(model_card(record, given, front), encoding="utf-8")
        write_json(staging.files / "burnish.json", record)
        staging.publish()
    ranks.wait_for_all()
    return DensifyResult(out, given, record, expected)


def load_calibration(
    teacher: Checkpoint, dataset: str | None, num_samples: int, max_length: int, seed: int
) -> TokenBlocks:
    """Calibration tokens with the teacher's tokenizer; at most as long as its positions.

    Raises:
        DataError: the text cannot be used.
        BurnishError: the directory holds no tokenizer.
    """
    from transformers import AutoTokenizer

    longest = teacher.config.get("max_position_embeddings")
    if longest is not None and max_length > longest:
        warnings.warn(
            f"max_length={max_length} is more than the model's {longest} positions: {longest} is used", stacklevel=3
        )
        max_length = longest
    try:
        tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    except (OSError, ValueError) as error:
        raise BurnishError(f"{teacher.path}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from error
    return token_blocks(tokenizer, dataset, num_samples=num_samples, max_length=max_length, seed=seed)


def count_parameters(teacher: Checkpoint, student: Student) -> int:
    """Parameters of the teacher; MXFP4 experts count as the weights they hold."""
    shape = student.shape
    packed = [tensor for tensor in teacher.tensors.values() if tensor.name.endswith(("_blocks", "_scales"))]
    total = sum(tensor.nbytes // num_bytes(tensor.dtype, ()) for tensor in teacher.tensors.values())
    if packed:
        total -= sum(tensor.nbytes for tensor in packed)
        total += len(shape.moe_layers) * shape.num_experts * 3 * shape.expert_width * shape.hidden_size
    return total


def require_sound_tokens(teacher: Checkpoint, student: Student) -> None:
    """Hold the tokenizer's and the generation config's ids against the embedding.

    Raises:
        BurnishError: an id has no row in the embedding; names the file and both values.
    """
    rows = student.config["vocab_size"]
    tokenizer = teacher.path / "tokenizer.json"
    if tokenizer.exists():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocabulary = content.get("model", {}).get("vocab") or {}
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens") or [])], default=0)
        if largest >= rows:
            raise BurnishError(f"{tokenizer}: token id {largest} has no row in the embedding of {rows} rows")
    generation = teacher.path / "generation_config.json"
    if generation.exists():
        settings = json.loads(generation.read_text(encoding="utf-8"))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = settings.get(key)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not -1 <= token < rows:
                    raise BurnishError(f"{generation}: {key} {token} has no row in the embedding of {rows} rows")


def _observe(
    subject: Subject,
    student: Student,
    choice: Choice,
    calibration: Calibration,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    work: Path,
    progress: Progress,
) -> RoutingStatistics:
    streamed = StreamedTeacher(
        subject.teacher, subject.family, subject.config, student.storage, device=device, dtype=dtype
    )
    batches = -(-len(calibration.input_ids) // batch_size)
    with progress.task("observe", (max(student.shape.moe_layers) + 1) * batches, unit="batches") as advance:
        return observe(
            streamed,
            subject.rule,
            calibration,
            outputs=choice.needs_outputs,
            weights=choice.needs_weights,
            batch_size=batch_size,
            work=work,
            advance=advance,
        )


def _act(
    subject: Subject,
    student: Student,
    plan: DensifyPlan,
    staging: Staging,
    max_shard_bytes: int,
    seed: int,
    record: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the student into the staging directory and fill in the record's counts and files."""
    teacher = subject.teacher
    shards = plan_shards(student.tensors, max_shard_bytes)
    before = teacher.bytes_read
    with progress.task("write", student.nbytes, unit="bytes") as advance:
        written = write_shards(teacher, shards, assemble(student, plan, teacher, seed=seed), staging, advance=advance)
    record["bytes_read"], record["bytes_written"] = teacher.bytes_read - before, written
    replaced = {"config.json", "README.md", "plan.json", "burnish.json"}
    copied = copy_other_files(teacher, staging, replaced)
    write_json(staging.files / "config.json", student.config)
    source_files = {str(file) for file in teacher.other_files()}
    record["files"] = {"copied": copied, "changed": sorted(source_files & replaced), "dropped": []}
    copies = sum(tensor.copy_of is not None for tensor in student.tensors) + len(student.casts)
    counts = {
        "read": len(teacher.tensors),
        "converted": len(student.converted),
        "copied": copies,
        "dropped": len(student.dropped),
    }
    if counts["read"] != counts["converted"] + counts["copied"] + counts["dropped"]:
        raise OutputError(f"{staging.out}: tensors do not add up: {counts}")
    record["counts"] = counts
    verify_output(staging.files, shards)


def _compute_dtype(config: dict[str, Any], student: Student) -> torch.dtype:
    name = config.get("dtype")
    stored = next(tensor.dtype for tensor in student.tensors if tensor.name in student.feed_forward)
    found = getattr(torch, str(name).removeprefix("torch.")) if name else None
    from burnish.checkpoint.tensors import torch_dtype

    return found if isinstance(found, torch.dtype) else torch_dtype(stored)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: no CUDA device is available: choose cpu or auto")
    return device


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
