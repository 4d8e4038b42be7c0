"""Encoded examples, packed tightly in memory, and how a batch is padded."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from burnish.data.examples import IGNORED, Counts, encode, load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rows(Dataset[dict[str, Tensor]]):
    """Examples as tokens: five bytes a token.

    Attributes:
        counts: what was read.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._ids, self._learned, self._ends = array("i"), array("b"), array("q", [0])

    @classmethod
    def read(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        dataset: str | os.PathLike[str],
        *,
        max_length: int,
        split: str = "train",
        seed: int | None = None,
        limit: int | None = None,
    ) -> Rows:
        """Read and encode a data set, or its first `limit` rows; see `burnish.data.examples`.

        Raises:
            DataError: a row cannot be used; names file, row and column.
        """
        rows = cls()
        for example in itertools.islice(load_examples(dataset, split=split, seed=seed), limit):
            encoded = encode(tokenizer, example, max_length)
            rows.counts.add(example, encoded)
            rows._ids.extend(encoded.input_ids.tolist())
            rows._learned.extend((encoded.labels != IGNORED).tolist())
            rows._ends.append(len(rows._ids))
        return rows

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, Tensors `[length]`, int64."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        here = slice(self._ends[index], self._ends[index + 1])
        ids = torch.tensor(self._ids[here], dtype=torch.int64)
        learned = torch.tensor(self._learned[here], dtype=torch.bool)
        learned[0] = False  # nothing comes before it from which it could be predicted
        return {"input_ids": ids, "labels": ids.where(learned, IGNORED)}


def pad_batch(rows: Sequence[dict[str, Tensor]], *, pad: int) -> dict[str, Tensor]:
    """Rows of different lengths as one batch, padded on the right.

    No attention mask is needed: tokens look back only, so that padding behind them changes nothing.

    Args:
        rows: with `input_ids` and `labels`, Tensors `[length]`.
        pad: id of the padding token.

    Returns:
        `input_ids` and `labels`, Tensors `[batch, longest]`; padding is IGNORED.
    """
    values = {"input_ids": pad, "labels": IGNORED}
    return {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
        for key, value in values.items()
    }


def prompts_and_answers(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each row what comes before its first learned token, and its first stretch of learned tokens."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = (labels != IGNORED).nonzero().flatten()
        breaks = (learned.diff() > 1).nonzero().flatten()
        stop = learned[breaks[0]] if len(breaks) else learned[-1]
        found.append((ids[: learned[0]], ids[learned[0] : stop + 1]))
    return found
