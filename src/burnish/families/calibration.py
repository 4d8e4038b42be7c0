"""Calibration text for a model: its tokenizer, held against its embedding, and tokens in blocks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from burnish.checkpoint import Checkpoint
from burnish.data import TokenBlocks, token_blocks
from burnish.errors import BurnishError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_calibration(
    model: Checkpoint, dataset: str | None, num_samples: int, max_length: int, seed: int
) -> TokenBlocks:
    """Calibration tokens with the model's tokenizer; sequences at most as long as its positions.

    Raises:
        DataError: the text cannot be used.
        BurnishError: the directory holds no tokenizer.
    """
    from transformers import AutoTokenizer

    if not any((model.path / name).exists() for name in TOKENIZER_FILES):
        raise BurnishError(
            f"{model.path}: no tokenizer, none of {', '.join(TOKENIZER_FILES)}: copy the model's own there"
        )
    longest = model.config.get("max_position_embeddings")
    if longest is not None and max_length > longest:
        warnings.warn(
            f"max_length={max_length} is more than the model's {longest} positions: {longest} is used", stacklevel=4
        )
        max_length = longest
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path)
    except (OSError, ValueError) as error:
        raise BurnishError(f"{model.path}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from error
    return token_blocks(tokenizer, dataset, num_samples=num_samples, max_length=max_length, seed=seed)


def require_sound_tokens(model: Checkpoint, rows: int) -> None:
    """Hold the tokenizer's and the generation config's ids against an embedding of `rows`.

    Raises:
        BurnishError: an id has no row in the embedding; names the file and both values.
    """
    file = model.path / "tokenizer.json"
    if file.exists():
        content = _read_object(file)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max([*ids, *(token["id"] for token in content.get("added_tokens") or [])], default=0)
        if largest >= rows:
            raise BurnishError(f"{file}: token id {largest} has no row in the embedding of {rows} rows")
    file = model.path / "generation_config.json"
    if file.exists():
        settings = _read_object(file)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = settings.get(key)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not (isinstance(token, int) and -1 <= token < rows):
                    raise BurnishError(f"{file}: {key} {token!r} has no row in the embedding of {rows} rows")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BurnishError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise BurnishError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
