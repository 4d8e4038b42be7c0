"""Strength, rounding and logs of penalties in the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from burnish.errors import TrainingError
from burnish.optim import ProxGen
from burnish.optim.penalty_schedule import PenaltySchedule, find_proxgen, strength_scale
from burnish.penalties import Lq, Penalty, Wells, sparsity


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.head(torch.tanh(self.body(x))).squeeze(-1)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def rows() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return [{"x": one, "labels": one[0]} for one in x]


class Watched(ProxGen):
    seen: list[float]

    def step(self, closure: Any = None) -> Any:
        self.__dict__.setdefault("seen", []).append(self.param_groups[0]["strength_scale"])
        return super().step(closure)


def trainer(out: Path, penalty: Penalty, schedule: PenaltySchedule, **changes: Any) -> Trainer:
    model = Model()
    groups = [{"params": [model.body.weight], "penalty": penalty},
              {"params": [model.head.weight, model.head.bias, model.body.bias], "penalty": None}]  # fmt: skip
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True,
               "logging_steps": 2, "save_strategy": "no", "lr_scheduler_type": "constant", **changes}  # fmt: skip
    chosen = (Watched, {"params": groups, "lr": 0.05})
    return Trainer(model, TrainingArguments(str(out), **options), train_dataset=rows(),
                   optimizer_cls_and_kwargs=chosen, callbacks=[schedule])  # fmt: skip


def test_shapes_of_the_strength() -> None:
    assert [strength_scale(p) for p in (0, 0.3, 1)] == [1, 1, 1]
    assert [strength_scale(p, "warmup", warmup=0.2) for p in (0, 0.1, 0.2, 0.9)] == [0, 0.5, 1, 1]
    assert [strength_scale(p, "linear") for p in (0, 0.25, 1)] == [0, 0.25, 1]
    assert strength_scale(0.3, "linear", freeze_at=0.6) == 0.5
    assert strength_scale(0.0, "warmup", warmup=0) == 1


def test_the_strength_grows_and_the_weights_end_on_levels(tmp_path: Path) -> None:
    run = trainer(tmp_path, Wells(0.01), PenaltySchedule("linear", freeze_at=0.5))
    start = run.model.body.weight.detach().clone()
    run.train()
    assert find_proxgen(run.optimizer).seen == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert set(run.model.body.weight.flatten().tolist()) <= {-1.0, 1.0}
    assert start.abs().max() < 0.9
    assert find_proxgen(run.optimizer).param_groups[0]["frozen"]


def test_logs_hold_the_exact_zeros_and_the_penalty(tmp_path: Path) -> None:
    run = trainer(tmp_path, Lq(1, 0.05), PenaltySchedule())
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 4 and logs[0]["sparsity"] <= logs[-1]["sparsity"]
    assert logs[-1]["sparsity"] == sparsity(run.model).share > 0.1
    assert logs[-1]["penalty"] == pytest.approx(0.05 * float(run.model.body.weight.detach().abs().sum()))


def test_u2_4_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "a", Wells(0.05, (-1, 0, 1)), PenaltySchedule("linear", freeze_at=0.75), **saves)
    whole.train()
    other = trainer(tmp_path / "b", Lq(1, 9.0), PenaltySchedule("linear", freeze_at=0.75), **saves)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for one, two in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert set(other.model.body.weight.flatten().tolist()) <= {-1.0, 0.0, 1.0}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape='cosine': choose one of constant, warmup, linear"):
        PenaltySchedule("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"freeze_at=0: expected a number in \(0, 1\]"):
        PenaltySchedule(freeze_at=0)
    with pytest.raises(ValueError, match=r"warmup=2: expected a number in \[0, 1\]"):
        PenaltySchedule(warmup=2)
    with pytest.raises(TrainingError, match="no ProxGen in SGD: train with it, or drop PenaltySchedule"):
        find_proxgen(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
