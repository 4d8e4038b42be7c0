"""Rows in memory are what the data room encoded, and padding adds nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from burnish.data.examples import IGNORED, encode, load_examples
from burnish.tune.rows import Rows, pad_batch, prompts_and_answers


def test_rows_are_the_encoded_examples(llama: Path, rows: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = Rows.read(tokenizer, rows, max_length=20)
    examples = list(load_examples(rows))
    assert len(found) == len(examples) == found.counts.sources.total()
    for row, example in zip((found[index] for index in range(len(found))), examples, strict=True):
        expected = encode(tokenizer, example, 20)
        assert torch.equal(row["input_ids"], expected.input_ids) and torch.equal(row["labels"], expected.labels)
    assert len(Rows.read(tokenizer, rows, max_length=20, limit=3)) == 3


def test_the_first_token_is_never_learned(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "", "completion": "ab"}\n')
    row = Rows.read(AutoTokenizer.from_pretrained(llama), tmp_path / "rows.jsonl", max_length=8)[0]
    assert row["labels"][0] == IGNORED and (row["labels"][1:] == row["input_ids"][1:]).all()


def test_padding_and_taking_apart() -> None:
    first = {"input_ids": torch.tensor([5, 6, 7, 8, 9]), "labels": torch.tensor([IGNORED, IGNORED, 7, IGNORED, 9])}
    second = {"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([IGNORED, 4])}
    batch = pad_batch([first, second], pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9], [-100, 4, -100, -100, -100]]
    found = [(prompt.tolist(), answer.tolist()) for prompt, answer in prompts_and_answers(batch)]
    assert found == [([5, 6], [7]), ([3], [4])]  # later turns of a chat are not part of the first answer
