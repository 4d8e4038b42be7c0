"""Understand a request before the work starts: every check that needs only headers, configs and flags is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.tensors import floating_name, num_bytes, torch_dtype
from burnish.data import TokenBlocks
from burnish.densify.control import INITS, without_experts
from burnish.densify.decide import Choice, make_choice
from burnish.densify.forecast import forecast
from burnish.densify.plan import DensifyPlan
from burnish.densify.score import Probability
from burnish.densify.statistics import RoutingStatistics
from burnish.errors import BurnishError, UnsupportedModelError
from burnish.families import Family, MoEShape, RouterRule, Student, describe_student, detect_family, resolve_config
from burnish.families.calibration import load_calibration, require_sound_tokens
from burnish.families.forecast import Forecast
from burnish.runs import choose_device


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
    init: str,
) -> Job:
    """Check a request to densify; arguments and errors as `burnish.densify`."""
    for name, value in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown: choose one of {', '.join(INITS)}")
    if init != "experts" and (plan is not None or statistics is not None):
        raise ValueError(f"init={init!r} uses no experts: leave out plan and statistics")
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
        subject.teacher, subject.family, subject.config, num_groups, None if dtype == "auto" else floating_name(dtype)
    )
    if init != "experts":
        student, notes = without_experts(student, init), [f"a control: {INITS[init]}"]
    if student.twin.why:
        notes.append(student.twin.why)
    require_sound_tokens(subject.teacher, student.config["vocab_size"])
    stored = None if statistics is None else load_statistics(Path(statistics), subject.shape, choice)
    compute_device, working_dtype = choose_device(device), compute_dtype(subject.config, student)
    tokens = None
    if given is None and stored is None and init == "experts":
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
            "init": init,
        },
        notes=notes,
    )


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


def compute_dtype(config: dict[str, Any], student: Student) -> torch.dtype:
    """The type the teacher's config asks for, else the one its experts are stored in."""
    named = getattr(torch, str(config.get("dtype")).removeprefix("torch."), None)
    stored = next(tensor.dtype for tensor in student.tensors if tensor.name in student.feed_forward)
    return named if isinstance(named, torch.dtype) else torch_dtype(stored)
