"""Which logits of several models stand for the same tokens."""

import pytest

from burnish.data.vocabulary import shared_vocab_size
from burnish.errors import UnsupportedModelError

WORDS = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(("sizes", "shared"), [([3, 3], 3), ([3, 8], 3), ([8, 3], 3), ([5, 4], 4)])
def test_u8_3_padding_is_cut_to_the_smallest(sizes, shared):
    assert shared_vocab_size(["x", "y"], [WORDS, dict(reversed(WORDS.items()))], sizes) == shared


def test_u8_3_the_first_different_token_is_named():
    with pytest.raises(UnsupportedModelError, match=r"y: its vocabulary of 3 .* x with 3: token 1 is 'B' against 'b'"):
        shared_vocab_size(["x", "y"], [WORDS, {"a": 0, "B": 1, "C": 2}], [3, 3])
    with pytest.raises(UnsupportedModelError, match=r"y: .* of 2 .*: token 2 is None against 'c'"):
        shared_vocab_size(["x", "y"], [WORDS, {"a": 0, "b": 1}], [3, 3])
    with pytest.raises(UnsupportedModelError, match=r"z: .*: token 3 is 'd' against None"):
        shared_vocab_size(["x", "y", "z"], [WORDS, WORDS, WORDS | {"d": 3}], [3, 3, 4])


def test_u8_3_a_model_without_logits_for_its_tokens_is_named():
    with pytest.raises(UnsupportedModelError, match=r"y: 2 logits, but its tokenizer has ids up to 2"):
        shared_vocab_size(["x", "y"], [WORDS, WORDS], [3, 2])
