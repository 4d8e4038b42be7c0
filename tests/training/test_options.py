"""Common options: ranges, and what follows from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from burnish.training.options import forward_dtype, plain, require_in_range, require_length, training_bytes

GOOD: dict[str, Any] = {"max_length": 2, "batch_size": 1, "lr": 1e-5, "max_grad_norm": 1.0, "warmup": 0.0,
                        "report_to": "none", "max_shard_size": "5GB"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [({"max_length": 1}, "max_length=1: expected 2 or more"), ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
     ({"lr": float("inf")}, "lr=inf"), ({"lr": float("nan")}, "lr=nan"), ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
     ({"warmup": -0.1}, "warmup=-0.1"), ({"report_to": "mail"}, "choose one of none, tensorboard, wandb, trackio"),
     ({"max_shard_size": "5"}, "write a positive number with a unit")],
)  # fmt: skip
def test_out_of_range(change: dict[str, Any], message: str) -> None:
    require_in_range(GOOD, counts=["batch_size"])
    with pytest.raises(ValueError, match=message):
        require_in_range(GOOD | change, counts=["batch_size"])


def test_what_follows() -> None:
    assert forward_dtype("auto", torch.device("cpu")) == "float32"
    assert forward_dtype("float16", torch.device("cpu")) == "float16"
    with pytest.raises(ValueError, match="dtype='half': choose auto"):
        forward_dtype("half", torch.device("cpu"))
    require_length("m", SimpleNamespace(max_position_embeddings=8), 8)
    require_length("m", SimpleNamespace(), 10**6)
    with pytest.raises(ValueError, match="max_length=9 but m has 8 positions"):
        require_length("m", SimpleNamespace(max_position_embeddings=8), 9)
    assert training_bytes(10, 7) == {"memory_bytes": 160, "disk_bytes": 247}
    assert plain({"a": Path("x"), "b": 1}) == {"a": "x", "b": 1}
