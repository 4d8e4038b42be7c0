"""Supervised fine-tuning: read prompts with their answers, and encode them so that only the answers are learned."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from burnish.data.text import Layout, columns_of, load_rows, messages, opening, rendered, shown, string
from burnish.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["messages", "prompt-completion", "alpaca", "sharegpt"]
Messages = list[dict[str, Any]]

IGNORED = -100
"""The label of a token that is not learned."""

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in a sharegpt row -> the role in a chat."""

ACCEPTED = (
    "accepted: `messages` ([{role, content}]); `prompt` and `completion` (both strings, or both messages); alpaca"
    " `instruction`, `input`, `output`; sharegpt `conversations` ([{from, value}])"
)


class Example(NamedTuple):
    """One row: what is given and what is learned.

    Attributes:
        source: file or data set.
        row: counted from 1.
        format: of the row; alpaca and sharegpt were converted to messages.
        prompt: a string, or messages; may be empty.
        completion: of the same kind; of messages the assistant's turns are learned.
        tools: for the chat template, or None.
    """

    source: str
    row: int
    format: Format
    prompt: str | Messages
    completion: str | Messages
    tools: list[Any] | None


class Encoded(NamedTuple):
    """One example in tokens.

    Attributes:
        input_ids: Tensor `[length]`, int64.
        labels: Tensor `[length]`, int64: the token itself where it is learned, else IGNORED.
        cut: what did not fit.
    """

    input_ids: Tensor
    labels: Tensor
    cut: Literal["nothing", "prompt", "completion"]


@dataclass
class Counts:
    """What was read; printed as one line.

    Attributes:
        sources: rows of each source.
        formats: rows of each format.
        cut: rows by what did not fit: "nothing", "prompt" or "completion".
        tokens: all that are kept.
        learned: those with a label.
    """

    sources: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    learned: int = 0

    def add(self, example: Example, encoded: Encoded) -> None:
        """Count one row."""
        self.sources[example.source] += 1
        self.formats[example.format] += 1
        self.cut[encoded.cut] += 1
        self.tokens += len(encoded.labels)
        self.learned += int((encoded.labels != IGNORED).sum())

    def __str__(self) -> str:
        formats = ", ".join(
            f"{count} {name}" + (" (converted to messages)" if name in ("alpaca", "sharegpt") else "")
            for name, count in self.formats.items()
        )
        cuts = "".join(f", {self.cut[part]} {part}s cut" for part in ("prompt", "completion") if self.cut[part])
        return f"{self.sources.total()} rows: {formats}; {self.tokens} tokens, {self.learned} learned{cuts}"


def load_examples(
    dataset: str | os.PathLike[str], *, split: str = "train", seed: int | None = None
) -> Iterator[Example]:
    """The examples of a data set.

    Args:
        dataset: a `.json`, `.jsonl`, `.csv` or `.parquet` file, a directory of such files (read in the order of their
            names), `-` for JSON lines on standard input, or a data set of the Hub as `name` or `name:config`. A row
            holds `messages`, or `prompt` and `completion`, or `conversations`, or `instruction` and `output`; the first
            of these that is there is taken.
        split: split of a Hub data set; files have none.
        seed: shuffle the rows with this seed; None keeps their order.

    Raises:
        DataError: nothing is there, or a row is not as described; names file, row and column.
    """
    empty = True
    for row in load_rows(dataset, LAYOUT, split=split, seed=seed):
        empty = False
        yield Example(row.source, row.row, *row.content)
    if empty:
        raise DataError(f"{dataset}: no rows in it; {ACCEPTED}")


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Encoded:
    """Tokens of an example, and which of them are learned.

    Two strings are joined as they are, opened by the tokenizer's beginning-of-text token if it adds one, and closed by
    its end token, which is learned. A chat is written by the tokenizer's own template; what the template adds for a
    turn of the assistant, after the opening that it writes for generation, is learned, with the mark that ends the
    turn (the end token, where the template writes no special token). A token that holds both is learned.

    A row that is too long loses the beginning of its prompt, but not the beginning-of-text token; a completion that
    is too long alone loses its end.

    Args:
        tokenizer: a fast one, which knows where its tokens lie in the text.
        example: the row.
        max_length: tokens kept, at least 2.

    Raises:
        DataError: the template is missing, refuses the messages, or does not write a chat turn after turn; names the
            row.
        ValueError: a tokenizer without an end token or that is not fast; `max_length` is too small.

    Source: cutting from the left and keeping the first token, MeZO, arXiv 2305.17333 (its code); learned turns as
        differences of the template's output, ours.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to end a completion with: set one")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: load it with use_fast=True")
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: choose at least 2")
    chat = isinstance(example.prompt, list)
    text, spans = _chat(tokenizer, example) if chat else _strings(example)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(found["input_ids"])
    learned = [any(start < last and first < end for start, end in spans) for first, last in found["offset_mapping"]]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ended = chat and any(
        token in special and last > spans[-1][0] for token, (_, last) in zip(ids, found["offset_mapping"], strict=True)
    )
    if not ended:
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    if not chat:
        bos = opening(tokenizer)
        ids, learned = bos + ids, [False] * len(bos) + learned
    return _fitted(ids, learned, max_length, keep=int(ids[0] == tokenizer.bos_token_id))


def _strings(example: Example) -> tuple[str, list[tuple[int, int]]]:
    assert isinstance(example.prompt, str) and isinstance(example.completion, str)
    text = example.prompt + example.completion
    return text, [(len(example.prompt), len(text))]


def _chat(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, list[tuple[int, int]]]:
    """The whole chat, and where the learned turns lie in it."""
    assert isinstance(example.prompt, list) and isinstance(example.completion, list)
    turns = example.prompt + example.completion
    where = f"{example.source} row {example.row}: the chat"
    options = {} if example.tools is None else {"tools": example.tools}
    text = rendered(tokenizer, turns, where, **options)
    spans = []
    for item in range(len(example.prompt), len(turns)):
        if turns[item]["role"] != "assistant":
            continue
        before = rendered(tokenizer, turns[:item], where, add_generation_prompt=True, **options)
        after = rendered(tokenizer, turns[: item + 1], where, **options)
        if not after.startswith(before) or not text.startswith(after):
            raise DataError(
                f"{where} up to message {item + 1} is not how the tokenizer's chat template writes the whole begin, so"
                " that the assistant's turns cannot be told apart: give `prompt` and `completion` of one turn"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _fitted(ids: list[int], learned: list[bool], max_length: int, *, keep: int) -> Encoded:
    """At most `max_length` tokens; `keep` of the first stay."""
    cut: Literal["nothing", "prompt", "completion"] = "nothing"
    if (surplus := len(ids) - max_length) > 0:
        prompt = max(learned.index(True) - keep, 0)
        cut = "prompt" if surplus <= prompt else "completion"
        dropped = slice(keep, keep + min(surplus, prompt))
        del ids[dropped], learned[dropped]
        del ids[max_length:], learned[max_length:]
    tokens = torch.tensor(ids, dtype=torch.int64)
    return Encoded(tokens, tokens.where(torch.tensor(learned), IGNORED), cut)


Content = tuple[Format, str | Messages, str | Messages, list[Any] | None]


def _read(row: object, where: str, accepted: str) -> Content:
    # A table has every column in every row: those that a row does not use are null.
    columns = {name: value for name, value in columns_of(row, where, accepted).items() if value is not None}
    tools = columns.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"{where}: column 'tools' is {shown(tools)}, expected a list of objects; {accepted}")
    if "messages" in columns:
        return _split("messages", messages(columns, "messages", where, accepted), "messages", where, tools)
    if "prompt" in columns and "completion" in columns:
        return _pair(columns, where, accepted, tools)
    if "conversations" in columns:
        chat = system_turn(columns, where, accepted) + sharegpt_turns(columns["conversations"], where, accepted)
        return _split("sharegpt", chat, "conversations", where, tools)
    if "instruction" in columns and "output" in columns:
        return "alpaca", *_alpaca(columns, where, accepted), tools
    raise DataError(f"{where}: found the columns {', '.join(map(repr, columns)) or 'none'}; {accepted}")


def _split(format: Format, chat: Messages, column: str, where: str, tools: list[Any] | None) -> Content:
    """A chat at the assistant's first turn."""
    roles = [message["role"] for message in chat]
    first = roles.index("assistant") if "assistant" in roles else 0
    if first == 0:
        expected = "a turn of the assistant after another's"
        raise DataError(f"{where}: column {column!r} has the roles {', '.join(roles)}, expected {expected}")
    return format, chat[:first], chat[first:], tools


def _pair(columns: Mapping[str, Any], where: str, accepted: str, tools: list[Any] | None) -> Content:
    if isinstance(columns["prompt"], str):
        prompt, completion = (string(columns, name, where, accepted) for name in ("prompt", "completion"))
        return "prompt-completion", prompt, completion, tools
    chat, answer = (messages(columns, name, where, accepted) for name in ("prompt", "completion"))
    if all(message["role"] != "assistant" for message in answer):
        raise DataError(f"{where}: column 'completion' is {shown(answer)}, expected a turn of the assistant")
    return "prompt-completion", chat, answer, tools


def _alpaca(columns: Mapping[str, Any], where: str, accepted: str) -> tuple[Messages, Messages]:
    instruction, output = (string(columns, name, where, accepted) for name in ("instruction", "output"))
    extra = string(columns, "input", where, accepted) if "input" in columns else ""
    chat = system_turn(columns, where, accepted)
    history = columns.get("history", [])
    if not isinstance(history, list) or not all(map(_is_exchange, history)):
        raise DataError(f"{where}: column 'history' is {shown(history)}, expected a list of [question, answer]")
    for question, answer in history:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chat.append({"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction})
    return chat, [{"role": "assistant", "content": output}]


def _is_exchange(turn: object) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def sharegpt_turns(turns: object, where: str, accepted: str) -> Messages:
    """The turns of a sharegpt row as messages."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: column 'conversations' is {shown(turns)}, expected a list; {accepted}")
    chat = []
    for item, turn in enumerate(turns, start=1):
        good = isinstance(turn, Mapping) and turn.get("from") in SPEAKERS and isinstance(turn.get("value"), str)
        if not good:
            expected = f"a from of {', '.join(SPEAKERS)} and a value that is a string"
            raise DataError(f"{where}: column 'conversations' item {item} is {shown(turn)}, expected {expected}")
        chat.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return chat


def system_turn(columns: Mapping[str, Any], where: str, accepted: str) -> Messages:
    """The system message that an alpaca or sharegpt row may have in a column of its own."""
    text = string(columns, "system", where, accepted) if "system" in columns else ""
    return [{"role": "system", "content": text}] if text else []


LAYOUT = Layout(
    (
        "messages",
        "prompt",
        "completion",
        "conversations",
        "instruction",
        "input",
        "output",
        "system",
        "history",
        "tools",
    ),
    ACCEPTED,
    _read,
)
