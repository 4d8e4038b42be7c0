"""Whether the logits of several models can be compared, decided before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from burnish.errors import UnsupportedModelError


def shared_vocab_size(
    names: Sequence[str], vocabularies: Sequence[Mapping[str, int]], vocab_sizes: Sequence[int]
) -> int:
    """Number of logits that all the models have and that stand for the same tokens.

    Args:
        names: of the models, for the message; the first is the reference.
        vocabularies: token -> id of each model's tokenizer.
        vocab_sizes: number of logits of each model. Sizes that differ only in padding beyond the last token's id are
            accepted: the smallest is what they share.

    Raises:
        UnsupportedModelError: tokenizers differ, or a model has too few logits for its tokenizer.
    """
    first = {index: token for token, index in vocabularies[0].items()}
    for name, vocabulary in zip(names[1:], vocabularies[1:], strict=True):
        other = {index: token for token, index in vocabulary.items()}
        if other != first:
            index = min(i for i in first.keys() | other.keys() if first.get(i) != other.get(i))
            raise UnsupportedModelError(
                f"{name}: its vocabulary of {len(other)} tokens is not that of {names[0]} with {len(first)}:"
                f" token {index} is {other.get(index)!r} against {first.get(index)!r};"
                " only models of one vocabulary can be compared"
            )
    smallest = min(vocab_sizes)
    if smallest < max(vocab_sizes) and smallest <= max(first):
        raise UnsupportedModelError(
            f"{names[vocab_sizes.index(smallest)]}: {smallest} logits, but its tokenizer has ids up to {max(first)}"
        )
    return smallest
