"""A prompt with its completions is a tree: how a batch of trees is laid out, and the log-probability of each branch.

Source: computing a shared prompt once (tree attention) is known from serving and from open implementations of DPO; the
layouts here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from burnish.training.head import decoder, language_head
from burnish.training.logps import token_divergences, token_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Literal["padded", "shared", "packed"]
Tree = Mapping[str, Any]
"""`prompt_ids` [p], and `branch_ids`, a list of lists of tokens."""

PROMPT = -1
"""The branch of a prompt's token."""
SAVING = 0.9
"""Prompts are shared where this share of the places of a padded batch, or less, is enough."""
TOLERANCE = {"whole": 1e-4, "half": 3e-2}
"""Relative error of a log-probability, by the precision of a forward pass."""


def collate(trees: Sequence[Tree], layout: Layout, *, pad: int) -> dict[str, Tensor]:
    """The tensors of a batch of trees.

    Layouts: "padded" is a row for each branch, its prompt before it; "shared" a row for each tree, the prompt once and
    then its branches, which do not see each other; "packed" a single row with all sequences, one behind the other,
    without padding. All give the same log-probabilities.

    Args:
        trees: rows with `prompt_ids` and `branch_ids`.
        layout: of the batch.
        pad: id of the padding token.

    Returns:
        `input_ids`, and unless "padded" `position_ids`, Tensors `[rows, length]`, int64; `sources`, `token_ids`,
        `owners`, Tensors `[tokens]`, int64: the place (of all rows, flat) from which each token of a branch is
        predicted, the token, and the number of its branch; "shared" has `branches` `[rows, length]`: PROMPT, or the
        number within the tree.
    """
    sequences = _whole_trees(trees) if layout == "shared" else _single_branches(trees)
    ids = [torch.tensor(sequence.ids) for sequence in sequences]
    positions = [torch.tensor(sequence.positions) for sequence in sequences]
    if layout == "packed":
        starts = [0, *torch.tensor([len(row) for row in ids]).cumsum(0)[:-1].tolist()]
        batch = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None]}
    else:
        length = max(map(len, ids))
        starts = [row * length for row in range(len(ids))]
        batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad)}
    if layout == "shared":
        batch["position_ids"] = pad_sequence(positions, batch_first=True)
        branches = [torch.tensor(sequence.branches) for sequence in sequences]
        batch["branches"] = pad_sequence(branches, batch_first=True, padding_value=PROMPT)
    pairs = list(zip(sequences, starts, strict=True))
    return batch | {
        "sources": torch.tensor([start + place for row, start in pairs for place in row.sources]),
        "token_ids": torch.tensor([token for row in sequences for token in row.tokens]),
        "owners": torch.tensor([owner for row in sequences for owner in row.owners]),
    }


def choose_layout(trees: Sequence[Tree]) -> Layout:
    """ "shared" where it makes a batch smaller by a tenth or more, else "padded"."""
    whole = max(len(tree["prompt_ids"]) + sum(map(len, tree["branch_ids"])) for tree in trees)
    longest = max(len(tree["prompt_ids"]) + max(map(len, tree["branch_ids"])) for tree in trees)
    rows = sum(len(tree["branch_ids"]) for tree in trees)
    return "shared" if len(trees) * whole <= SAVING * rows * longest else "padded"


def branch_logps(model: PreTrainedModel, batch: Mapping[str, Tensor], *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each branch given its prompt, summed over its tokens; logits never exist whole.

    Args:
        model: a causal language model.
        batch: of `collate`, on the model's device.
        temperature: logits are divided by it.

    Returns:
        Tensor `[branches]`, float32 at least.
    """
    return branch_sums(branch_token_logps(model, batch, temperature=temperature), batch)


def branch_token_logps(model: PreTrainedModel, batch: Mapping[str, Tensor], *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token of each branch, Tensor `[tokens]`; arguments as in `branch_logps`."""
    head, token_ids = language_head(model), batch["token_ids"]

    def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return token_logps(hidden, weight, bias, token_ids, finish=head.finish, temperature=temperature)

    return head.read(branch_states(model, batch), read)


def branch_token_divergences(
    model: PreTrainedModel, batch: Mapping[str, Tensor], target: Callable[[slice], Tensor], *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and KL(target || model) where it is predicted, Tensors `[tokens]`.

    Args:
        model, batch, temperature: as in `branch_logps`; the divergence is at temperature 1.
        target: which tokens -> logits `[chunk, vocab]`.
    """
    head, token_ids = language_head(model), batch["token_ids"]

    def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logps = token_logps(hidden, weight, bias, token_ids, finish=head.finish, temperature=temperature)
        return logps, token_divergences(hidden, weight, bias, target, finish=head.finish)

    return head.read(branch_states(model, batch), read)


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `branch_logps` needs of a batch that holds more."""
    names = ("input_ids", "position_ids", "branches", "sources", "token_ids", "owners")
    return {name: batch[name] for name in names if name in batch}


def branch_sums(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Sums `[branches]` of one value per token `[tokens]`."""
    branches = int(batch["owners"][-1]) + 1
    return values.new_zeros(branches).index_add(0, batch["owners"], values)


def branch_tokens(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Values of tokens `[tokens, ...]` by branch, `[branches, longest, ...]`, with zeros behind a branch's end."""
    lengths = branch_lengths(batch).tolist()
    return pad_sequence(list(torch.split(values, lengths)), batch_first=True)


def branch_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens of each branch, Tensor `[branches]`, int64."""
    return batch["owners"].bincount()


def branch_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states from which the tokens of all branches are predicted, Tensor `[tokens, hidden]`."""
    return _decoded(model, batch).last_hidden_state.flatten(0, 1)[batch["sources"]]  # type: ignore[no-any-return]


def all_branch_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """As `branch_states`, of every layer: Tensors `[tokens, hidden]`; the last is normalised as the head takes it."""
    states = _decoded(model, batch, output_hidden_states=True).hidden_states[1:]
    return [state.flatten(0, 1)[batch["sources"]] for state in states]


def _decoded(model: PreTrainedModel, batch: Mapping[str, Tensor], **options: Any) -> Any:
    if "position_ids" in batch:
        options["position_ids"] = batch["position_ids"]
    if "branches" in batch:
        options["attention_mask"] = _tree_mask(model, batch["branches"])
    return decoder(model)(input_ids=batch["input_ids"], use_cache=False, **options)


@torch.no_grad()
def shares_prompts(model: PreTrainedModel, tree: Tree, *, pad: int) -> bool:
    """Whether a model gives a tree the same log-probabilities when its prompt is computed once.

    Models with sliding windows or recurrent layers, and attention kernels that take no mask, do not.

    Args:
        model: in evaluation mode.
        tree: with two branches or more.
        pad: id of the padding token.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    text = model.config.get_text_config()
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
        return False
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return False
    device = next(model.parameters()).device
    layouts: tuple[Layout, Layout] = ("padded", "shared")
    plain, shared = (
        branch_logps(model, {key: value.to(device) for key, value in collate([tree], layout, pad=pad).items()})
        for layout in layouts
    )
    half = model.dtype.itemsize < 4 or torch.is_autocast_enabled(device.type)
    error = (plain - shared).abs() / plain.abs().clamp(min=1)
    return bool(error.max() < TOLERANCE["half" if half else "whole"])


class _Sequence:
    """A row before it is padded: tokens, positions, branches, and what is predicted from which place."""

    def __init__(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ValueError("a prompt without a token: there is nothing from which a completion could begin")
        self.ids, self.positions, self.branches = list(prompt), list(range(len(prompt))), [PROMPT] * len(prompt)
        self.sources: list[int] = []
        self.tokens: list[int] = []
        self.owners: list[int] = []
        self._prompt = len(prompt)

    def add(self, branch: Sequence[int], number: int, owner: int) -> None:
        start = len(self.ids)
        self.ids += branch
        self.positions += range(self._prompt, self._prompt + len(branch))
        self.branches += [number] * len(branch)
        self.sources += [self._prompt - 1, *range(start, start + len(branch) - 1)]
        self.tokens += branch
        self.owners += [owner] * len(branch)


def _whole_trees(trees: Sequence[Tree]) -> list[_Sequence]:
    rows, owner = [], 0
    for tree in trees:
        row = _Sequence(tree["prompt_ids"])
        for number, branch in enumerate(tree["branch_ids"]):
            row.add(branch, number, owner)
            owner += 1
        rows.append(row)
    return rows


def _single_branches(trees: Sequence[Tree]) -> list[_Sequence]:
    rows = []
    for tree in trees:
        for branch in tree["branch_ids"]:
            rows.append(_Sequence(tree["prompt_ids"]))
            rows[-1].add(branch, 0, len(rows) - 1)
    return rows


def _tree_mask(model: PreTrainedModel, branches: Tensor) -> Tensor:
    """What is added to attention, `[rows, 1, length, length]`: 0 for what comes before, in the prompt or in the same
    branch; in the type of the pass, so that no layer keeps a copy of its own."""
    length, device = branches.shape[1], branches.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    here, there = branches[:, :, None], branches[:, None, :]
    before = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    seen = before & ((there == PROMPT) | (there == here))
    return torch.zeros(seen.shape, dtype=dtype, device=branches.device).masked_fill_(~seen, torch.finfo(dtype).min)[
        :, None
    ]
