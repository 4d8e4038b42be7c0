"""Stored log-probabilities of a reference: against plain transformers, and against other rows, orders and settings."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from burnish.align.reference import (
    ReferenceLogps,
    completion_key,
    computed,
    reference_settings,
    sequence_logps,
)
from burnish.errors import CheckpointError, DataError, ResumeMismatchError
from burnish.training.adapters import Lora, add_adapters
from tests.data.test_examples import chat_tokenizer
from tests.data.test_text import byte_tokenizer
from tests.tune.conftest import build_llama

ROWS = [
    {"prompt_ids": [1, 9, 9], "branch_ids": [[5, 6, 2], [7, 2]]},
    {"prompt_ids": [1, 40], "branch_ids": [[8, 8, 8, 8, 8, 2], [9, 2]]},
    {"prompt_ids": [1, 9, 9, 5], "branch_ids": [[6, 2], [30, 31, 32]]},
    {"prompt_ids": [1, 12, 13, 14, 15, 16, 17, 18], "branch_ids": [[19], [20, 2]]},
]
SETTINGS = {"weights": "abc", "max_length": 32}


def plain_logps(model, row):
    """Each completion by itself, its logits whole."""
    found = []
    for branch in row["branch_ids"]:
        ids = torch.tensor([[*row["prompt_ids"], *branch]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        start = len(row["prompt_ids"]) - 1
        found.append(float(logps[torch.arange(start, ids.shape[1] - 1), torch.tensor(branch)].sum()))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_log_probabilities_are_those_of_plain_transformers(batch_size):
    model, done = build_llama(), []
    found = sequence_logps(model, ROWS, pad=0, batch_size=batch_size, advance=done.append)
    assert found == [pytest.approx(plain_logps(model, row), rel=1e-5) for row in ROWS]
    assert sum(done) == len(ROWS)


def test_adapters_and_dropout_are_off_and_the_mode_is_kept():
    model = build_llama(attention_dropout=0.5)
    expected = sequence_logps(model, ROWS, pad=0, batch_size=2)
    adapted = add_adapters(build_llama(attention_dropout=0.5), Lora(dropout=0.5), "base").train()
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_B" in name:
                tensor.normal_()
    assert sequence_logps(adapted, ROWS, pad=0, batch_size=2) == [pytest.approx(row, rel=1e-6) for row in expected]
    assert adapted.training and all(
        adapter.merged is False for adapter in adapted.modules() if hasattr(adapter, "merged")
    )


def test_temperature_divides_logits():
    model = build_llama()
    warm = sequence_logps(model, ROWS[:1], pad=0, batch_size=1, temperature=2.0)
    with torch.no_grad():
        model.lm_head.weight.div_(2.0)
    assert warm == [pytest.approx(row, rel=1e-5) for row in sequence_logps(model, ROWS[:1], pad=0, batch_size=1)]


def test_u8_1_a_file_gives_every_row_its_values_whatever_the_order(tmp_path):
    model, file = build_llama(), tmp_path / "reference.safetensors"
    known = computed(model, [Dataset.from_list(ROWS[:3]), Dataset.from_list(ROWS[3:])], SETTINGS, pad=0, batch_size=2)
    known.save(file)
    again = ReferenceLogps.load(file)
    assert again.settings == SETTINGS and again.values == known.values and len(again.values) == 8
    for rows in itertools.permutations(ROWS, 2):
        assert again.of(rows, file) == [pytest.approx(plain_logps(model, row), rel=1e-5) for row in rows]
    before = file.read_bytes()
    computed(model, [Dataset.from_list(ROWS[::-1])], SETTINGS, pad=0, batch_size=8).save(tmp_path / "other.safetensors")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["other.safetensors", file.name]
    other = ReferenceLogps.load(tmp_path / "other.safetensors")
    assert other.values == pytest.approx(known.values, rel=1e-5) and file.read_bytes() == before


def test_a_key_says_where_the_prompt_ends_and_the_values_belong_to_the_prompt():
    assert completion_key([1, 2], [3]) != completion_key([1], [2, 3])
    assert completion_key([1, 2], [3]) == completion_key((1, 2), (3,)) != completion_key([1, 2], [3, 2])
    assert len(completion_key([1], [2])) == 16


def test_u8_1_missing_values_and_other_settings_are_refused(tmp_path):
    file = tmp_path / "reference.safetensors"
    known = computed(build_llama(), [Dataset.from_list(ROWS[:2])], SETTINGS, pad=0, batch_size=2)
    with pytest.raises(DataError, match=r"reference\.safetensors: has no value for 3 completions, first in row 2"):
        known.of([ROWS[0], {**ROWS[1], "branch_ids": [[9, 2], [10]]}, ROWS[3]], file)
    known.require_settings({"max_length": 32}, file)
    with pytest.raises(
        ResumeMismatchError, match=r"of another run: max_length was 32, is 64; weights was 'abc', is 'x'"
    ):
        known.require_settings({"weights": "x", "max_length": 64}, file)


def test_settings_tell_tokenizers_templates_lengths_and_types_apart():
    def settings(tokenizer=None, **changes):
        return reference_settings(tokenizer or byte_tokenizer(), **{"max_length": 8, "dtype": "float32"} | changes)

    other = byte_tokenizer()
    other.add_tokens(["ab"])
    changed = [{"tokenizer": other}, {"tokenizer": chat_tokenizer()}, {"max_length": 9}, {"dtype": "bfloat16"},
               {"temperature": 0.5}]  # fmt: skip
    found = [settings(), *(settings(**change) for change in changed)]
    assert settings() == found[0]
    for number, (one, another) in enumerate(itertools.combinations(found, 2)):
        assert one != another, number
    differing = [{name for name in found[0] if found[0][name] != one[name]} for one in found[1:]]
    assert differing == [{"tokenizer"}, {"chat_template"}, {"max_length"}, {"dtype"}, {"temperature"}]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CheckpointError, match="text: holds no reference log-probabilities"):
        ReferenceLogps.load(tmp_path / "text")
    save_file({"logps": torch.zeros(1)}, tmp_path / "others.safetensors")
    with pytest.raises(CheckpointError, match=r"others\.safetensors: holds no reference log-probabilities \(burnish"):
        ReferenceLogps.load(tmp_path / "others.safetensors")
