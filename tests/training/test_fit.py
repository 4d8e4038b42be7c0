"""Running a trainer: which checkpoint is the newest, and a checkpoint of the last step has no step left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from burnish.training.fit import newest_checkpoint
from burnish.training.trainer import TokenTrainer


def test_the_newest_checkpoint_is_the_last_whole_one_by_number(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 200):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


class Mean(TokenTrainer):
    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        errors = (model(inputs["x"]) - inputs["labels"]).square()
        count = torch.tensor(float(errors.numel()), dtype=torch.float64)
        return errors.sum(), torch.stack([errors.sum().detach().double(), count])

    def means(self, sums: list[float], *, training: bool) -> dict[str, float]:
        return {"nll": sums[0] / sums[1]}


@pytest.mark.parametrize("rows", [8, 10, 16])  # an epoch ends at, before and after the last step
def test_a_finished_run_that_is_resumed_takes_no_further_step(rows: int, tmp_path: Path) -> None:
    data = [{"x": torch.full((1,), float(i)), "labels": torch.zeros(1)} for i in range(rows)]

    def trained(resume: bool) -> tuple[Mean, Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-3, save_steps=8,
            lr_scheduler_type="constant", optim="sgd", use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Mean(model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8") if resume else None)
        return trainer, model.weight.detach().clone()

    _, first = trained(False)
    trainer, again = trained(True)
    assert trainer.state.global_step == 8
    assert torch.equal(again, first)
