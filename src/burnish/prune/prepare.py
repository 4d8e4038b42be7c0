"""Understand a request before the work starts: every check that needs only headers, configs and flags is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.checkpoint.tensors import floating_name, torch_dtype
from burnish.data import TokenBlocks
from burnish.errors import BurnishError
from burnish.families.calibration import load_calibration, require_sound_tokens
from burnish.families.forecast import Forecast
from burnish.families.outline import class_tensors, require_tensors
from burnish.prune.cut import Student, describe_student
from burnish.prune.forecast import forecast
from burnish.prune.layout import DenseModel, Sizes
from burnish.prune.plan import PrunePlan
from burnish.prune.statistics import ActivationStatistics
from burnish.prune.target import exact_sizes, sizes_for
from burnish.runs import choose_device
from burnish.runs.units import parse_count


@dataclass(frozen=True)
class Job:
    """A request that has passed every check, with all that the work needs.

    Attributes:
        model: what is pruned.
        target: to which sizes.
        student: the structure of the output, with the first layers in the place of those to be chosen.
        given: a plan to apply instead of deciding.
        stored: statistics to decide from instead of observing.
        tokens: calibration tokens, where there is something to observe.
        device, dtype: where and in which type the model computes.
        output_dtype: safetensors type of the output; None keeps each tensor's.
        batch_size: sequences per forward pass.
        forecast: what the work will need.
        options: the resolved options, for the record and for resuming.
        notes: what is worth knowing.
    """

    model: DenseModel
    target: Sizes
    student: Student
    given: PrunePlan | None
    stored: ActivationStatistics | None
    tokens: TokenBlocks | None
    device: torch.device
    dtype: torch.dtype
    output_dtype: str | None
    batch_size: int
    forecast: Forecast
    options: dict[str, Any]
    notes: list[str]


def prepare(
    model: str | Path,
    *,
    exact: dict[str, int | None],
    parameters: int | str | None,
    dataset: str | None,
    num_samples: int,
    max_length: int,
    batch_size: int,
    seed: int,
    dtype: str,
    device: str,
    plan: PrunePlan | str | Path | None,
    statistics: str | Path | None,
    revision: str | None,
) -> Job:
    """Check a request to prune; arguments and errors as `burnish.prune`, whose exact sizes are `exact` here."""
    for name, value in (("num_samples", num_samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    ways = {"sizes": any(value is not None for value in exact.values()), "parameters": parameters is not None}
    ways["plan"] = plan is not None
    if sum(ways.values()) != 1:
        found = " and ".join(name for name, given in ways.items() if given) or "none"
        raise ValueError(
            f"found {found}: give one target: parameters, a plan, or sizes ({', '.join(exact)}; one left out stays)"
        )
    count = None if parameters is None else parse_count(parameters, "parameters")
    output_dtype = None if dtype == "auto" else floating_name(dtype)
    dense = DenseModel.open(model, revision=revision)
    given = PrunePlan.load(Path(plan)) if isinstance(plan, str | Path) else plan
    if given is not None:
        target = given.require_fits(dense.config["model_type"], dense.sizes).target
    else:
        target = exact_sizes(dense.sizes, **exact) if count is None else sizes_for(dense, count)
    if reason := dense.refusal(target):
        raise ValueError(f"{target}: transformers refuses such a {dense.config['model_type']} model: {reason}")
    student = describe_student(dense, target, dtype=output_dtype)
    planned = {tensor.name: tensor.shape for tensor in student.tensors}
    require_tensors(planned, class_tensors(student.config), student.config["model_type"])
    require_sound_tokens(dense.checkpoint, dense.config["vocab_size"])
    stored = None if statistics is None else load_statistics(Path(statistics), dense)
    working_dtype = compute_dtype(dense)
    compute_device = choose_device(device)
    tokens = None
    if given is None and stored is None:
        tokens = load_calibration(dense.checkpoint, dataset, num_samples, max_length, seed)
    return Job(
        model=dense,
        target=target,
        student=student,
        given=given,
        stored=stored,
        tokens=tokens,
        device=compute_device,
        dtype=working_dtype,
        output_dtype=output_dtype,
        batch_size=batch_size,
        forecast=forecast(
            dense,
            student,
            num_tokens=tokens.num_tokens if tokens else 0,
            max_length=tokens.input_ids.shape[1] if tokens else 1,
            batch_size=batch_size,
            dtype=working_dtype,
        ),
        options={
            **target.model_dump(),
            "parameters": count,
            "dataset": dataset,
            "num_samples": num_samples,
            "max_length": max_length,
            "batch_size": batch_size,
            "seed": seed,
            "dtype": dtype,
            "device": str(compute_device),
            "statistics": None if statistics is None else str(statistics),
        },
        notes=list(given.notes) if given else notes_on(dense, target, count),
    )


def notes_on(model: DenseModel, target: Sizes, parameters: int | None) -> list[str]:
    """What a user should know of a target: how near it comes to the number asked for, and how much it takes away."""
    before, after = model.num_parameters(), model.num_parameters(target)
    notes = []
    if parameters is not None:
        notes.append(f"{after:,} parameters, {parameters - after:,} fewer than asked for: {target}")
    if 2 * after < before:
        notes.append(
            f"takes {1 - after / before:.0%} of the parameters away: more than half in one step is hard to recover;"
            " prune and distil in several"
        )
    return notes


def load_statistics(file: Path, model: DenseModel) -> ActivationStatistics:
    """Statistics of an earlier run, held against the model.

    Raises:
        BurnishError: they are of another model.
    """
    stored = ActivationStatistics.load(file)
    sizes = model.sizes
    expected = (sizes.intermediate_size, sizes.heads * model.head_dim, sizes.hidden_size)
    found = {
        (len(stats.neurons), len(stats.head_channels), len(stats.attention_channels))
        for stats in stored.layers.values()
    }
    if list(stored.layers) != list(range(sizes.layers)) or found != {expected}:
        raise BurnishError(
            f"{file}: statistics of another model: {len(stored.layers)} layers with {sorted(found)} neurons, head"
            f" channels and hidden channels, expected {sizes.layers} with {expected}"
        )
    return stored


def compute_dtype(model: DenseModel) -> torch.dtype:
    """The type that the model's config asks for, else the one its embedding is stored in."""
    named = getattr(torch, str(model.config.get("dtype")).removeprefix("torch."), None)
    stored = model.checkpoint.info("model.embed_tokens.weight").dtype
    return named if isinstance(named, torch.dtype) else torch_dtype(stored)
