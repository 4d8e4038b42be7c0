"""Preferences: read pairs, single judged completions or prompts alone, and encode each prompt with its completions."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from burnish.data.examples import Messages, sharegpt_turns, system_turn
from burnish.data.text import Layout, columns_of, load_rows, messages, opening, rendered, shown, string
from burnish.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Format = Literal[
    "prompt-chosen-rejected", "implicit-prompt", "conversations", "prompt-completion", "messages",
    "pair", "prompt",
]  # fmt: skip
CONVERTED = {"conversations": "converted to messages", "messages": "the last turn is taken",
             "pair": "each two judged completions"}  # fmt: skip
"""What is said of a format that is not read as it is."""

OPTIONAL = ("label", "score_chosen", "score_rejected", "annotator", "similarity", "system", "tools")
PAIRS_ACCEPTED = (
    "accepted: `prompt`, `chosen` and `rejected` (strings or messages), or `chosen` and `rejected` that both begin with"
    " the prompt, or `conversations` ([{from, value}]) with `chosen` and `rejected` ({from, value}); optional `label`"
    " (0 to 1: probability that chosen is preferred), `score_chosen` and `score_rejected`, `annotator`, `similarity`"
)
UNPAIRED_ACCEPTED = (
    "accepted: `prompt`, `completion` (both strings, or both messages) and `label` (true or false); `messages` and"
    " `label`; or pairs, `prompt`, `chosen` and `rejected`"
)
COMPLETIONS_ACCEPTED = "accepted: `prompt` and `completion` (both strings, or both messages); or `messages`"
PROMPTS_ACCEPTED = "accepted: `prompt` (a string or messages)"


class Preference(NamedTuple):
    """One prompt, its completions and what is known of them.

    Attributes:
        source: file or data set.
        row: counted from 1.
        format: of the row.
        prompt: a string, or messages; may be empty.
        completions: of the same kind: chosen and rejected; or one that was judged; or none.
        label: of a pair the probability that the first is preferred; of a single completion 1 (desirable) or 0.
        scores: a reward of each completion, or None.
        annotator: who gave the label, or None.
        similarity: cosine similarity of prompt and chosen completion, or None.
        tools: for the chat template, or None.
    """

    source: str
    row: int
    format: Format
    prompt: str | Messages
    completions: tuple[str | Messages, ...]
    label: float = 1.0
    scores: tuple[float, ...] | None = None
    annotator: str | None = None
    similarity: float | None = None
    tools: list[Any] | None = None


class Branches(NamedTuple):
    """A prompt and its completions in tokens.

    Attributes:
        prompt_ids: not empty.
        branch_ids: of each completion, with its end token unless that was cut; none is empty.
        cut: completions that lost their end.
        moved: the prompt's last tokens are not the same before the completions, and count to these.
    """

    prompt_ids: list[int]
    branch_ids: list[list[int]]
    cut: int
    moved: bool


@dataclass
class Counts:
    """What was read; printed as one line.

    Attributes:
        sources: rows of each source.
        formats: rows of each format.
        dropped: rows whose prompt alone does not fit.
        equal: rows whose completions are all the same tokens: their loss is constant.
        soft: rows with a label that is neither 0 nor 1.
        cut: completions that lost their end.
        moved: rows whose prompt ends otherwise before the completions than alone.
        tokens: kept, a prompt once.
        learned: those of completions.
    """

    sources: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    equal: int = 0
    soft: int = 0
    cut: int = 0
    moved: int = 0
    tokens: int = 0
    learned: int = 0

    def add(self, row: Preference, branches: Branches | None) -> None:
        """Count one row; None where its prompt does not fit."""
        self.sources[row.source] += 1
        self.formats[row.format] += 1
        if branches is None:
            self.dropped += 1
            return
        first, *others = branches.branch_ids or [[]]
        self.equal += bool(others) and all(other == first for other in others)
        self.soft += row.label not in (0.0, 1.0)
        self.cut += branches.cut
        self.moved += branches.moved
        learned = sum(map(len, branches.branch_ids))
        self.learned += learned
        self.tokens += learned + len(branches.prompt_ids)

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return self.sources.total() - self.dropped

    def __str__(self) -> str:
        formats = ", ".join(
            f"{count} {name}" + (f" ({CONVERTED[name]})" if name in CONVERTED else "")
            for name, count in self.formats.items()
        )
        told = {
            "dropped, their prompt alone does not fit": self.dropped,
            "of equal completions, whose loss is constant (ln 2 with dpo)": self.equal,
            "of soft labels": self.soft,
            "completions cut": self.cut,
            "prompts that end in another way before a completion": self.moved,
        }
        extra = "".join(f", {count} {what}" for what, count in told.items() if count)
        return f"{self.sources.total()} rows: {formats}; {self.tokens} tokens, {self.learned} of completions{extra}"


def load_preferences(
    dataset: str | os.PathLike[str], *, split: str = "train", seed: int | None = None
) -> Iterator[Preference]:
    """The pairs of a data set.

    Args:
        dataset: a `.json`, `.jsonl`, `.csv` or `.parquet` file, a directory of such files (read in the order of their
            names), `-` for JSON lines on standard input, or a data set of the Hub as `name` or `name:config`. A row
            holds `chosen` and `rejected` with `prompt`, or with the prompt inside both, or with `conversations`; and
            may hold `label`, `score_chosen` and `score_rejected`, `annotator`, `similarity` and `tools`.
        split: split of a Hub data set; files have none.
        seed: shuffle the rows with this seed; None keeps their order.

    Raises:
        DataError: nothing is there, or a row is not as described; names file, row and column.

    Source: the columns, and the prompt that both completions begin with, as TRL has them.
    """
    return _load(dataset, PAIRS, split, seed)


def load_unpaired(
    dataset: str | os.PathLike[str], *, split: str = "train", seed: int | None = None
) -> Iterator[Preference]:
    """The single judged completions of a data set: `prompt`, `completion` and `label`; a pair gives two.

    Args:
        dataset, split, seed: as in `load_preferences`.

    Raises:
        DataError: as `load_preferences`.
    """
    return _load(dataset, UNPAIRED, split, seed)


def load_completions(
    dataset: str | os.PathLike[str], *, split: str = "train", seed: int | None = None
) -> Iterator[Preference]:
    """The completions of a data set, not judged: what is to be forgotten, or to be kept.

    Args:
        dataset, split, seed: as in `load_preferences`; a row holds `prompt` and `completion`, or `messages`, whose last
            turn is the completion.

    Raises:
        DataError: as `load_preferences`.
    """
    return _load(dataset, COMPLETIONS, split, seed)


def load_prompts(
    dataset: str | os.PathLike[str], *, split: str = "train", seed: int | None = None
) -> Iterator[Preference]:
    """The prompts of a data set, without completions; other columns than `prompt` and `tools` are not looked at.

    Args:
        dataset, split, seed: as in `load_preferences`.

    Raises:
        DataError: as `load_preferences`.
    """
    return _load(dataset, PROMPTS, split, seed)


def load_pairs_or_prompts(
    dataset: str | os.PathLike[str], *, split: str = "train", seed: int | None = None
) -> Iterator[Preference]:
    """The pairs of a data set, or, where the rows have neither `chosen` nor `rejected`, its prompts.

    Args:
        dataset, split, seed: as in `load_preferences`.

    Raises:
        DataError: as `load_preferences`; or some rows are pairs and others are not.
    """
    first: Preference | None = None
    for row in _load(dataset, PAIRS_OR_PROMPTS, split, seed):
        first = first or row
        if len(row.completions) != len(first.completions):
            pair, prompt = (row, first) if row.completions else (first, row)
            raise DataError(
                f"{prompt.source} row {prompt.row}: has no chosen and no rejected, which {pair.source} row {pair.row}"
                " has: give pairs alone, or prompts alone"
            )
        yield row


def _load(
    dataset: str | os.PathLike[str], layout: Layout[list[Preference]], split: str, seed: int | None
) -> Iterator[Preference]:
    empty = True
    for row in load_rows(dataset, layout, split=split, seed=seed):
        empty = False
        yield from (found._replace(source=row.source, row=row.row) for found in row.content)
    if empty:
        raise DataError(f"{dataset}: no rows in it; {layout.accepted}")


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Preference], max_length: int
) -> tuple[Dataset, Counts]:
    """Preferences as rows that can be trained on, and what was counted.

    Args:
        tokenizer: of the model.
        rows: of `load_preferences`, `load_unpaired` or `load_prompts`.
        max_length: tokens of a prompt with a completion.

    Returns:
        Rows of `prompt_ids` [p], `branch_ids` (a list of tokens for each completion), `label`, and `row`, the place
        among all that were given; and of `rewards` (one for each completion), `annotator` and `similarity` where the
        data have them.

    Raises:
        DataError: as `encode_pair`; a column is there in some rows and not in others; or no prompt fits.
    """
    from datasets import Dataset

    counts, kept, name = Counts(), list[dict[str, Any]](), "the data"
    first: Preference | None = None
    for place, row in enumerate(rows):
        name, branches = row.source, encode_pair(tokenizer, row, max_length)
        counts.add(row, branches)
        if branches is None:
            continue
        first = first or row
        optional = {"rewards": row.scores, "annotator": row.annotator, "similarity": row.similarity}
        kept.append({
            "prompt_ids": np.array(branches.prompt_ids, np.int32),
            "branch_ids": [np.array(ids, np.int32) for ids in branches.branch_ids],
            "label": row.label,
            "row": place,
            **{name: value for name, value in optional.items() if value is not None},
        })  # fmt: skip
        if differing := kept[-1].keys() ^ kept[0].keys():
            column = min(differing)
            told = "score_chosen and score_rejected" if column == "rewards" else column
            here, there = (row, first) if column in kept[-1] else (first, row)
            raise DataError(
                f"{there.source} row {there.row}: has no {told}, which {here.source} row {here.row} has:"
                " give it in all rows, or in none"
            )
    if not kept:
        raise DataError(f"{name}: no prompt is shorter than max_length={max_length}: raise it")
    return Dataset.from_list(kept), counts


def encode_pair(tokenizer: PreTrainedTokenizerBase, row: Preference, max_length: int) -> Branches | None:
    """Tokens of a prompt and of its completions, however many; None where the prompt alone does not fit.

    The prompt with each completion is tokenised as a whole: two strings joined as they are, opened by the tokenizer's
    beginning-of-text token if it adds one, and closed by its end token; a chat as the tokenizer's own template writes
    it, closed by the end token where the template writes no special token behind the prompt. The prompt is what its
    tokens, alone and with the opening that the template writes for generation, have in common with all completions:
    where a token spans both, it belongs to the completion.

    A completion that is too long loses its end. Prompts are never cut.

    Args:
        tokenizer: of the model.
        row: the prompt and its completions.
        max_length: tokens of the prompt with a completion, at least 2.

    Raises:
        DataError: the template is missing or refuses the messages, or nothing is left of the prompt; names the row.
        ValueError: a tokenizer without an end token; `max_length` is too small.

    Source: tokens and cuts as TRL's DPOTrainer has them, but for the end token of templates that write none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to end a completion with: set one")
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: choose at least 2")
    where = f"{row.source} row {row.row}: the prompt"
    prompt = _ids(tokenizer, row.prompt, row, add_generation_prompt=True)
    whole = [_ids(tokenizer, row.prompt + completion, row) for completion in row.completions]  # type: ignore[operator]
    common = prompt[: _common_length([prompt, *whole])]
    if not common:
        raise DataError(
            f"{where} has no token of its own, and the tokenizer opens texts with none: give a longer prompt"
        )
    if len(common) >= max_length:
        return None
    branches = [_ended(tokenizer, ids[len(common) :], chat=isinstance(row.prompt, list)) for ids in whole]
    room = max_length - len(common)
    return Branches(
        common, [ids[:room] for ids in branches], sum(len(ids) > room for ids in branches), len(common) < len(prompt)
    )


def _ids(tokenizer: PreTrainedTokenizerBase, content: str | Messages, row: Preference, **options: Any) -> list[int]:
    if isinstance(content, str):
        first, text = opening(tokenizer), content
    else:
        options |= {} if row.tools is None else {"tools": row.tools}
        # The template writes the special tokens itself.
        first, text = [], rendered(tokenizer, content, f"{row.source} row {row.row}: the chat", **options)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return first + ids


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, chat: bool) -> list[int]:
    end = tokenizer.eos_token_id
    if ids[-1:] == [end] or (chat and set(ids) & _special(tokenizer)):
        return ids
    return [*ids, end]


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def read_pair(row: object, where: str, accepted: str = PAIRS_ACCEPTED) -> Preference:
    """The pair in a row of columns; messages about it open with `where`.

    Raises:
        DataError: the row is not as described; names the column.
    """
    columns = _filled(row, where, accepted)
    if not {"chosen", "rejected"} <= columns.keys():
        raise DataError(f"{where}: found the columns {', '.join(map(repr, columns)) or 'none'}; {accepted}")
    format, prompt, chosen, rejected = _prompt_and_pair(columns, where, accepted)
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        _require_answer(completion, name, where)
    scores = None
    if "score_chosen" in columns or "score_rejected" in columns:
        names = ("score_chosen", "score_rejected")
        for name in names:
            if name not in columns:
                raise DataError(f"{where}: column {name!r} is missing, the other score is there; {accepted}")
        scores = tuple(_number(columns, name, where) for name in names)
    return Preference(
        "", 0, format, prompt, (chosen, rejected),
        label=_number(columns, "label", where, 0, 1) if "label" in columns else 1.0,
        scores=scores,
        annotator=str(columns["annotator"]) if "annotator" in columns else None,
        similarity=_number(columns, "similarity", where, -1, 1) if "similarity" in columns else None,
        tools=_tools(columns, where, accepted),
    )  # fmt: skip


def _filled(row: object, where: str, accepted: str) -> dict[str, Any]:
    # A table has every column in every row: those that a row does not use are null, or empty in a text file.
    columns = columns_of(row, where, accepted)
    return {
        name: columns[name] for name in columns if columns[name] not in ((None, "") if name in OPTIONAL else (None,))
    }


def _prompt_and_pair(columns: Mapping[str, Any], where: str, accepted: str) -> tuple[Format, Any, Any, Any]:
    """Format, prompt, chosen and rejected, all of one kind."""
    if "conversations" in columns:
        prompt = system_turn(columns, where, accepted) + sharegpt_turns(columns["conversations"], where, accepted)
        return "conversations", prompt, _turn(columns, "chosen", where), _turn(columns, "rejected", where)
    read = string if isinstance(columns["chosen"], str) else messages
    chosen: Any = read(columns, "chosen", where, accepted)
    rejected: Any = read(columns, "rejected", where, accepted)
    if "prompt" not in columns:
        return "implicit-prompt", *_without_common(chosen, rejected)
    if read is messages and isinstance(columns["prompt"], str):
        # Data that keep a copy of the prompt beside chats that begin with it, or beside answers alone.
        if chosen[0]["role"] != "assistant":
            return "implicit-prompt", *_without_common(chosen, rejected)
        return "prompt-chosen-rejected", [{"role": "user", "content": columns["prompt"]}], chosen, rejected
    if read is string and isinstance(columns["prompt"], list):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        read = messages
    return "prompt-chosen-rejected", read(columns, "prompt", where, accepted), chosen, rejected


def _without_common(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that both begin with, and what is left of both, which is never nothing; a space before the first
    difference belongs to the completions."""
    common = _common_length([chosen, rejected])
    first = min(common, len(chosen) - 1, len(rejected) - 1)
    if first == common and first > 0 and chosen[first - 1] == " ":
        first -= 1
    return chosen[:first], chosen[first:], rejected[first:]


def _common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Items that all sequences begin with."""
    together = enumerate(zip(*sequences, strict=False))
    shortest = min(map(len, sequences))
    return next((place for place, items in together if any(item != items[0] for item in items)), shortest)


def _turn(columns: Mapping[str, Any], name: str, where: str) -> Messages:
    """An answer that is a single sharegpt turn."""
    return sharegpt_turns([columns[name]], f"{where}: column {name!r}", PAIRS_ACCEPTED)


def _require_answer(completion: str | Messages, name: str, where: str) -> None:
    """A completion is text, or turns of the assistant alone: what others say is not the model's choice."""
    if isinstance(completion, str):
        if not completion:
            raise DataError(f"{where}: column {name!r} is empty, expected a completion")
        return
    roles = [message["role"] for message in completion]
    if set(roles) != {"assistant"}:
        found = ", ".join(roles) or "none"
        expected = "turns of the assistant alone after a prompt that chosen and rejected share"
        raise DataError(f"{where}: column {name!r} has the roles {found} behind the prompt, expected {expected}")
    if not all(message.get("content") or message.get("tool_calls") for message in completion):
        raise DataError(f"{where}: column {name!r} has an empty turn, expected a completion")


def _number(columns: Mapping[str, Any], name: str, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A column that holds a finite number within bounds, a truth value, or text that is one of them."""
    value = columns[name]
    try:
        found = {"true": 1.0, "false": 0.0}.get(str(value).lower())
        found = float(value) if found is None else found
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and low <= found <= high):
        within = f"a number from {low:g} to {high:g}" if math.isfinite(high) else "a finite number"
        raise DataError(f"{where}: column {name!r} is {shown(value)}, expected {within}")
    return found


def _tools(columns: Mapping[str, Any], where: str, accepted: str) -> list[Any] | None:
    """Tools as objects; data that keep them as text have JSON in it."""
    tools = columns.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools else None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: column 'tools' is {shown(tools)}, expected JSON; {accepted}") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"{where}: column 'tools' is {shown(tools)}, expected a list of objects; {accepted}")
    return tools


def _read_unpaired(row: object, where: str, accepted: str) -> list[Preference]:
    columns = _filled(row, where, accepted)
    if {"chosen", "rejected"} <= columns.keys():
        pair = read_pair(row, where, accepted)
        if pair.label not in (0.0, 1.0):
            raise DataError(f"{where}: column 'label' is {pair.label}, expected 0 or 1 where a pair is taken apart")
        return [
            pair._replace(format="pair", completions=(completion,), label=label, scores=None)
            for completion, label in zip(pair.completions, (pair.label, 1 - pair.label), strict=True)
        ]
    if "label" not in columns:
        raise DataError(f"{where}: found the columns {', '.join(map(repr, columns)) or 'none'}; {accepted}")
    (found,) = _read_completion(row, where, accepted)
    label = _number(columns, "label", where, 0, 1)
    if label not in (0.0, 1.0):
        raise DataError(f"{where}: column 'label' is {label}, expected true or false")
    return [found._replace(label=label)]


def _read_completion(row: object, where: str, accepted: str) -> list[Preference]:
    columns = _filled(row, where, accepted)
    completion: str | Messages
    if {"prompt", "completion"} <= columns.keys():
        read = string if isinstance(columns["prompt"], str) else messages
        prompt, completion = (read(columns, name, where, accepted) for name in ("prompt", "completion"))
        format: Format = "prompt-completion"
        name = "completion"
    elif "messages" in columns:
        chat = messages(columns, "messages", where, accepted)
        format, name, prompt, completion = "messages", "messages", chat[:-1], chat[-1:]
        if not prompt:
            raise DataError(f"{where}: column 'messages' has one turn, expected an answer after others")
    else:
        raise DataError(f"{where}: found the columns {', '.join(map(repr, columns)) or 'none'}; {accepted}")
    _require_answer(completion, name, where)
    return [Preference("", 0, format, prompt, (completion,), tools=_tools(columns, where, accepted))]


def _read_prompt(row: object, where: str, accepted: str) -> list[Preference]:
    columns = _filled(row, where, accepted)
    if "prompt" not in columns:
        raise DataError(f"{where}: found the columns {', '.join(map(repr, columns)) or 'none'}; {accepted}")
    read = string if isinstance(columns["prompt"], str) else messages
    prompt = read(columns, "prompt", where, accepted)
    return [Preference("", 0, "prompt", prompt, (), tools=_tools(columns, where, accepted))]


def _read_pairs(row: object, where: str, accepted: str) -> list[Preference]:
    return [read_pair(row, where, accepted)]


def _read_pair_or_prompt(row: object, where: str, accepted: str) -> list[Preference]:
    columns = _filled(row, where, accepted)
    if "prompt" in columns and not {"chosen", "rejected"} & columns.keys():
        return _read_prompt(row, where, accepted)
    return _read_pairs(row, where, accepted)


PAIR_COLUMNS = (
    "prompt", "chosen", "rejected", "label", "score_chosen", "score_rejected", "annotator", "similarity",
    "conversations", "system", "tools",
)  # fmt: skip
PAIRS = Layout(PAIR_COLUMNS, PAIRS_ACCEPTED, _read_pairs)
UNPAIRED = Layout((*PAIR_COLUMNS, "completion", "messages"), UNPAIRED_ACCEPTED, _read_unpaired)
COMPLETIONS = Layout(("prompt", "completion", "messages", "tools"), COMPLETIONS_ACCEPTED, _read_completion)
PROMPTS = Layout(("prompt", "tools"), PROMPTS_ACCEPTED, _read_prompt)
PAIRS_OR_PROMPTS = Layout(PAIR_COLUMNS, f"{PAIRS_ACCEPTED}; or `prompt` alone", _read_pair_or_prompt)
