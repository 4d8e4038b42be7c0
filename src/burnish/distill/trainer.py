"""Hugging Face `Trainer` with a teacher: its loop, its loggers, its checkpoints, our loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback

from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import load_model
from burnish.distill.chunked import chunked_loss
from burnish.distill.divergence import Divergence, forward_kl, hidden_state_loss
from burnish.distill.head import decoder, language_head
from burnish.distill.teacher import Target, Teacher
from burnish.errors import TrainingError

IGNORED = -100
"""Label of a token that is not learned; that of `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Objective:
    """What is minimised: (1 - ce_weight) T^2 D(teacher, student) + ce_weight CE + hidden_weight H, mean per token.

    Attributes:
        divergence: D, of `burnish.distill.divergence`.
        temperature: T softens both distributions; T^2 keeps the size of the gradient (Hinton et al., section 2).
        ce_weight: share of the cross-entropy with the text.
        hidden_weight: of the hidden-state loss, averaged over the student's layers.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected a number above 0")
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight={self.ce_weight}: expected a share from 0 to 1")
        if not self.hidden_weight >= 0:
            raise ValueError(f"hidden_weight={self.hidden_weight}: expected 0 or more")


def stack_blocks(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collate examples of equal length: each key stacked."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


class DistillTrainer(Trainer):  # type: ignore[misc]
    """Trains a student on what a teacher says; logits never exist whole.

    Examples have `input_ids` [seq], `labels` [seq] (IGNORED where nothing is learned) and `row` [], the number of the
    block for a teacher that was stored. The loss is normalised over all tokens of an optimizer step, accumulated and
    distributed ones included. Evaluation reports `eval_kl`, the forward KL at temperature 1 whatever is trained on (of
    a stored teacher: at its temperature, over its outcomes), and `eval_nll`, both in nats per token.

    Args:
        model: the student, a causal language model of transformers.
        teacher: live or stored.
        objective: what is minimised.
        options: as `transformers.Trainer`.

    Examples:
        >>> DistillTrainer(student, LiveTeacher(teacher), args=arguments, train_dataset=data).train()  # doctest: +SKIP
    """

    def __init__(
        self, model: PreTrainedModel, teacher: Teacher, objective: Objective | None = None, **options: Any
    ) -> None:
        options.setdefault("data_collator", stack_blocks)
        if "args" in options:
            options["args"].remove_unused_columns = False
        super().__init__(model=model, **options)
        self.teacher, self.objective = teacher, objective or Objective()
        self.remove_callback(PrinterCallback)
        # The loss below is already a mean over all tokens of the step.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._sums: dict[bool, Tensor | None] = {True: None, False: None}
        # The head's weight is used inside the model's own forward, where FSDP and ZeRO have gathered it.
        model.forward = MethodType(_token_losses, model)

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
        live = inputs["labels"][:, 1:] != IGNORED
        objective = self.objective if training else Objective()
        target = self.teacher.target(inputs, live, states=objective.hidden_weight > 0)
        total, sums = model(inputs["input_ids"], inputs["labels"], live, target, objective)
        seen = self._sums[training]
        self._sums[training] = sums if seen is None else seen + sums
        if num_items_in_batch is None:
            loss = total / live.sum().clamp(min=1)
        else:
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        if training and not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} in step {self.state.global_step + 1}")
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; logits are never gathered."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As `Trainer.evaluation_loop`, with `eval_kl` and `eval_nll` over all tokens."""
        self._sums[False] = None
        output = super().evaluation_loop(*args, **options)
        means = self._means(training=False)
        prefix = options.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_kl": means["divergence"], f"{prefix}_nll": means["nll"]})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the parts of the loss since the last time."""
        if "loss" in logs and self._sums[True] is not None:
            logs |= self._means(training=True)
        super().log(logs, start_time)

    def _means(self, *, training: bool) -> dict[str, float]:
        sums = self._sums[training]
        assert sums is not None
        self._sums[training] = None
        divergence, nll, hidden, tokens = self.accelerator.reduce(sums).tolist()
        means = {"divergence": divergence / tokens, "nll": nll / tokens}
        return means | ({"hidden": hidden / tokens} if hidden else {})

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


def _token_losses(
    self: PreTrainedModel, input_ids: Tensor, labels: Tensor, live: Tensor, target: Target, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The student's forward while it is distilled: the summed loss, and the sums [divergence, nll, hidden, tokens].

    Args:
        self: the student.
        input_ids, labels: Tensors `[batch, seq]`, int64.
        live: Tensor `[batch, seq - 1]`, bool: positions whose next token is learned.
        target: what the teacher says about them.
        objective: what is minimised.
    """
    with_states = objective.hidden_weight > 0
    output = decoder(self)(input_ids=input_ids, use_cache=False, output_hidden_states=with_states)
    head = language_head(self)
    following = labels[:, 1:][live]

    def loss(projected: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return _chunk_loss(head.finish(projected).float(), following[rows], target, rows, objective)

    hidden = output.last_hidden_state[:, :-1][live]  # [tokens, hidden]
    total, sums = chunked_loss(hidden, head.linear.weight, head.linear.bias, loss)
    distance = torch.zeros((), device=hidden.device)
    if with_states:
        distance = _states_loss(target.states, [state[:, :-1][live] for state in output.hidden_states])
        total = total + objective.hidden_weight * distance
    count = torch.tensor(float(len(following)), device=hidden.device)
    return total, torch.stack([*sums.double(), distance.detach().double(), count.double()])


def _chunk_loss(
    logits: Tensor, labels: Tensor, target: Target, rows: slice, objective: Objective
) -> tuple[Tensor, Tensor]:
    log_p, log_q = target.pair(logits, rows, objective.temperature)
    divergence = objective.divergence(log_p, log_q).sum()
    with torch.set_grad_enabled(logits.requires_grad and objective.ce_weight > 0):
        nll = nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss = (1 - objective.ce_weight) * objective.temperature**2 * divergence + objective.ce_weight * nll
    return loss, torch.stack([divergence, nll])


def _states_loss(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Hidden-state loss summed over tokens, averaged over the student's layers; each faces the teacher's layer at the
    same relative depth."""
    layers = range(1, len(student))
    depth = (len(teacher) - 1) / (len(student) - 1)
    return sum(
        (hidden_state_loss(teacher[round(layer * depth)], student[layer]).sum() for layer in layers),
        start=torch.zeros((), device=student[0].device),
    ) / len(layers)
