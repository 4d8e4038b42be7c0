"""Packed training tokens are the stream of `token_blocks`, in a file that is written once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from burnish.data import bundled_model, bundled_text, token_blocks
from burnish.data.packed import identity, pack_tokens
from burnish.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model())


def test_blocks_are_those_of_token_blocks(tokenizer, tmp_path: Path) -> None:
    packed = pack_tokens(tokenizer, None, tmp_path / "t.bin", num_blocks=40, max_length=64, seed=3)
    blocks = token_blocks(tokenizer, None, num_samples=40, max_length=64, seed=3)
    assert torch.equal(torch.stack([packed.block(i) for i in range(40)]), blocks.input_ids)
    assert packed.num_tokens == 2560 and sum(packed.sources.values()) == sum(blocks.sources.values())


def test_they_are_packed_once_and_found_again(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack_tokens(tokenizer, None, tmp_path / "t.bin", num_blocks=4, max_length=64)
    monkeypatch.setattr("burnish.data.packed.token_stream", lambda *_, **__: pytest.fail("packed twice"))
    assert pack_tokens(tokenizer, None, tmp_path / "t.bin", num_blocks=4, max_length=64) == first


def test_a_cut_off_file_without_its_description_is_written_anew(tokenizer, tmp_path: Path) -> None:
    whole = pack_tokens(tokenizer, None, tmp_path / "a.bin", num_blocks=4, max_length=64)
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:100])
    again = pack_tokens(tokenizer, None, tmp_path / "b.bin", num_blocks=4, max_length=64)
    assert again.fingerprint == whole.fingerprint
    assert torch.equal(again.block(3), whole.block(3))


def test_the_fingerprint_tells_tokens_and_shape_apart(tokenizer, tmp_path: Path) -> None:
    shapes = [(4, 64, 0), (8, 32, 0), (4, 64, 1)]
    found = {
        pack_tokens(tokenizer, None, tmp_path / f"{n}.bin", num_blocks=b, max_length=m, seed=s).fingerprint
        for n, (b, m, s) in enumerate(shapes)
    }
    assert len(found) == 3


def test_a_smaller_corpus_gives_fewer_blocks_and_one_too_small_is_refused(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = pack_tokens(tokenizer, tmp_path / "text.txt", tmp_path / "t.bin", num_blocks=999, max_length=16)
    assert 0 < packed.num_blocks < 999
    with pytest.raises(DataError, match="tokens do not fill one block of 4096: give more text"):
        pack_tokens(tokenizer, tmp_path / "text.txt", tmp_path / "u.bin", num_blocks=1, max_length=4096)


def test_identity_changes_with_content_and_names_what_is_not_local(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = identity(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("two")
    assert identity(tmp_path / "a.txt") != before
    assert list(identity(tmp_path)) == [f"{tmp_path.name}/a.txt"]
    assert identity("owner/name:config") == {"name": "owner/name:config"}
    assert list(identity(None)) == [bundled_text("calibration").name]
