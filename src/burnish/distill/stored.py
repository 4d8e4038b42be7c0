"""A teacher's best tokens on disk: written once, read many times, with the mass of all other tokens kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from burnish.checkpoint import Staging
from burnish.checkpoint.staging import differences, hash_file
from burnish.distill.divergence import LOG_ZERO, best_and_rest
from burnish.errors import CheckpointError, ResumeMismatchError
from burnish.runs import write_json
from burnish.training.head import decoder, language_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "burnish.teacher-logits/1"
ABOUT = "teacher.json"
BLOCKS_PER_FILE = 64
CHUNK_BYTES = 256 * 2**20

Block = Callable[[int], Tensor]
"""Number of a block -> its token ids `[max_length]`."""


@dataclass(frozen=True)
class StoredLogits:
    """The k best tokens of a teacher after each token of some blocks, in safetensors files.

    Each file holds for 64 blocks `ids` [blocks, length, k] int32 and `log_probs` [blocks, length, k + 1] float16, whose
    last entry is the logarithm of the mass of all other tokens; readers normalise, because float16 rounds.

    Attributes:
        directory: where.
        about: content of `teacher.json`.
    """

    directory: Path
    about: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, expected: Mapping[str, Any]) -> StoredLogits:
        """Open what `store` wrote, and hold its fingerprint against the one expected.

        Raises:
            CheckpointError: not such a directory.
            ResumeMismatchError: it was made of other data or another teacher; names the field and both values.
        """
        try:
            about = json.loads((directory / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: holds no stored logits ({ABOUT}: {error})") from error
        if about.get("format") != FORMAT:
            raise CheckpointError(f"{directory / ABOUT}: holds no stored logits ({FORMAT})")
        wanted = json.loads(json.dumps(expected))
        known = {key: about["fingerprint"].get(key) for key in wanted}
        if known != wanted:
            raise ResumeMismatchError(
                f"{directory}: stored logits of another run: {differences(known, wanted)}: choose another directory"
            )
        return cls(directory, about)

    @property
    def tail_mass(self) -> float:
        """Mean probability of all tokens that are not stored."""
        return float(self.about["tail_mass"])

    def blocks(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Ids [rows, length, k] int32, and log-probabilities [rows, length, k + 1] float32, normalised."""
        ids, log_probs = zip(*(self._block(row) for row in rows), strict=True)
        return torch.stack(ids), torch.stack(log_probs).float().log_softmax(-1)

    def _block(self, row: int) -> tuple[Tensor, Tensor]:
        with safe_open(self.directory / _file(row // BLOCKS_PER_FILE), framework="pt") as file:
            place = row % BLOCKS_PER_FILE
            return file.get_slice("ids")[place], file.get_slice("log_probs")[place]


@torch.inference_mode()
def store(
    model: PreTrainedModel,
    block: Block,
    num_blocks: int,
    directory: Path,
    *,
    best: int,
    temperature: float,
    vocab_size: int,
    batch_size: int,
    fingerprint: Mapping[str, Any],
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda blocks: None,
) -> StoredLogits:
    """Run a teacher over blocks and keep its best tokens; finished files of an interrupted run are kept.

    Args:
        model: the teacher, in evaluation mode.
        block: gives the token ids of a block.
        num_blocks: how many.
        directory: where; it appears complete or not at all.
        best: k, tokens kept.
        temperature: softens the distribution before it is stored.
        vocab_size: tokens that the student has, too.
        batch_size: blocks at a time.
        fingerprint: what the result depends on.
        overwrite: replace what is there.
        advance: called with the number of blocks done.

    Ours, as is the outcome for the rest (DistillKit has one, too): a renormalised top-k would teach the student that
    no other token is possible.
    """
    staging = Staging(directory, fingerprint, overwrite=overwrite)
    mass, tokens = 0.0, 0
    for number in range(-(-num_blocks // BLOCKS_PER_FILE)):
        rows = range(number * BLOCKS_PER_FILE, min((number + 1) * BLOCKS_PER_FILE, num_blocks))
        target = staging.files / _file(number)
        if not staging.verified(target.name):
            parts = [
                _best_tokens(model, torch.stack([block(row) for row in rows[first : first + batch_size]]), best,
                             temperature, vocab_size)
                for first in range(0, len(rows), batch_size)
            ]  # fmt: skip
            ids, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
            with staging.explaining(target.name):
                partial = target.with_name(target.name + ".partial")
                save_file({"ids": ids, "log_probs": log_probs}, partial)
                partial.replace(target)
                staging.finish(target.name, hash_file(target))
        with safe_open(target, framework="pt") as file:
            rest = file.get_tensor("log_probs")[..., -1].double().exp()
        mass, tokens = mass + float(rest.sum()), tokens + rest.numel()
        advance(len(rows))
    about = {
        "format": FORMAT, "fingerprint": dict(fingerprint), "blocks": num_blocks, "best": best,
        "temperature": temperature, "vocab_size": vocab_size, "tail_mass": mass / tokens,
    }  # fmt: skip
    write_json(staging.files / ABOUT, about)
    staging.publish()
    return StoredLogits(directory, about)


def _best_tokens(
    model: PreTrainedModel, ids: Tensor, best: int, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    hidden = decoder(model)(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    head = language_head(model)
    step = max(1, CHUNK_BYTES // (4 * vocab_size))
    found, logs = [], []
    for chunk in hidden.flatten(0, 1).split(step):
        log_p = (head.logits(chunk)[..., :vocab_size].float() / temperature).log_softmax(-1)
        top = log_p.topk(best).indices
        found.append(top.int().cpu())
        logs.append(best_and_rest(log_p, top).clamp(min=LOG_ZERO).half().cpu())
    shape = ids.shape
    return torch.cat(found).view(*shape, best), torch.cat(logs).view(*shape, best + 1)


def _file(number: int) -> str:
    return f"teacher-logits-{number:05d}.safetensors"
