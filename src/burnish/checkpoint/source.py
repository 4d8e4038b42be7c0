"""Read a Hugging Face checkpoint: a local directory or a hub name, single or sharded safetensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from burnish.checkpoint.tensors import FLOATING, TensorInfo, num_bytes, read_header, torch_dtype
from burnish.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".tflite")
WEIGHT_INDEXES = (INDEX_FILE, "pytorch_model.bin.index.json", "tf_model.h5.index.json", "flax_model.msgpack.index.json")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*"]
HUB_IGNORED = ["*/*.safetensors"]  # second copies in other formats, such as original/ beside GPT-OSS
COPY_BYTES = 8 * 2**20
EXPECT_BYTES = 32 * 2**20


@dataclass
class Checkpoint:
    """A checkpoint whose headers have been read and checked, and whose tensors are read one at a time.

    Attributes:
        name: what the user typed: a directory or a hub name.
        path: the local directory.
        config: parsed `config.json`.
        tensors: every stored tensor by name.
        bytes_read: tensor bytes read through this object so far.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    bytes_read: int = field(default=0, compare=False)

    @classmethod
    def open(cls, name_or_path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
        """Open a directory, or a hub name through `huggingface_hub`'s cache and offline rules.

        Raises:
            CheckpointError: no such directory or hub name, no config, a missing, truncated or corrupt file, or an
                index that disagrees with the files.
        """
        name = os.fspath(name_or_path)
        path = _resolve(name, revision)
        try:
            return cls(name=name, path=path, config=read_config(path), tensors=_read_tensors(path))
        except CheckpointError as error:
            if Path(name).expanduser().is_dir():
                raise
            raise CheckpointError(f"{error}; {_how_to_fetch(name, revision)}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, from the headers; a tied matrix counts once, packed weights as packed."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of one tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name} is missing") from None

    def read(self, name: str, index: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or a slice of it; only the bytes of the slice are read from the file.

        Args:
            name: tensor name.
            index: position in the first dimension, which is dropped: `[E, a, b]` -> `[a, b]`.
            rows: a contiguous range of the (remaining) first dimension.

        Raises:
            CheckpointError: no such tensor or slice, a short read, or a NaN or infinite value; names both.
        """
        import torch

        info = self.info(name)
        shape, start = list(info.shape), info.start
        if index is not None:
            if not 0 <= index < shape[0]:
                raise CheckpointError(f"{info.file}: tensor {name} has {shape[0]} slices: there is no slice {index}")
            start += index * num_bytes(info.dtype, shape[1:])
            shape = shape[1:]
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            start += first * num_bytes(info.dtype, shape[1:])
            shape[0] = last - first
        buffer = torch.empty(num_bytes(info.dtype, shape), dtype=torch.uint8)
        with info.file.open("rb", buffering=0) as file:
            file.seek(start)
            self._read_into(file, buffer.numpy().data, info)
        tensor = buffer.view(torch_dtype(info.dtype)).view(shape)
        require_finite(tensor, info)
        return tensor

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor in pieces of at most 8 MiB; each piece is valid until the next is asked for.

        Raises:
            CheckpointError: as `read`.
        """
        import torch

        info = self.info(name)
        buffer = torch.empty(min(COPY_BYTES, info.nbytes), dtype=torch.uint8)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            for position in range(0, info.nbytes, COPY_BYTES):
                piece = buffer[: min(COPY_BYTES, info.nbytes - position)]
                view = piece.numpy().data
                self._read_into(file, view, info)
                require_finite(piece.view(torch_dtype(info.dtype)), info)
                yield view

    def expect(self, names: Iterable[str]) -> None:
        """Tell the system that these tensors will be read soon, so that it fetches them while others are worked on."""
        if not hasattr(os, "posix_fadvise"):
            return
        for info in map(self.info, names):
            with info.file.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), info.start, min(info.nbytes, EXPECT_BYTES), os.POSIX_FADV_WILLNEED)

    def _read_into(self, file: Any, view: memoryview, info: TensorInfo) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{info.file}: truncated while reading tensor {info.name}")
            done += count
        self.bytes_read += done

    def other_files(self) -> list[Path]:
        """Everything beside the weights, relative to the directory: config, tokenizer, templates, code, licences."""
        return [file for file in self._files() if not _is_left(file)]

    def left_files(self) -> list[str]:
        """Files that no output takes over: hidden ones, and weights in formats that are not read."""
        read = {tensor.file.name for tensor in self.tensors.values()} | {INDEX_FILE}
        return [str(file) for file in self._files() if _is_left(file) and str(file) not in read]

    def _files(self) -> list[Path]:
        return [file.relative_to(self.path) for file in sorted(self.path.rglob("*")) if file.is_file()]

    def fingerprint(self) -> dict[str, str]:
        """Per file: size, modification time and, for weights, a hash of all headers' entries; no weight is read."""
        marks = {}
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            stat = file.stat()
            entries = [(t.name, t.dtype, t.shape, t.start) for t in self.tensors.values() if t.file == file]
            header = xxhash.xxh3_64_hexdigest(repr(sorted(entries)).encode())
            marks[file.name] = f"{stat.st_size} bytes, modified {stat.st_mtime_ns}, header {header}"
        for relative in self.other_files():
            marks[str(relative)] = xxhash.xxh3_128_hexdigest((self.path / relative).read_bytes())
        return marks


def _is_left(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return hidden or file.name.endswith(WEIGHT_SUFFIXES) or file.name in WEIGHT_INDEXES


def require_finite(tensor: torch.Tensor, info: TensorInfo) -> None:
    """Refuse a NaN or infinite value. `aminmax` propagates NaN and is one fast pass, unlike `isfinite().all()`."""
    import torch

    if info.dtype not in FLOATING or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise CheckpointError(f"{info.file}: tensor {info.name} has NaN or infinite values: refused")


def read_config(path: Path) -> dict[str, Any]:
    """Parsed `config.json` of a checkpoint directory."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}): not a Hugging Face checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return config


def _resolve(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)
        )
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such directory, and not a hub name ({error})") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: no such directory, and config.json is not in the local hub cache"
            f" ({type(error).__name__}); {_how_to_fetch(name, revision)}"
        ) from error


def _how_to_fetch(name: str, revision: str | None) -> str:
    chosen = f" --revision {revision}" if revision else ""
    return f"fetch it where there is a network: hf download {name}{chosen}"


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX_FILE
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if path / "model.safetensors" in files:
            return read_header(path / "model.safetensors")
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise CheckpointError(f"{path}: expected model.safetensors or {INDEX_FILE}; safetensors found: {found}")
        return read_header(files[0])
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: no valid weight_map") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: no valid weight_map: expected tensor names with their files")
    tensors: dict[str, TensorInfo] = {}
    for file_name in sorted(set(weight_map.values())):
        if not (path / file_name).exists():
            example = next(name for name, file in weight_map.items() if file == file_name)
            raise CheckpointError(f"{index}: tensor {example} is said to be in {file_name}, which does not exist")
        for name, info in read_header(path / file_name).items():
            if weight_map.get(name) != file_name:
                said = weight_map.get(name, "nowhere")
                raise CheckpointError(f"{info.file}: tensor {name} lies here, but {INDEX_FILE} has it in {said}")
            tensors[name] = info
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{path / file_name}: tensor {name} is missing, though {INDEX_FILE} has it here")
    return tensors
