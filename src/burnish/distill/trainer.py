"""Hugging Face `Trainer` with a teacher: its loop, its loggers, its checkpoints, our loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from burnish.data.examples import IGNORED
from burnish.distill.divergence import Divergence, forward_kl, hidden_state_loss
from burnish.distill.teacher import Target, Teacher
from burnish.training.chunked import chunked_loss
from burnish.training.head import decoder, language_head
from burnish.training.trainer import TokenTrainer


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


class DistillTrainer(TokenTrainer):
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
        super().__init__(model, **options)
        self.teacher, self.objective = teacher, objective or Objective()
        # The head's weight is used inside the model's own forward, where FSDP and ZeRO have gathered it.
        model.forward = MethodType(_token_losses, model)

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The summed loss, and the sums [divergence, nll, hidden, tokens]."""
        live = inputs["labels"][:, 1:] != IGNORED
        objective = self.objective if model.training else Objective()
        target = self.teacher.target(inputs, live, states=objective.hidden_weight > 0)
        total, sums = model(inputs["input_ids"], inputs["labels"], live, target, objective)
        return total, sums

    def means(self, sums: list[float], *, training: bool) -> dict[str, float]:
        """Parts of the loss, each a mean per token."""
        divergence, nll, hidden, tokens = sums
        if not training:
            return {"kl": divergence / tokens, "nll": nll / tokens}
        parts = {"divergence": divergence / tokens, "nll": nll / tokens}
        return parts | ({"hidden": hidden / tokens} if hidden else {})


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
    total, sums = head.read(hidden, lambda states, weight, bias: chunked_loss(states, weight, bias, loss))
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
