"""The reference's log-probabilities: computed once, kept in a file, looked up; then no reference model is needed."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from burnish.align.trees import Tree, branch_logps, choose_layout, collate, shares_prompts
from burnish.checkpoint.staging import differences
from burnish.errors import CheckpointError, DataError, ResumeMismatchError
from burnish.runs import ranks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "burnish.reference-logps/1"


@dataclass(frozen=True, eq=False)
class ReferenceLogps:
    """Log-probabilities of completions under a reference, by what they say: the order of the rows does not matter.

    Attributes:
        settings: what they depend on besides the tokens; see `reference_settings`.
        values: of each completion given its prompt, summed over its tokens, by `completion_key`.
    """

    settings: Mapping[str, Any]
    values: Mapping[bytes, float]

    def save(self, file: Path) -> None:
        """Write a safetensors file: `keys` [completions, 2] int64, `logps` [completions] float64, in order of the keys;
        settings in its header. It is there whole or not at all."""
        keys = sorted(self.values)
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int64).view(-1, 2),
            "logps": torch.tensor([self.values[key] for key in keys], dtype=torch.float64),
        }
        partial = file.with_name(f".{file.name}.partial")
        save_file(tensors, partial, {"format": FORMAT, "settings": json.dumps(self.settings, sort_keys=True)})
        partial.chmod(0o644)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> ReferenceLogps:
        """Read what `save` wrote.

        Raises:
            CheckpointError: it is no such file.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                about = stored.metadata() or {}
                if about.get("format") != FORMAT:
                    raise CheckpointError(f"{file}: holds no reference log-probabilities ({FORMAT})")
                keys, logps = stored.get_tensor("keys"), stored.get_tensor("logps")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: holds no reference log-probabilities ({error})") from error
        written = keys.numpy().tobytes()
        names = [written[start : start + 16] for start in range(0, len(written), 16)]
        return cls(json.loads(about["settings"]), dict(zip(names, logps.tolist(), strict=True)))

    def require_settings(self, expected: Mapping[str, Any], file: Path) -> None:
        """Refuse values of another reference, of other tokens, or of another precision.

        Raises:
            ResumeMismatchError: a setting that is expected differs; names it and both values.
        """
        wanted = json.loads(json.dumps(expected))
        known = {name: self.settings.get(name) for name in wanted}
        if known != wanted:
            raise ResumeMismatchError(
                f"{file}: reference log-probabilities of another run: {differences(known, wanted)}: name another file,"
                " or remove this one"
            )

    def of(self, rows: Iterable[Tree], file: Path) -> list[list[float]]:
        """The values of each row's completions.

        Raises:
            DataError: some are not there; says how many.
        """
        found, missing, first = [], 0, 0
        for number, row in enumerate(rows, start=1):
            keys = [completion_key(row["prompt_ids"], branch) for branch in row["branch_ids"]]
            absent = sum(key not in self.values for key in keys)
            first = number if absent and not missing else first
            missing += absent
            found.append([self.values.get(key, 0.0) for key in keys])
        if missing:
            raise DataError(
                f"{file}: has no value for {missing} completions, first in row {first} of those that are used: it is of"
                " other data; name another file, or remove this one"
            )
        return found


def completion_key(prompt_ids: Sequence[int], branch_ids: Sequence[int]) -> bytes:
    """Hash (XXH3, 128 bit) of a prompt and a completion, and of where one ends and the other begins."""
    return xxhash.xxh3_128_digest(array("q", [len(prompt_ids), *prompt_ids, *branch_ids]).tobytes())


def reference_settings(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int, dtype: str, temperature: float = 1.0
) -> dict[str, Any]:
    """What reference log-probabilities depend on besides weights and rows.

    Args:
        tokenizer: that made the tokens; its vocabulary and its chat template count.
        max_length: that the rows were cut to.
        dtype: of the forward pass.
        temperature: that logits were divided by.
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return {
        "tokenizer": xxhash.xxh3_128_hexdigest(vocabulary.encode()),
        "chat_template": xxhash.xxh3_128_hexdigest(json.dumps(tokenizer.chat_template).encode()),
        "max_length": max_length,
        "dtype": dtype,
        "temperature": temperature,
    }


def computed(
    model: PreTrainedModel, data: Sequence[Dataset], settings: Mapping[str, Any], **options: Any
) -> ReferenceLogps:
    """The reference's log-probabilities of all completions of some data sets; each of several ranks takes its part.

    Args:
        model: the reference.
        data: rows with `prompt_ids` and `branch_ids`.
        settings: to be kept beside the values.
        options: as for `sequence_logps`.
    """
    found: dict[bytes, float] = {}
    for rows in data:
        mine = rows.shard(ranks.world_size(), ranks.rank()) if len(rows) >= ranks.world_size() else rows
        for row, values in zip(mine, sequence_logps(model, mine, **options), strict=True):
            found |= zip(
                (completion_key(row["prompt_ids"], branch) for branch in row["branch_ids"]), values, strict=True
            )
    if ranks.world_size() > 1:
        parts: list[Any] = [None] * ranks.world_size()
        torch.distributed.all_gather_object(parts, found)
        found = {key: value for part in parts for key, value in part.items()}
    return ReferenceLogps(settings, found)


@torch.no_grad()
def sequence_logps(
    model: PreTrainedModel,
    rows: Sequence[Tree],
    *,
    pad: int,
    batch_size: int,
    dtype: str = "float32",
    temperature: float = 1.0,
    adapters: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """Log-probability of each completion given its prompt, summed over its tokens; dropout is off.

    Args:
        model: a causal language model, or one with PEFT's adapters.
        rows: with `prompt_ids` and `branch_ids`.
        pad: id of the padding token.
        batch_size: rows at a time; those of a length are put together.
        dtype: of the forward pass; "bfloat16" and "float16" run it in mixed precision.
        temperature: logits are divided by it.
        adapters: False leaves them out: the reference.
        advance: called with the number of rows done.
    """
    lengths = [len(row["prompt_ids"]) + max(map(len, row["branch_ids"])) for row in rows]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # what does not fit fails at once
    device, training = next(model.parameters()).device, model.training
    mixed = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    found: list[list[float]] = [[] for _ in lengths]
    off = hasattr(model, "disable_adapter") and not adapters
    with model.disable_adapter() if off else nullcontext(), mixed:
        model.eval()
        try:
            sharing = len(rows) > 0 and shares_prompts(model, rows[0], pad=pad)
            for start in range(0, len(order), batch_size):
                here = order[start : start + batch_size]
                trees = [rows[row] for row in here]
                batch = collate(trees, choose_layout(trees) if sharing else "padded", pad=pad)
                on_device = {name: tensor.to(device) for name, tensor in batch.items()}
                values = iter(branch_logps(model, on_device, temperature=temperature).tolist())
                for row, tree in zip(here, trees, strict=True):
                    found[row] = [next(values) for _ in tree["branch_ids"]]
                advance(len(trees))
        finally:
            model.train(training)
    return found
