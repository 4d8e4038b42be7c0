"""A model that is trained beside its fixed reference: what can be drawn from both, and how its weights are kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from burnish.align.features import pooled_states
from burnish.align.reference import sequence_logps
from burnish.align.sample import Completions, Sampler, end_tokens, sample
from burnish.align.trees import Tree
from burnish.checkpoint import Checkpoint
from burnish.checkpoint.load import foreign_bars_hidden, load_model
from burnish.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTERS_FILE, ADAPTERS_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Policy:
    """A model and its reference.

    Args:
        model: a causal language model, or one with adapters of PEFT; `restore` and a training change it in place.
        tokenizer: of both.
        reference: another model; None is the model with its adapters off, or a copy of it where it has none.
        batch_size: completions that are drawn or read at a time.
        engine: draws in place of transformers: a function from a directory that `save` wrote (None for the weights at
            the start) to a sampler, such as `VLLMSampler`. The reference is always drawn from by transformers.

    Attributes:
        ends: ids of the tokens that end a completion.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: PreTrainedModel | None = None,
        batch_size: int = 32,
        engine: Callable[[Path | None], Sampler] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.adapters = hasattr(model, "peft_config")
        if reference is None and not self.adapters:
            reference = copy.deepcopy(model)
            self._start = reference.state_dict()
        else:
            self._start = {name: tensor.detach().clone() for name, tensor in self._weights().items()}
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self.ends = end_tokens(self._plain(model), tokenizer)
        self._engine, self._restored = engine, None if engine is None else engine(None)

    def sample(self, prompts: Sequence[Sequence[int]], *, of_reference: bool = False, **options: Any) -> Completions:
        """Draw completions; options as `burnish.align.sample.sample`."""
        if self._restored is not None and not of_reference:
            return self._restored(prompts, **options)
        options |= {"tokenizer": self.tokenizer, "batch_size": self.batch_size}
        if not of_reference:
            return sample(self.model, prompts, **options)
        if self.reference is not None:
            return sample(self.reference, prompts, **options)
        return sample(self.model, prompts, adapters=False, **options)

    def logps(self, trees: Sequence[Tree], *, of_reference: bool = False) -> list[list[float]]:
        """Log-probability of each completion given its prompt, summed over its tokens."""
        model = self.reference if of_reference and self.reference is not None else self.model
        rows = max(1, self.batch_size // max(len(tree["branch_ids"]) for tree in trees))
        return sequence_logps(model, trees, pad=self.ends[0], batch_size=rows, adapters=not of_reference)

    @torch.no_grad()
    def reference_states(self, trees: Sequence[Tree]) -> list[Tensor]:
        """What each completion looks like to the reference, Tensors `[completions, hidden]`; see `pooled_states`."""
        order = sorted(range(len(trees)), key=lambda place: _length(trees[place]))
        found: dict[int, Tensor] = {}
        with self._as_reference() as model:
            for batch in _batches(order, trees, self.batch_size):
                states = pooled_states(model, [trees[place] for place in batch], pad=self.ends[0]).cpu()
                sizes = [len(trees[place]["branch_ids"]) for place in batch]
                found |= dict(zip(batch, torch.split(states, sizes), strict=True))
        return [found[place] for place in range(len(trees))]

    def save(self, directory: Path) -> None:
        """Write the weights: adapters as PEFT writes them, or the whole model with its tokenizer."""
        with foreign_bars_hidden():
            self.model.save_pretrained(directory)
        if not self.adapters:
            self.tokenizer.save_pretrained(directory)
            return
        (directory / "README.md").unlink(missing_ok=True)
        file = directory / ADAPTERS_CONFIG  # PEFT writes sets in the order of their hashes
        config = json.loads(file.read_text(encoding="utf-8"))
        config = {key: sorted(value) if _is_names(value) else value for key, value in config.items()}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def restore(self, directory: Path | None) -> None:
        """Take the weights that `save` wrote, or those at the start.

        Raises:
            CheckpointError: they are not those of this model.
        """
        if directory is None:
            found = self._start
        elif self.adapters:
            found = load_file(directory / ADAPTERS_FILE)
        else:
            found = load_model(Checkpoint.open(directory), dtype=self._plain(self.model).dtype).state_dict()
        if found.keys() != self._start.keys():
            name = min(found.keys() ^ self._start.keys())
            raise CheckpointError(f"{directory}: tensor {name} is there or in the model, not in both")
        if self.adapters:
            import peft

            peft.set_peft_model_state_dict(self.model, found)
        else:
            self.model.load_state_dict(found)
        if self._engine is not None:
            self._restored = None  # frees its memory first
            self._restored = self._engine(directory)

    def _weights(self) -> dict[str, Tensor]:
        if not self.adapters:
            return dict(self.model.state_dict())
        import peft

        return dict(peft.get_peft_model_state_dict(self.model))

    def _plain(self, model: Any) -> Any:
        return model.get_base_model() if self.adapters and model is self.model else model

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The reference in evaluation mode: a model of its own, or the model with its adapters off."""
        if self.reference is not None:
            yield self.reference
            return
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield self._plain(self.model)
        finally:
            for module, training in modes:
                module.training = training


def _length(tree: Tree) -> int:
    return len(tree["prompt_ids"]) + max(map(len, tree["branch_ids"]))


def _batches(order: Sequence[int], trees: Sequence[Tree], batch_size: int) -> Iterator[list[int]]:
    """Places of trees that together have at most `batch_size` completions; at least one tree."""
    batch: list[int] = []
    count = 0
    for place in order:
        branches = len(trees[place]["branch_ids"])
        if batch and count + branches > batch_size:
            yield batch
            batch, count = [], 0
        batch.append(place)
        count += branches
    if batch:
        yield batch


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
