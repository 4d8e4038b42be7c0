"""Understand a request before the work starts: every check that needs only headers, configs and flags is here."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.checkpoint import Checkpoint, dtype_name
from burnish.checkpoint.tensors import FLOATING, num_bytes, torch_dtype
from burnish.data import TokenBlocks, token_blocks
from burnish.densify.decide import Choice, make_choice
from burnish.densify.forecast import Forecast, forecast
from burnish.densify.plan import DensifyPlan
from burnish.densify.score import Probability
from burnish.densify.statistics import RoutingStatistics
from burnish.errors import BurnishError, UnsupportedModelError
from burnish.families import Family, MoEShape, RouterRule, Student, describe_student, detect_family, resolve_config
from burnish.runs import choose_device

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Subject:
    """A teacher, understood: its checkpoint, family, resolved config, shape and router rule."""

    teacher: Checkpoint
    family: Family
    config: dict[str, Any]
    shape: MoEShape
    rule: RouterRule

    @classmethod
    def open(
        cls, model: str | Path, *, revision: str | None = None, family: Family | str | Path | None = None
    ) -> Subject:
        """Open a checkpoint and recognise its family; raises as `Checkpoint.open` and `detect_family`."""
        teacher = Checkpoint.open(model, revision)
        found = detect_family(teacher.config, family)
        config = resolve_config(teacher.config)
        shape = found.shape(config)
        if not 1 <= shape.top_k <= shape.num_experts:
            raise UnsupportedModelError(
                f"{teacher.path / 'config.json'}: {shape.top_k} experts per token of {shape.num_experts}: not a valid"
                " Mixture-of-Experts config"
            )
        return cls(teacher, found, config, shape, found.router(config))

    def num_parameters(self) -> int:
        """Parameters of the teacher; MXFP4 experts count as the weights they hold."""
        stored = self.teacher.tensors.values()
        packed = sum(tensor.nbytes for tensor in stored if tensor.name.endswith(("_blocks", "_scales")))
        total = sum(tensor.nbytes // num_bytes(tensor.dtype, ()) for tensor in stored) - packed
        if packed:
            experts = len(self.shape.moe_layers) * self.shape.num_experts
            total += experts * 3 * self.shape.expert_width * self.shape.hidden_size
        return total


@dataclass(frozen=True)
class Job:
    """A request that has passed every check, with all that the work needs.

    Attributes:
        subject: the teacher.
        choice: how to decide.
        student: the structure of the output.
        given: a plan to apply instead of deciding.
        stored: statistics to decide from instead of observing.
        tokens: calibration tokens, where there is something to observe.
        device, dtype: where and in which type the teacher computes.
        batch_size: sequences per forward pass.
        forecast: what the work will need.
        options: the resolved options, for the record and for resuming.
        notes: what was filled in or is worth knowing.
    """

    subject: Subject
    choice: Choice
    student: Student
    given: DensifyPlan | None
    stored: RoutingStatistics | None
    tokens: TokenBlocks | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    forecast: Forecast
    options: dict[str, Any]
    notes: list[str]


def prepare(
    model: str | Path,
    *,
    score: str,
    keep: int | None,
    grouping: str,
    scaling: str,
    dataset: str | None,
    num_samples: int,
    max_length: int,
    batch_size: int,
    seed: int,
    dtype: str,
    device: str,
    plan: DensifyPlan | str | Path | None,
    statistics: str | Path | None,
    probability: Probability,
    ridge: float | None,
    normalize_gram: bool,
    family: Family | str | Path | None,
    revision: str | None,
) -> Job:
    """Check a request to densify; arguments and errors as `burnish.densify`."""
    for name, value in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    subject = Subject.open(model, revision=revision, family=family)
    choice, notes = make_choice(
        subject.shape,
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
        given.require_fits(subject.family.model_type, subject.shape)
        notes = list(given.notes)
    num_groups = given.num_groups if given else choice.num_groups(subject.shape.top_k)
    student = describe_student(
        subject.teacher, subject.family, subject.config, num_groups, None if dtype == "auto" else _output_dtype(dtype)
    )
    if student.twin.why:
        notes.append(student.twin.why)
    require_sound_tokens(subject.teacher, student)
    stored = None if statistics is None else load_statistics(Path(statistics), subject.shape, choice)
    compute_device, working_dtype = choose_device(device), compute_dtype(subject.config, student)
    tokens = None
    if given is None and stored is None:
        tokens = load_calibration(subject.teacher, dataset, num_samples, max_length, seed)
    return Job(
        subject=subject,
        choice=choice,
        student=student,
        given=given,
        stored=stored,
        tokens=tokens,
        device=compute_device,
        dtype=working_dtype,
        batch_size=batch_size,
        forecast=forecast(
            subject.teacher,
            student,
            experts_read=sum(len(group) for group in given.layers[0].groups) if given else choice.keep,
            num_tokens=tokens.num_tokens if tokens else 0,
            max_length=tokens.input_ids.shape[1] if tokens else 1,
            batch_size=batch_size,
            outputs=choice.needs_outputs,
            dtype=working_dtype,
        ),
        options={
            "score": given.score if given else choice.score,
            "keep": given.keep if given else choice.keep,
            "grouping": given.grouping if given else choice.grouping,
            "scaling": given.scaling if given else choice.scaling,
            "dataset": dataset,
            "num_samples": num_samples,
            "max_length": max_length,
            "batch_size": batch_size,
            "seed": seed,
            "dtype": dtype,
            "device": str(compute_device),
            "probability": probability,
            "ridge": ridge,
            "normalize_gram": normalize_gram,
            "statistics": None if statistics is None else str(statistics),
        },
        notes=notes,
    )


def load_calibration(
    teacher: Checkpoint, dataset: str | None, num_samples: int, max_length: int, seed: int
) -> TokenBlocks:
    """Calibration tokens with the teacher's tokenizer; sequences at most as long as its positions.

    Raises:
        DataError: the text cannot be used.
        BurnishError: the directory holds no tokenizer.
    """
    from transformers import AutoTokenizer

    if not any((teacher.path / name).exists() for name in TOKENIZER_FILES):
        raise BurnishError(
            f"{teacher.path}: no tokenizer, none of {', '.join(TOKENIZER_FILES)}: copy the model's own there"
        )
    longest = teacher.config.get("max_position_embeddings")
    if longest is not None and max_length > longest:
        warnings.warn(
            f"max_length={max_length} is more than the model's {longest} positions: {longest} is used", stacklevel=4
        )
        max_length = longest
    try:
        tokenizer = AutoTokenizer.from_pretrained(teacher.path)
    except (OSError, ValueError) as error:
        raise BurnishError(f"{teacher.path}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from error
    return token_blocks(tokenizer, dataset, num_samples=num_samples, max_length=max_length, seed=seed)


def load_statistics(file: Path, shape: MoEShape, choice: Choice) -> RoutingStatistics:
    """Statistics of an earlier run, held against the model and against what the choice needs.

    Raises:
        BurnishError: they are of another model, or lack the all-expert or weight statistics.
    """
    stored = RoutingStatistics.load(file)
    sizes = {stats.num_experts for stats in stored.layers.values()}
    if list(stored.layers) != list(shape.moe_layers) or sizes != {shape.num_experts}:
        raise BurnishError(f"{file}: statistics of another model: {len(stored.layers)} layers, {sizes} experts")
    first = next(iter(stored.layers.values()))
    if choice.needs_outputs and first.gram is None:
        raise BurnishError(f"{file}: has only router statistics, score {choice.score} needs every expert's outputs")
    if choice.needs_weights and first.weight_gram is None:
        raise BurnishError(f"{file}: has no weight similarities, which grouping {choice.grouping} needs")
    return stored


def require_sound_tokens(teacher: Checkpoint, student: Student) -> None:
    """Hold the tokenizer's and the generation config's ids against the embedding.

    Raises:
        BurnishError: an id has no row in the embedding; names the file and both values.
    """
    rows = student.config["vocab_size"]
    file = teacher.path / "tokenizer.json"
    if file.exists():
        content = _read_object(file)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens") or [])], default=0)
        if largest >= rows:
            raise BurnishError(f"{file}: token id {largest} has no row in the embedding of {rows} rows")
    file = teacher.path / "generation_config.json"
    if file.exists():
        settings = _read_object(file)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = settings.get(key)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not (isinstance(token, int) and -1 <= token < rows):
                    raise BurnishError(f"{file}: {key} {token!r} has no row in the embedding of {rows} rows")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BurnishError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise BurnishError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _output_dtype(name: str) -> str:
    stored = dtype_name(name)
    if stored not in FLOATING:
        raise ValueError(f"dtype={name!r}: choose auto, float32, bfloat16 or float16")
    return stored


def compute_dtype(config: dict[str, Any], student: Student) -> torch.dtype:
    """The type the teacher's config asks for, else the one its experts are stored in."""
    named = getattr(torch, str(config.get("dtype")).removeprefix("torch."), None)
    stored = next(tensor.dtype for tensor in student.tensors if tensor.name in student.feed_forward)
    return named if isinstance(named, torch.dtype) else torch_dtype(stored)
