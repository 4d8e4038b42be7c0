"""Read documents from files, standard input or the Hub, tokenise them and pack the tokens into equal blocks."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import jinja2
import torch
import xxhash
from torch import Tensor

from burnish.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content = TypeVar("Content")

ROLES = ("system", "developer", "user", "assistant", "tool")
DOCUMENT_END = re.compile(r"^<\|endoftext\|>$", re.MULTILINE)


@dataclass(frozen=True)
class Layout(Generic[Content]):
    """What the rows of a data set hold.

    Attributes:
        columns: those that are read.
        accepted: closes the message about a row that is refused.
        read: a row, how a message names it and `accepted` -> its content; raises `DataError`.
        plain: text without columns is read too, and is what standard input holds; otherwise that holds JSON lines.
    """

    columns: tuple[str, ...]
    accepted: str
    read: Callable[[object, str, str], Content]
    plain: bool = False


class Row(NamedTuple, Generic[Content]):
    """One row: where it comes from (rows count from 1), and what was read."""

    source: str
    row: int
    content: Content


class Text(NamedTuple):
    """One document: where it comes from (rows count from 1), and a string or chat messages."""

    source: str
    row: int
    content: str | list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Documents packed into blocks of equal length.

    Attributes:
        input_ids: Tensor `[num_samples, max_length]`, int64.
        attention_mask: Tensor `[num_samples, max_length]`, bool; True for a token, False for padding.
        sources: documents used from each source.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sources: dict[str, int]

    @property
    def num_tokens(self) -> int:
        """Tokens, without padding."""
        return int(self.attention_mask.sum())

    @property
    def fingerprint(self) -> str:
        """Hash (XXH3, 128 bit, hexadecimal) of shape, ids and mask: equal for equal data only."""
        hashed = xxhash.xxh3_128(repr(tuple(self.input_ids.shape)).encode())
        hashed.update(self.input_ids.numpy().tobytes())
        hashed.update(self.attention_mask.numpy().tobytes())
        return hashed.hexdigest()


def bundled_text(name: Literal["calibration", "heldout"]) -> Path:
    """Path of a text that ships with burnish; the bundled model was trained on `calibration`, not on `heldout`."""
    return Path(str(resources.files("burnish.data"))) / "miniature" / f"{name}.txt"


def bundled_model() -> Path:
    """Directory of the small Mixture-of-Experts model that ships with burnish."""
    return Path(str(resources.files("burnish.data"))) / "miniature" / "model"


def load_texts(
    dataset: str | os.PathLike[str] | None, *, split: str = "train", seed: int | None = None
) -> Iterator[Text]:
    """The documents of a data set that are not blank.

    Args:
        dataset: a `.txt`, `.md`, `.json`, `.jsonl`, `.csv` or `.parquet` file, a directory of such files (read in the
            order of their names), `-` for plain text on standard input, a data set of the Hub as `name` or
            `name:config`, or None for the bundled calibration text. Rows hold `text` or `messages` (`text` is taken
            where both are there). In plain text a line `<|endoftext|>` ends a document.
        split: split of a Hub data set; files have none.
        seed: shuffle the documents with this seed; None keeps their order.

    Raises:
        DataError: nothing is there, or a row is not as described; names file, row and column.
    """
    name = bundled_text("calibration") if dataset is None else dataset
    empty = True
    for row in load_rows(name, TEXT, split=split, seed=seed):
        if not isinstance(row.content, str) or row.content.strip():
            empty = False
            yield Text(*row)
    if empty:
        raise DataError(f"{name}: no text in it")


def load_rows(
    dataset: str | os.PathLike[str], layout: Layout[Content], *, split: str = "train", seed: int | None = None
) -> Iterator[Row[Content]]:
    """The rows of a data set; all rows of files and of standard input are checked before the first is given.

    Args:
        dataset: as in `load_texts`.
        layout: what a row holds.
        split: split of a Hub data set; files have none.
        seed: shuffle the rows with this seed; None keeps their order.

    Raises:
        DataError: nothing is there, or a row is not as described; names file, row and column.
    """
    name = os.fspath(dataset)
    path = Path(name).expanduser()
    take: Callable[[int], Row[Content]]
    if name == "-":
        values = _documents(sys.stdin.read()) if layout.plain else _json_lines(sys.stdin, "stdin")
        rows = [Row("stdin", row, layout.read(value, f"stdin row {row}", layout.accepted)) for row, value in values]
        count, take = len(rows), rows.__getitem__
    elif path.exists():
        rows = list(_local(path, layout))
        count, take = len(rows), rows.__getitem__
    elif path.suffix in READERS or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"{name}: no such file or directory")
    else:
        count, take = _hub(name, split, layout)
    generator = torch.Generator().manual_seed(seed or 0)
    yield from map(take, range(count) if seed is None else torch.randperm(count, generator=generator).tolist())


def token_blocks(
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | os.PathLike[str] | None = None,
    *,
    num_samples: int = 512,
    max_length: int = 2048,
    seed: int = 0,
    split: str = "train",
    shuffle: bool = True,
) -> TokenBlocks:
    """Pack documents, with the tokenizer's end token between them, into `num_samples` blocks of `max_length` tokens.

    Reading stops as soon as there are enough tokens; what does not fill a block is dropped. A corpus too short for
    `num_samples` gives fewer blocks and a warning; one too short for a single block gives that block, padded.

    Args:
        tokenizer: its beginning-of-text token, if it adds one, opens each document; messages are rendered with its
            own chat template.
        dataset: as in `load_texts`; None for the bundled calibration text.
        num_samples: blocks asked for.
        max_length: tokens in a block.
        seed: order of the documents, when shuffled.
        split: split of a Hub data set.
        shuffle: False reads the documents in order.

    Raises:
        DataError: as `load_texts`; or messages that the tokenizer has no chat template for, or refuses.
        ValueError: a size that is too small, or a tokenizer without an end token.
    """
    if num_samples < 1 or max_length < 2:
        raise ValueError(f"num_samples={num_samples}, max_length={max_length}: choose at least 1 and 2")
    ids: list[int] = []
    sources: Counter[str] = Counter()
    for source, tokens in token_stream(tokenizer, dataset, split=split, seed=seed if shuffle else None):
        ids += tokens
        sources[source] += 1
        if len(ids) >= num_samples * max_length:
            break
    if len(ids) < 2:
        raise DataError(f"{dataset}: {len(ids)} tokens after tokenisation, expected at least 2")
    found = min(len(ids) // max_length, num_samples)
    if found < num_samples:
        warnings.warn(
            f"{'the bundled text' if dataset is None else dataset}: {len(ids)} tokens fill {found} of the {num_samples}"
            f" blocks of {max_length} asked for" + ("" if found else "; one padded block is used"),
            stacklevel=2,
        )
    shape = (max(found, 1), max_length)
    padding = shape[0] * max_length - len(ids)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    kept = torch.tensor(ids[: shape[0] * max_length] + [pad] * padding)
    mask = torch.arange(kept.numel()) < len(ids)
    return TokenBlocks(kept.view(shape), mask.view(shape), dict(sources))


def token_stream(
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | os.PathLike[str] | None,
    *,
    split: str = "train",
    seed: int | None = None,
) -> Iterator[tuple[str, list[int]]]:
    """Source and tokens of each document, in the order of `load_texts`; the end token opens all but the first.

    Raises:
        DataError: as `load_texts`; or messages that the tokenizer has no chat template for, or refuses.
        ValueError: a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to put between documents: set one")
    bos = opening(tokenizer)
    between: list[int] = []
    for text in load_texts(dataset, split=split, seed=seed):
        yield text.source, between + _encode(tokenizer, text, bos)
        between = [tokenizer.eos_token_id]


def _encode(tokenizer: PreTrainedTokenizerBase, text: Text, bos: list[int]) -> list[int]:
    content = text.content
    if not isinstance(content, str):
        # The template writes the special tokens itself.
        content, bos = rendered(tokenizer, content, f"{text.source} row {text.row}: column 'messages'"), []
    ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return bos + ids


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's beginning-of-text token, where it opens a text with one."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], where: str, **options: Any) -> str:
    """Messages as the tokenizer's own chat template writes them; options as for `apply_chat_template`.

    Raises:
        DataError: no template, or one that refuses these messages; opens with `where`.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"{where} needs a chat template, and the tokenizer has none: give plain text")
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except jinja2.TemplateError as error:
        raise DataError(f"{where} is refused by the tokenizer's chat template ({error})") from error
    return text


def _local(path: Path, layout: Layout[Content]) -> Iterator[Row[Content]]:
    suffixes = [suffix for suffix in READERS if layout.plain or suffix not in PLAIN]
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes) if path.is_dir() else [path]
    if not files or files[0].suffix not in suffixes:
        raise DataError(f"{path}: expected a file {', '.join(suffixes)}, or a directory of such files")
    for file in files:
        source = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            for row, value in READERS[file.suffix](file, layout.columns):
                yield Row(source, row, layout.read(value, f"{file} row {row}", layout.accepted))
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{file}: cannot be read as {file.suffix} ({reason}); {layout.accepted}") from error


def _content(row: object, where: str, accepted: str) -> str | list[dict[str, Any]]:
    columns = columns_of(row, where, accepted)
    if "text" in columns:
        return string(columns, "text", where, accepted)
    if "messages" not in columns:
        raise DataError(f"{where}: found the columns {', '.join(map(repr, columns)) or 'none'}; {accepted}")
    return messages(columns, "messages", where, accepted)


TEXT = Layout(
    ("text", "messages"),
    "accepted: a column `text` (a string) or `messages` ([{role, content}])",
    _content,
    plain=True,
)


def columns_of(row: object, where: str, accepted: str) -> Mapping[str, Any]:
    """A row that is an object."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: found {shown(row)}, expected an object; {accepted}")
    return row


def string(columns: Mapping[str, Any], name: str, where: str, accepted: str) -> str:
    """A column that holds a string."""
    value = columns[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: column {name!r} is {shown(value)}, expected a string; {accepted}")
    return value


def messages(columns: Mapping[str, Any], name: str, where: str, accepted: str) -> list[dict[str, Any]]:
    """A column that holds chat messages."""
    value = columns[name]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: column {name!r} is {shown(value)}, expected a list; {accepted}")
    for item, message in enumerate(value, start=1):
        good = isinstance(message, Mapping) and message.get("role") in ROLES
        if not good or not (isinstance(message.get("content"), str) or message.get("tool_calls")):
            expected = f"a role of {', '.join(ROLES)} and a content that is a string"
            raise DataError(f"{where}: column {name!r} item {item} is {shown(message)}, expected {expected}")
    return value


def shown(value: object) -> str:
    """Type and beginning of a value, for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _documents(text: str) -> Iterator[tuple[int, object]]:
    for row, document in enumerate(DOCUMENT_END.split(text), start=1):
        yield row, {"text": document.strip("\n")}


def _plain_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, object]]:
    yield from _documents(file.read_text(encoding="utf-8-sig"))


def _json_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, object]]:
    rows = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("expected an array of objects; one object a line belongs into a .jsonl file")
    yield from enumerate(rows, start=1)


def _jsonl_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, object]]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from _json_lines(lines, str(file))


def _json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[int, object]]:
    for row, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield row, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{name} row {row}: not JSON at column {error.colno} ({error.msg})") from error


def _csv_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, object]]:
    import pyarrow
    from pyarrow import csv

    # A document may span lines and be longer than pyarrow's default block; one thread so that errors know their row.
    table = csv.read_csv(
        file,
        read_options=csv.ReadOptions(use_threads=False, block_size=max(file.stat().st_size, 1)),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, pyarrow.string())),
    )
    yield from enumerate(table.to_pylist(), start=1)


def _parquet_rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, object]]:
    from pyarrow import parquet

    names = parquet.read_schema(file).names
    known = [name for name in columns if name in names] or names
    yield from enumerate(parquet.read_table(file, columns=known).to_pylist(), start=1)


READERS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[tuple[int, object]]]] = {
    ".txt": _plain_rows,
    ".md": _plain_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
PLAIN = (".txt", ".md")


def _hub(name: str, split: str, layout: Layout[Content]) -> tuple[int, Callable[[int], Row[Content]]]:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request to a counting server even for cached files
    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{name}: no such file, and split {split!r} of a data set of this name cannot be loaded ({reason});"
            f" fetch it where there is a network: hf download --repo-type dataset {repository}"
        ) from error
    return len(rows), lambda i: Row(name, i + 1, layout.read(rows[i], f"{name} row {i + 1}", layout.accepted))
