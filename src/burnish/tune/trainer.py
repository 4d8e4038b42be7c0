"""Supervised fine-tuning in the Hugging Face `Trainer`: with gradients, or by losses at displaced weights alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from burnish.data.examples import IGNORED
from burnish.errors import TrainingError
from burnish.optim.mezo import MeZO
from burnish.optim.trajectory import Record
from burnish.training.chunked import chunked_loss
from burnish.training.head import decoder, language_head
from burnish.training.trainer import TokenTrainer
from burnish.tune.prefix import PrefixReuse
from burnish.tune.rows import pad_batch, prompts_and_answers

Score = Callable[[str, str], float]


class TuneTrainer(TokenTrainer):
    """Trains on the cross-entropy of learned tokens; logits never exist whole.

    Examples have `input_ids` [seq] and `labels` [seq] (IGNORED where nothing is learned) and are padded per batch. An
    evaluation reports `eval_nll`, in nats per learned token.

    Args:
        model: a causal language model, or one with PEFT's adapters.
        pad: id of the padding token.
        options: as `transformers.Trainer`.
    """

    def __init__(self, model: nn.Module, *, pad: int, **options: Any) -> None:
        options.setdefault("data_collator", functools.partial(pad_batch, pad=pad))
        super().__init__(model, **options)
        # The head's weight is used inside the model's own forward, where FSDP and ZeRO have gathered it.
        model.forward = MethodType(answer_loss, model)

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy, and the sums [nll, tokens]."""
        found: tuple[Tensor, Tensor] = model(inputs["input_ids"], inputs["labels"])
        return found

    def means(self, sums: list[float], *, training: bool) -> dict[str, float]:
        """Nats per learned token."""
        nll, tokens = sums
        return {"nll": nll / tokens}


class ZerothOrderTrainer(TokenTrainer):
    """Trains without gradients: each step evaluates the model at displaced weights, in evaluation mode.

    Args:
        model: as for `TuneTrainer`; no tensor of it requires grad any more.
        optimizer: of its tensors.
        pad: id of the padding token.
        reuse: skips layers that an evaluation need not run again.
        score: (generated answer, right answer) -> what is maximised, in place of the loss; evaluations report its mean
            as `eval_score`.
        tokenizer: decodes answers for `score`.
        options: as `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MeZO,
        *,
        pad: int,
        reuse: PrefixReuse | None = None,
        score: Score | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        model.requires_grad_(False)
        options.setdefault("data_collator", functools.partial(pad_batch, pad=pad))
        super().__init__(model, optimizers=(optimizer, None), **options)
        # Replicas exchange losses, not gradients: nothing is to wrap them.
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.zeroth_order, self.reuse = optimizer, reuse
        self.pad, self.score, self.tokenizer = pad, score, tokenizer
        self._record: Record | None = None

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy, and the sums [score, examples, nll, tokens]."""
        total, sums = answer_loss(self.model, inputs["input_ids"], inputs["labels"])
        scored = sums.new_zeros(2)
        if self.score is not None and not self.model.training:
            scored = sums.new_tensor([sum(self._scores(inputs)), len(inputs["labels"])])
        return total, torch.cat([scored, sums])

    def means(self, sums: list[float], *, training: bool) -> dict[str, float]:
        """Nats per learned token, and the mean score of answers."""
        score, examples, nll, tokens = sums
        return ({"score": score / examples} if examples else {}) | ({"nll": nll / tokens} if tokens else {})

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Measure one batch; `optimizer.step()` applies what all batches of the step gave."""
        self.model.eval()
        inputs = self._prepare_inputs(inputs)
        losses: list[float] = []

        def evaluate() -> float:
            loss = self._score(inputs) if self.score else self._loss(inputs, num_items_in_batch)
            if not math.isfinite(loss):
                raise TrainingError(f"the loss is {loss} in step {self.state.global_step + 1}")
            losses.append(loss)
            return loss

        first = 0 if self.reuse is None else self.reuse.first_moved(self._active())
        with self.reuse.below(first) if self.reuse and first else nullcontext():
            self._record = self.zeroth_order.measure(evaluate, restore=not self.accelerator.sync_gradients)
        mean = sum(losses) / len(losses) / self.current_gradient_accumulation_steps
        return torch.tensor(mean, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the derivative along the last direction."""
        if "loss" in logs and self._record is not None:
            logs["projected_gradient"] = self._record.gradients[0]
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """There is no gradient."""

    def _active(self) -> list[Tensor]:
        tensors = self.zeroth_order.tensors()
        return [tensors[index] for index in self.zeroth_order.active_block.tensors]

    def _loss(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> float:
        """This batch's part of the mean over the tokens of a step, times the number of parts: the optimizer takes the
        mean over batches and ranks."""
        total, sums = self.token_losses(self.model, inputs)
        self._add(sums, training=True)
        assert num_items_in_batch is not None
        parts: int = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return float(total / num_items_in_batch) * parts

    def _score(self, inputs: dict[str, Any]) -> float:
        scores = self._scores(inputs)
        self._add(torch.tensor([sum(scores), len(scores), 0, 0], dtype=torch.float64), training=True)
        return -sum(scores) / len(scores)

    def _scores(self, inputs: dict[str, Any]) -> list[float]:
        assert self.score is not None
        pairs = prompts_and_answers(inputs)
        found = generated_answers(self.model, [prompt for prompt, _ in pairs], [len(answer) for _, answer in pairs],
                                  pad=self.pad)  # fmt: skip
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        return [self.score(decode(ids), decode(answer)) for ids, (_, answer) in zip(found, pairs, strict=True)]


def answer_loss(self: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A model's forward while it is tuned: the cross-entropy summed over learned tokens, and the sums [nll, tokens].

    Args:
        self: the model.
        input_ids, labels: Tensors `[batch, seq]`, int64.
    """
    live = labels[:, 1:] != IGNORED
    following = labels[:, 1:][live]
    head = language_head(self)

    def loss(projected: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        nll = F.cross_entropy(head.finish(projected).float(), following[rows], reduction="sum")
        return nll, nll[None]

    hidden = decoder(self)(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1][live]  # [tokens, hidden]
    total, sums = head.read(hidden, lambda states, weight, bias: chunked_loss(states, weight, bias, loss))
    count = torch.tensor([float(len(following))], device=hidden.device)
    return total, torch.cat([sums, count]).double()


@torch.no_grad()
def generated_answers(model: PreTrainedModel, prompts: list[Tensor], lengths: list[int], *, pad: int) -> list[Tensor]:
    """Greedy continuations of prompts, each of at most so many tokens.

    Args:
        model: in evaluation mode.
        prompts: Tensors `[length]`, int64, not empty.
        lengths: most tokens of each answer.
        pad: id of the padding token.
    """
    longest = max(map(len, prompts))
    ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0), value=pad) for prompt in prompts])
    places = torch.arange(longest, device=ids.device)
    mask = places >= longest - torch.tensor([len(prompt) for prompt in prompts], device=ids.device)[:, None]
    found = model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=max(lengths), do_sample=False, num_beams=1,
        pad_token_id=pad,
    )  # fmt: skip
    return [row[longest : longest + length] for row, length in zip(found, lengths, strict=True)]
