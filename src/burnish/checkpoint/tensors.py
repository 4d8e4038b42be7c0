"""The safetensors file format: element types, headers and where each tensor lies. Knows no model."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Name in the file -> (bytes per element, name of the torch dtype).
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
}
FLOATING = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: its type and shape, and its absolute byte range `[start, end)` in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


def num_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of safetensors type `dtype` and `shape`."""
    return DTYPES[dtype][0] * math.prod(shape)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors type name: `"BF16"` -> `torch.bfloat16`."""
    import torch

    dtype = getattr(torch, DTYPES[name][1])
    assert isinstance(dtype, torch.dtype)
    return dtype


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a value is not zero; the first few decide almost always, and `any` over all is slow."""
    return bool(tensor.reshape(-1)[:4096].any() or tensor.any())


def dtype_name(dtype: str | torch.dtype) -> str:
    """The safetensors type name of a torch dtype or of its name: `"bfloat16"` -> `"BF16"`."""
    wanted = str(dtype).removeprefix("torch.")
    for name, (_, torch_name) in DTYPES.items():
        if torch_name == wanted:
            return name
    raise ValueError(f"dtype {wanted!r} has no safetensors name: choose one of {sorted(d for _, d in DTYPES.values())}")


def floating_name(dtype: str) -> str:
    """The safetensors type name of a `--dtype` value that weights can be written in.

    Raises:
        ValueError: no such type, or not a floating one.
    """
    stored = dtype_name(dtype)
    if stored not in FLOATING:
        raise ValueError(f"dtype={dtype!r}: choose auto, float32, bfloat16 or float16")
    return stored


def parse_size(text: str) -> int:
    """Bytes of a size with a unit: `5GB` is 5 * 10^9, `5GiB` is 5 * 2^30.

    Raises:
        ValueError: no unit, or not a positive number.

    Examples:
        >>> parse_size("5GB"), parse_size("1.5 MiB")
        (5000000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT])(i?)B\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"size {text!r}: write a positive number with a unit, such as 5GB or 5GiB")
    power = "kmgt".index(match[2].lower()) + 1
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """All tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is corrupt; names the file and the tensor.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (size,)
            if length + 8 > size or length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: truncated or not safetensors: {size} bytes hold no header")
            header: Any = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: corrupt safetensors header (expected a JSON object)")
    header.pop("__metadata__", None)
    tensors = [_tensor_info(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise CheckpointError(f"{file}: tensor {tensor.name} starts at byte {tensor.start}, expected {position}")
        position = tensor.end
        if position > size:
            raise CheckpointError(f"{file}: truncated: tensor {tensor.name} ends at byte {position} of {size}")
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes follow the last tensor: corrupt, or header mismatch")
    return {tensor.name: tensor for tensor in tensors}


def _tensor_info(file: Path, name: str, entry: Mapping[str, Any], offset: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: tensor {name}: corrupt header entry") from error
    if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise CheckpointError(f"{file}: tensor {name}: shape and data_offsets need whole numbers >= 0")
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name}: unknown type {dtype!r}, known are {', '.join(DTYPES)}")
    if last - first != num_bytes(dtype, shape):
        raise CheckpointError(
            f"{file}: tensor {name}: {last - first} bytes for {dtype} {list(shape)}, expected {num_bytes(dtype, shape)}"
        )
    return TensorInfo(name, dtype, shape, file, offset + first, offset + last)
