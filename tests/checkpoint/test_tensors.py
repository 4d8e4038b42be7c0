"""The safetensors format: headers against the `safetensors` library both ways, and every way a file can be broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from burnish.checkpoint import DTYPES, PlannedTensor, dtype_name, parse_size, plan_shards
from burnish.checkpoint.tensors import MAX_HEADER_BYTES, num_bytes, read_header, torch_dtype
from burnish.errors import CheckpointError

SHAPES = [(), (0,), (3,), (2, 0, 4), (2, 3), (2, 1, 5)]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def raw_file(directory: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header (JSON text, or something to be made JSON) and these bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(first: int, last: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(last - first) // 4] if shape is None else shape, "data_offsets": [first, last]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read_as_the_safetensors_library_wrote_it(dtype: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, shape in enumerate(SHAPES):
        size = num_bytes(dtype, shape)
        values = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=generator)
        tensors[f"t{number}"] = values.view(torch_dtype(dtype)).view(shape)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "note": "kept out of the tensors"})
    content = file.read_bytes()
    found = read_header(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(tensor.shape), tensor.nbytes)
        assert content[info.start : info.end] == bytes_of(tensor)
        assert (info.name, info.file) == (name, file)
    assert [info.start for info in found.values()] == sorted(info.start for info in found.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_written_so_that_the_safetensors_library_reads_it(dtype: str, tmp_path: Path) -> None:
    planned = [PlannedTensor(f"t{number}", dtype, shape) for number, shape in enumerate(SHAPES)]
    (shard,) = plan_shards(planned, 10**9)
    data = bytes(position % 2 for position in range(shard.nbytes))
    header = shard.header()
    assert len(header) % 8 == 0
    (tmp_path / "model.safetensors").write_bytes(header + data)
    read = load_file(tmp_path / "model.safetensors")
    position = 0
    for tensor in shard.tensors:
        assert (read[tensor.name].dtype, tuple(read[tensor.name].shape)) == (torch_dtype(dtype), tensor.shape)
        assert bytes_of(read[tensor.name]) == data[position : position + tensor.nbytes]
        position += tensor.nbytes


def test_written_header_names_the_framework_as_transformers_requires(tmp_path: Path) -> None:
    (shard,) = plan_shards([PlannedTensor("weight", "F32", (2,))], 10**9)
    file = tmp_path / "model.safetensors"
    file.write_bytes(shard.header() + bytes(8))
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}
    assert read_header(file)["weight"].start == len(shard.header())


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6))
def test_header_round_trip_of_any_names_types_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    (shard,) = plan_shards([PlannedTensor(name, *what) for name, what in tensors.items()], 10**9)
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(shard.header() + bytes(shard.nbytes))
    assert {name: (info.dtype, info.shape) for name, info in read_header(file).items()} == tensors
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items()} == {
        name: shape for name, (_, shape) in tensors.items()
    }


def test_a_file_cut_at_any_byte_is_refused_by_name(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"first": torch.ones(3), "second": torch.ones(2, 2)}, whole)
    content, cut = whole.read_bytes(), tmp_path / "cut.safetensors"
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: .*(truncated|header)"):
            read_header(cut)
    cut.write_bytes(content)
    assert len(read_header(cut)) == 2


def test_a_cut_in_the_data_names_the_tensor_and_both_sizes(tmp_path: Path) -> None:
    file = raw_file(tmp_path, {"a": entry(0, 8), "b": entry(8, 24)}, bytes(23))
    size = file.stat().st_size
    with pytest.raises(CheckpointError, match=rf"truncated: tensor b ends at byte {size + 1} of {size}"):
        read_header(file)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_header_length_that_is_too_long_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", length))
        stream.truncate(MAX_HEADER_BYTES + 64)  # sparse: only the limit can refuse the first case
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"",
        b"\xff\xfe\xfa",
        b'{"a": }',
        b"[" * 100_000,
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=["open", "empty", "not-utf8", "no-value", "deep", "list", "number", "null", "string", "huge-number"],
)
def test_a_header_that_is_no_json_object_is_one_error(header: bytes, tmp_path: Path) -> None:
    file = raw_file(tmp_path, header, bytes(64))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt safetensors header|tensor a: corrupt"):
        read_header(file)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"dtype": "F32", "shape": [2]}, "corrupt header entry"),
        ({"shape": [2], "data_offsets": [0, 8]}, "corrupt header entry"),
        ("text", "corrupt header entry"),
        (None, "corrupt header entry"),
        (entry(0, 8) | {"data_offsets": [0]}, "corrupt header entry"),
        (entry(0, 8) | {"data_offsets": [0, 4, 8]}, "corrupt header entry"),
        (entry(0, 8, shape=3), "corrupt header entry"),
        (entry(0, 8, shape=[2.0]), "whole numbers"),
        (entry(0, 8, shape=["2"]), "whole numbers"),
        (entry(0, 8, shape=[-1, -2]), "whole numbers"),
        (entry(0, 8) | {"data_offsets": [-8, 0]}, "whole numbers"),
        (entry(0, 8, dtype="F4"), "unknown type 'F4'"),
        (entry(0, 8, shape=[3]), r"8 bytes for F32 \[3\], expected 12"),
        (entry(0, 8, dtype="BF16", shape=[2]), r"8 bytes for BF16 \[2\], expected 4"),
        (entry(0, 8) | {"data_offsets": [8, 0]}, "-8 bytes"),
    ],
)
def test_a_bad_entry_names_file_and_tensor(bad: Any, reason: str, tmp_path: Path) -> None:
    file = raw_file(tmp_path, {"good": bad}, bytes(8))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor good: .*{reason}"):
        read_header(file)


@pytest.mark.parametrize(
    ("entries", "data", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b starts at byte"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "tensor b starts at byte"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "tensor b starts at byte"),
        ({"a": entry(4, 12)}, 12, "tensor a starts at byte"),
        ({"a": entry(0, 8)}, 9, "1 bytes follow the last tensor"),
        ({}, 3, "3 bytes follow the last tensor"),
    ],
    ids=["overlap", "same-place", "hole", "hole-at-start", "rest", "rest-of-nothing"],
)
def test_tensors_must_tile_the_file(entries: dict[str, Any], data: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_header(raw_file(tmp_path, entries, bytes(data)))


def test_a_missing_file_or_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read \(No such file"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_names_are_inverse(name: str) -> None:
    dtype = torch_dtype(name)
    assert dtype_name(dtype) == dtype_name(str(dtype)) == dtype_name(str(dtype).removeprefix("torch.")) == name
    assert num_bytes(name, (3, 5)) == torch.empty(3, 5, dtype=dtype).nbytes


def test_a_dtype_without_a_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"complex64.*bfloat16"):
        dtype_name(torch.complex64)


UNITS = {"B": None, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "kiB": 2**10, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip


@given(st.integers(1, 10**4), st.sampled_from([unit for unit, factor in UNITS.items() if factor]))
def test_u9_5_a_whole_size_is_number_times_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == parse_size(f" {number} {unit} ") == number * UNITS[unit]


@given(st.integers(1, 10**4), st.integers(1, 3), st.sampled_from(["MB", "GB", "MiB", "GiB", "TB"]))
def test_u9_5_a_decimal_size_is_exact_to_a_byte(number: int, digits: int, unit: str) -> None:
    text = f"{number // 10**digits}.{number % 10**digits:0{digits}d}"
    exact = number * UNITS[unit] / 10**digits
    assert abs(parse_size(f"{text}{unit}") - exact) <= 1


BAD_SIZES = ["", "5", "0GB", "0.0GB", "-5GB", "5 gb", "5g", "5G", "5B", "GB", "5.GB", ".5GB", "1e3GB", "nanGB", "5GBs",
             "5 GB 3", "5PB", "٥GB٥", "infGB", "5iB", "5GIB"]  # fmt: skip


@pytest.mark.parametrize("text", BAD_SIZES)
def test_u9_5_a_size_without_a_clear_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a positive number with a unit, such as 5GB or 5GiB") as error:
        parse_size(text)
    assert repr(text) in str(error.value)


@given(st.text(max_size=8))
def test_u9_5_any_text_is_a_positive_size_or_refused(text: str) -> None:
    try:
        assert parse_size(text) > 0
    except ValueError as error:
        assert "with a unit" in str(error)
