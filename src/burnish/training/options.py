"""Options that every training has: their ranges, and what follows from them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch

from burnish.checkpoint import parse_size
from burnish.runs import ranks

REPORTERS = ("none", "tensorboard", "wandb", "trackio")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EVALUATIONS = 10
"""Evaluations and checkpoints of a training that does not say how many it wants."""


def require_in_range(options: dict[str, Any], *, counts: Iterable[str]) -> None:
    """Refuse common options that are out of range.

    Args:
        options: `max_length`, `lr`, `max_grad_norm`, `warmup`, `report_to` and `max_shard_size`, and the counts.
        counts: names of further options that must be 1 or more.

    Raises:
        ValueError: one is; names it, its value and what is expected.
    """
    for name in ("max_length", *counts):
        least = 2 if name == "max_length" else 1
        if options[name] < least:
            raise ValueError(f"{name}={options[name]}: expected {least} or more")
    for name in ("lr", "max_grad_norm"):
        if not 0 < options[name] < math.inf:
            raise ValueError(f"{name}={options[name]}: expected a number above 0")
    if not 0 <= options["warmup"] < 1:
        raise ValueError(f"warmup={options['warmup']}: expected a share of the steps, from 0 to below 1")
    if options["report_to"] not in REPORTERS:
        raise ValueError(f"report_to={options['report_to']!r} is unknown: choose one of {', '.join(REPORTERS)}")
    parse_size(options["max_shard_size"])


def refuse_without_effect(options: dict[str, Any], of_others: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Refuse options that belong to a choice that was not made: one of them is a mistake, not a wish.

    Args:
        options: None and False where nothing was said.
        of_others: choices that were not made, and the options that only they have.

    Raises:
        ValueError: an option has no effect; names it, its value and the choice.
    """
    for owner, names in of_others:
        for name in names:
            if options[name] is not None and options[name] is not False:
                raise ValueError(f"{name}={options[name]!r} has no effect without {owner}: leave it out")
    if options["steps"] is not None and options["epochs"] is not None:
        raise ValueError(f"steps={options['steps']} and epochs={options['epochs']}: give one of them")


def steps_of(options: dict[str, Any], rows: int) -> int:
    """Optimizer steps: `steps`, or what `epochs` over so many rows come to."""
    if options["steps"] is not None:
        return int(options["steps"])
    epochs = float(options["epochs"])
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs={epochs}: expected a number above 0")
    return max(1, math.ceil(epochs * math.ceil(rows / rows_per_step(options))))


def rows_per_step(options: dict[str, Any]) -> int:
    """Of all processes."""
    return int(options["batch_size"] * options["gradient_accumulation"] * ranks.world_size())


def require_length(name: str, config: Any, max_length: int) -> None:
    """Refuse examples that are longer than a model has positions."""
    longest = getattr(config, "max_position_embeddings", None) or max_length
    if max_length > longest:
        raise ValueError(f"max_length={max_length} but {name} has {longest} positions")


def require_dtype(dtype: str) -> None:
    """Refuse an unknown type by name."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose auto, float32, bfloat16 or float16")


def forward_dtype(dtype: str, device: torch.device) -> str:
    """The type of a forward pass; "auto" is bfloat16 on a GPU that has it, else float32."""
    require_dtype(dtype)
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def training_bytes(trained: int, read: int) -> dict[str, int]:
    """What a training with gradients takes: in memory weights, gradients and two moments in float32, on disk two
    checkpoints of weights and moments beside the output.

    Args:
        trained: number of trained weights.
        read: bytes of the output.
    """
    return {"memory_bytes": 16 * trained, "disk_bytes": 2 * 12 * trained + read}


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON has them."""
    return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in options.items()}


def determining(options: dict[str, Any], *told_elsewhere: str) -> dict[str, Any]:
    """The options that the output depends on, but for those that a fingerprint tells in another way."""
    without_effect = ("out", "dry_run", "overwrite", "resume", "trust_remote_code")
    return {key: value for key, value in plain(options).items() if key not in (*told_elsewhere, *without_effect)}
