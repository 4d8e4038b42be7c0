"""What the student learns from: a teacher that runs beside it, or the stored best tokens of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from burnish.distill.divergence import LOG_ZERO, best_and_rest
from burnish.training.head import LanguageHead, decoder, language_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from burnish.distill.stored import StoredLogits


class Target(Protocol):
    """What a teacher says about some tokens."""

    def pair(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of teacher and student over the same outcomes.

        Args:
            logits: Tensor `[rows, vocab]`, float32: the student's.
            rows: which of the tokens they are.
            temperature: both distributions are softened by it.
        """
        ...

    @property
    def states(self) -> tuple[Tensor, ...]:
        """Hidden states `[tokens, hidden]` after the embedding and after each layer; empty unless asked for."""
        ...


class Teacher(Protocol):
    """Gives targets for a batch."""

    def target(self, batch: dict[str, Tensor], live: Tensor, *, states: bool) -> Target:
        """What is said about the tokens that follow the `live` positions.

        Args:
            batch: `input_ids` Tensor `[batch, seq]`, and `row` Tensor `[batch]`, the number of each block.
            live: Tensor `[batch, seq - 1]`, bool.
            states: whether hidden states are wanted, too.
        """
        ...


@dataclass(frozen=True)
class LiveTarget:
    """A teacher's last hidden states `[tokens, hidden]`; its head is applied when a chunk is asked for."""

    head: LanguageHead
    hidden: Tensor
    states: tuple[Tensor, ...]

    @torch.no_grad()
    def _log_p(self, rows: slice, vocab_size: int, temperature: float) -> Tensor:
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = self.head.logits(self.hidden[rows])[..., :vocab_size].float()
        return logits.div_(temperature).log_softmax(-1).clamp_(min=LOG_ZERO)

    def pair(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """As `Target.pair`; logits that only one of the two has are padding and left out."""
        vocab_size = min(logits.shape[-1], self.head.linear.weight.shape[0])
        log_p = self._log_p(rows, vocab_size, temperature)
        return log_p, (logits[..., :vocab_size] / temperature).log_softmax(-1)


class LiveTeacher:
    """A teacher in memory, in evaluation mode and in its own type, whatever the student's.

    Args:
        model: the teacher; its decoder runs once a batch, without gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = language_head(model)

    @torch.no_grad()
    def target(self, batch: dict[str, Tensor], live: Tensor, *, states: bool) -> LiveTarget:
        """As `Teacher.target`."""
        with torch.autocast(live.device.type, enabled=False):
            output = decoder(self.model)(input_ids=batch["input_ids"], use_cache=False, output_hidden_states=states)
        seen = output.hidden_states if states else ()
        return LiveTarget(
            self.head, output.last_hidden_state[:, :-1][live], tuple(layer[:, :-1][live] for layer in seen)
        )


@dataclass(frozen=True)
class StoredTarget:
    """A teacher's best tokens: ids `[tokens, k]` and log-probabilities `[tokens, k + 1]`, the last of all others.

    They were softened by `temperature` and normalised over `vocab_size` tokens when they were written.
    """

    ids: Tensor
    log_p: Tensor
    temperature: float
    vocab_size: int
    states: tuple[Tensor, ...] = ()

    def pair(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """As `Target.pair`, but at the stored temperature whatever is asked for: the other one is not known."""
        log_q = (logits[..., : self.vocab_size] / self.temperature).log_softmax(-1)
        return self.log_p[rows], best_and_rest(log_q, self.ids[rows])


class StoredTeacher:
    """A teacher that ran before: no model is in memory.

    Args:
        stored: its best tokens for the blocks that are trained on.
    """

    def __init__(self, stored: StoredLogits) -> None:
        self.stored = stored

    def target(self, batch: dict[str, Tensor], live: Tensor, *, states: bool) -> StoredTarget:
        """As `Teacher.target`.

        Raises:
            ValueError: hidden states are wanted, which are not stored.
        """
        if states:
            raise ValueError("hidden_weight > 0 needs the teacher itself: stored logits hold no hidden states")
        ids, log_p = self.stored.blocks(batch["row"].tolist())
        chosen = live.cpu()
        return StoredTarget(
            ids[:, :-1][chosen].long().to(live.device),
            log_p[:, :-1][chosen].to(live.device),
            self.stored.about["temperature"],
            self.stored.about["vocab_size"],
        )
