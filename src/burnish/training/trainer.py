"""Hugging Face `Trainer` for losses that are sums over tokens: its loop, its loggers, its checkpoints."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_model
from burnish.errors import TrainingError


class TokenTrainer(Trainer):  # type: ignore[misc]
    """Normalises a summed loss over all tokens of an optimizer step, accumulated and distributed ones included.

    Examples have `labels` that `Trainer` counts. What each pass sums up besides (parts of the loss, the number of
    tokens) becomes the means that are logged and that an evaluation reports.

    Args:
        model: a causal language model.
        options: as `transformers.Trainer`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        if "args" in options:
            options["args"].remove_unused_columns = False
        super().__init__(model=model, **options)
        if self.is_deepspeed_enabled:  # else ZeRO-3 trains to the end and cannot say what came of it
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
        self.remove_callback(PrinterCallback)
        # The loss below is already a mean over all tokens of the step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._sums: dict[bool, Tensor | None] = {True: None, False: None}

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss of a batch summed over its tokens [], and other sums [m], float64, the last their number."""
        raise NotImplementedError

    def means(self, sums: list[float], *, training: bool) -> dict[str, float]:
        """What is logged of the sums of `token_losses` over many passes."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss per token.

        Raises:
            TrainingError: it is not a finite number.
        """
        training = model.training
        total, sums = self.token_losses(model, inputs)
        self._add(sums if training else torch.cat([total.detach().to(sums)[None], sums]), training=training)
        if num_items_in_batch is None:
            loss = total / sums[-1].clamp(min=1).to(total.dtype)
        else:
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        if training and not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} in step {self.state.global_step + 1}")
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Adds to the sums; neither logits nor losses are gathered."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, inputs)
        return None, None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As `Trainer.get_eval_dataloader`, but the ranks share out the rows without giving any of them twice.

        Each takes as many batches as the others, since all have to take part in the passes of a sharded model.

        Raises:
            ValueError: there are fewer rows than ranks.
        """
        ranks = self.accelerator.num_processes
        if ranks == 1:
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[no-any-return]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):  # of several held-out sets one
            rows = self.eval_dataset[rows]
        if len(rows) < ranks:
            raise ValueError(f"{len(rows)} rows to evaluate on for {ranks} processes: give one row for each, or more")
        turns = min(math.ceil(len(rows) / (ranks * self.args.eval_batch_size)), len(rows) // ranks)
        batches = np.array_split(range(len(rows)), ranks * turns)[self.accelerator.process_index :: ranks]
        return DataLoader(
            rows,
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As `Trainer.evaluation_loop`, with the means over all tokens."""
        self._sums[False] = None
        output = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        total, *sums = self._taken_sums(training=False)
        found = {"loss": total / max(sums[-1], 1.0)} | self.means(sums, training=False)
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the means since the last time."""
        if "loss" in logs and self._sums[True] is not None:
            logs |= self.means(self._taken_sums(training=True), training=True)
        super().log(logs, start_time)

    def _add(self, sums: Tensor, *, training: bool) -> None:
        seen = self._sums[training]
        self._sums[training] = sums if seen is None else seen + sums

    def _taken_sums(self, *, training: bool) -> list[float]:
        """Those of all ranks since the last time."""
        sums = self._sums[training]
        assert sums is not None
        self._sums[training] = None
        found: list[float] = self.accelerator.reduce(sums).tolist()
        return found

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # after the last step's checkpoint, Trainer would take one more
            return
        super()._run_epoch(*args, **options)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise TrainingError(f"the gradient is {float(norm)} in step {self.state.global_step + 1}")
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        target = self.model if model is None else model
        if isinstance(target, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Trainer does not find weights again that transformers saves in pieces (the stacked expert of OLMoE).
            saved = load_model(Checkpoint.open(resume_from_checkpoint), dtype=target.dtype)
            target.load_state_dict(saved.state_dict())
