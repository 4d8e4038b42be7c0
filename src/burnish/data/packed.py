"""Training tokens in a file: packed once, mapped into memory, read a block at a time."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from torch import Tensor

from burnish.data.text import bundled_text, token_stream
from burnish.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackedTokens:
    """Blocks of `max_length` tokens in a file of int32.

    Attributes:
        file: where they lie.
        num_blocks: how many; the rest of the text was not needed, or did not fill a block.
        max_length: tokens in a block.
        sources: documents used from each source.
        fingerprint: hash of the tokens and of the shape.
    """

    file: str
    num_blocks: int
    max_length: int
    sources: dict[str, int]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return self.num_blocks * self.max_length

    def block(self, index: int) -> Tensor:
        """Tensor `[max_length]`, int64."""
        tokens = np.memmap(self.file, np.int32, "r", shape=(self.num_blocks, self.max_length))
        return torch.from_numpy(tokens[index].astype(np.int64))


def pack_tokens(
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | os.PathLike[str] | None,
    file: Path,
    *,
    num_blocks: int,
    max_length: int,
    seed: int = 0,
    split: str = "train",
    advance: Callable[[int], None] = lambda tokens: None,
) -> PackedTokens:
    """Pack shuffled documents, with the tokenizer's end token between them, into a file; or find it packed already.

    Args:
        tokenizer: as in `burnish.data.token_blocks`, as are `dataset`, `seed` and `split`.
        dataset: what to read.
        file: where the tokens go; a description lies beside it as `.json`, written last.
        num_blocks: most blocks; a smaller corpus gives fewer.
        max_length: tokens in a block.
        seed: order of the documents.
        split: split of a Hub data set.
        advance: called with the number of tokens packed.

    Raises:
        DataError: as `token_blocks`; or the text does not fill a single block.
    """
    described = file.with_name(file.name + ".json")
    if described.exists():
        return PackedTokens(**json.loads(described.read_text(encoding="utf-8")))
    wanted, written = num_blocks * max_length, 0
    sources: Counter[str] = Counter()
    digest = xxhash.xxh3_128()
    with file.open("wb") as stream:
        for source, tokens in token_stream(tokenizer, dataset, split=split, seed=seed):
            tokens = tokens[: wanted - written]
            data = array("i", tokens).tobytes()
            stream.write(data)
            digest.update(data)
            written += len(tokens)
            sources[source] += 1
            advance(len(tokens))
            if written == wanted:
                break
    if written < max_length:
        name = bundled_text("calibration") if dataset is None else dataset
        raise DataError(f"{name}: {written} tokens do not fill one block of {max_length}: give more text")
    digest.update(f"{written // max_length} x {max_length}".encode())
    packed = PackedTokens(str(file), written // max_length, max_length, dict(sources), digest.hexdigest())
    described.write_text(json.dumps(asdict(packed)), encoding="utf-8")
    return packed


def identity(dataset: str | os.PathLike[str] | None) -> dict[str, str]:
    """What tells whether a data set has changed: a hash of each local file, or the name of what is not local."""
    name = os.fspath(bundled_text("calibration") if dataset is None else dataset)
    path = Path(name).expanduser()
    if not path.exists():
        return {"name": name}
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {file.relative_to(path.parent).as_posix(): _hash(file) for file in files}


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(8 * 2**20):
            digest.update(piece)
    return digest.hexdigest()
