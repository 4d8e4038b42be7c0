"""A reward model learned from preferences: the Bradley-Terry model with a scalar head on a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from burnish.align.reward import RewardModel
from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import foreign_bars_hidden, load_tokenizer
from burnish.data.examples import Messages
from burnish.data.preferences import Preference
from burnish.errors import CheckpointError, TrainingError
from burnish.runs.randomness import random_state_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_reward_model(
    model: str,
    pairs: Sequence[Preference],
    *,
    epochs: float = 1.0,
    lr: float = 1e-5,
    batch_size: int = 16,
    frozen: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
    out: Path | None = None,
) -> RewardModel:
    r"""Learn a reward from pairs: $\min_R \sum -y \ln \sigma(R(a) - R(b)) - (1 - y) \ln \sigma(R(b) - R(a))$.

    The head starts at zero, so that the first loss is ln 2.

    Args:
        model: directory or hub name of a language model; its hidden states carry the head.
        pairs: of `burnish.data.preferences.load_preferences`; `label` is the probability y that the first is preferred.
        epochs: passes over the pairs.
        lr: peak learning rate of AdamW, which falls to 0 linearly.
        batch_size: pairs in a step.
        frozen: train the head alone.
        device: where.
        seed: of the order of the pairs.
        out: directory to write the model and its tokenizer to; None keeps them in memory.

    Returns:
        The reward, in evaluation mode; float32.

    Raises:
        ValueError: no pair, or one without two completions.
        CheckpointError: the model lacks weights.
        TrainingError: the loss is no longer a number.

    Source: Bradley-Terry maximum likelihood as in arXiv 2506.01523, section 4 (its first step); soft labels are ours.
    """
    wrong = next((row for row in pairs if len(row.completions) != 2), None)
    if not pairs or wrong is not None:
        seen = f"{wrong.source} row {wrong.row} has {len(wrong.completions)} completions" if wrong else "no pair"
        raise ValueError(f"{seen}: expected pairs of two completions")
    with TemporaryDirectory() as work, random_state_kept(), foreign_bars_hidden():
        reward = _with_fresh_head(model, torch.device(device), batch_size)
        if frozen:
            reward.model.requires_grad_(False)
            head_of(reward.model).requires_grad_(True)
        args = TrainingArguments(
            work, num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=batch_size, seed=seed,
            weight_decay=0.0, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, use_cpu=torch.device(device).type == "cpu",
        )  # fmt: skip
        trainer = _PairTrainer(reward, args=args, train_dataset=_Pairs(reward, pairs))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if out is not None:
            reward.model.config.get_text_config().pad_token_id = reward.tokenizer.pad_token_id
            reward.model.save_pretrained(out)
            reward.tokenizer.save_pretrained(out)
    reward.model.eval().requires_grad_(True)
    return reward


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The scalar head of a sequence classifier.

    Raises:
        ValueError: it has no linear one.
    """
    for name in ("score", "classifier"):
        if isinstance(head := getattr(model, name, None), nn.Linear):
            return head
    raise ValueError(f"{type(model).__name__}: has no linear head: choose a decoder that transformers can score with")


def _with_fresh_head(name: str, device: torch.device, batch_size: int) -> RewardModel:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    checkpoint, level = Checkpoint.open(name), logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is missing is no news
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            checkpoint.path, num_labels=1, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logging.set_verbosity(level)
    head = head_of(model)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(("score.", "classifier.")))
    if missing:
        raise CheckpointError(f"{name}: {len(missing)} weights are missing, first {missing[0]}")
    nn.init.zeros_(head.weight)
    return RewardModel(model.to(device), load_tokenizer(checkpoint), batch_size=2 * batch_size, name=name)


class _Pairs(Dataset[dict[str, Any]]):
    """Tokens of both texts, as the reward will read them, and the label."""

    def __init__(self, reward: RewardModel, pairs: Sequence[Preference]) -> None:
        self.reward, self.pairs = reward, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.pairs[index]
        return {"ids": [self.reward.ids(row.prompt, _text(part)) for part in row.completions], "label": row.label}


class _PairTrainer(Trainer):  # type: ignore[misc]
    def __init__(self, reward: RewardModel, **options: Any) -> None:
        super().__init__(model=reward.model, data_collator=self._collate, **options)
        self.reward = reward

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.reward.padded([ids for row in rows for ids in row["ids"]])
        return batch | {"labels": torch.tensor([row["label"] for row in rows])}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Cross-entropy of the labels and of what the rewards say of them."""
        chosen, rejected = self.reward.scores(inputs).view(-1, 2).unbind(1)
        margins = chosen - rejected
        loss = F.binary_cross_entropy_with_logits(margins, inputs["labels"].to(margins.dtype))
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} in step {self.state.global_step + 1}: lower lr")
        return loss


def _text(completion: str | Messages) -> str:
    """What the assistant says."""
    return completion if isinstance(completion, str) else "\n".join(str(turn["content"]) for turn in completion)
