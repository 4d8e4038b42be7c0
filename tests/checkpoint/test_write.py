"""Writing shards: exact bytes, resumable, verified, and nothing visible or lost when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.checkpoint import (
    Checkpoint,
    PlannedTensor,
    Shard,
    Staging,
    copy_other_files,
    plan_shards,
    verify_output,
    write_shards,
)
from burnish.checkpoint.source import INDEX_FILE
from burnish.checkpoint.write import SPARE_BYTES, require_disk_space
from burnish.errors import CheckpointError, OutputError

Compute = Callable[[PlannedTensor], Tensor]


def source_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(9, 5, generator=generator),
        "half": torch.randn(6, generator=generator).bfloat16(),
        "nothing": torch.zeros(0, 3),
        "scale": torch.tensor(2.0),
        "ids": torch.arange(7),
    }


def computed(planned: PlannedTensor) -> Tensor:
    return torch.arange(12.0).view(3, 4) + len(planned.name)


class Work(NamedTuple):
    """A source of five tensors that are copied (one under a new name), and a plan with two computed ones."""

    source: Checkpoint
    shards: tuple[Shard, ...]
    out: Path

    def staging(self, **options: bool) -> Staging:
        return Staging(self.out, {"run": 1}, **options)

    def write(self, compute: Compute = computed) -> int:
        return write_shards(self.source, self.shards, compute, self.staging())


@pytest.fixture
def work(tmp_path: Path) -> Work:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "any"}')
    save_file(source_tensors(), directory / "model.safetensors")
    source = Checkpoint.open(directory)
    planned = [PlannedTensor(f"new.{name}", t.dtype, t.shape, copy_of=name) for name, t in source.tensors.items()]
    planned += [PlannedTensor(f"layers.{layer}.w", "F32", (3, 4)) for layer in (2, 10)]
    return Work(source, plan_shards(planned, 150), tmp_path / "out")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def publish(work: Work) -> dict[str, bytes]:
    """Finish an output and give its files."""
    staging = work.staging()
    copy_other_files(work.source, staging, ())
    verify_output(staging.files, work.shards)
    staging.publish()
    return tree(work.out)


def test_written_tensors_are_the_copies_and_the_computed_ones(work: Work) -> None:
    assert len(work.shards) == 3
    assert work.write() == sum(shard.nbytes for shard in work.shards)
    publish(work)
    loaded = {name: t for file in work.out.glob("*.safetensors") for name, t in load_file(file).items()}
    expected = {f"new.{name}": tensor for name, tensor in source_tensors().items()}
    expected |= {f"layers.{i}.w": computed(PlannedTensor(f"layers.{i}.w", "F32", (3, 4))) for i in (2, 10)}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name], tensor)
    index = json.loads((work.out / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert set(index["weight_map"].values()) == {file.name for file in work.out.glob("*.safetensors")}


def test_copies_are_byte_identical_even_where_torch_would_not_keep_them(tmp_path: Path) -> None:
    """Negative zeros, subnormal numbers and bytes of a type that is never decoded."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    tensors = {"f": torch.tensor([-0.0, 1e-45, 3.0]), "eight": torch.arange(256).to(torch.uint8)}
    tensors["eight"] = tensors["eight"].view(torch.float8_e4m3fn)  # with its NaN codes
    save_file(tensors, directory / "model.safetensors")
    source = Checkpoint.open(directory)
    shards = plan_shards([PlannedTensor(n, t.dtype, t.shape, copy_of=n) for n, t in source.tensors.items()], 10**9)
    staging = Staging(tmp_path / "out", {})
    write_shards(source, shards, computed, staging)
    written = load_file(staging.files / "model.safetensors")
    for name, tensor in tensors.items():
        assert written[name].view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
    assert not (staging.files / INDEX_FILE).exists()  # one file needs no index


def test_progress_adds_up_to_all_bytes_whether_written_or_kept(work: Work) -> None:
    total = sum(shard.nbytes for shard in work.shards)
    for expected in (total, 0):
        seen: list[int] = []
        assert write_shards(work.source, work.shards, computed, work.staging(), advance=seen.append) == expected
        assert sum(seen) == total


def test_nothing_is_visible_before_publish(work: Work) -> None:
    work.write()
    assert not work.out.exists()
    publish(work)
    assert work.out.exists()


def test_u2_1_finished_shards_are_kept_and_the_rest_is_written(work: Work) -> None:
    reference = None
    for stop in range(3):
        calls: list[str] = []
        shutil.rmtree(work.out, ignore_errors=True)
        staging = work.staging()
        computed_shards = [i for i, s in enumerate(work.shards) if any(t.copy_of is None for t in s.tensors)]
        assert computed_shards == [0]
        write_shards(work.source, work.shards[:stop], computed, staging)

        def counting(planned: PlannedTensor, calls: list[str] = calls) -> Tensor:
            calls.append(planned.name)
            return computed(planned)

        written = write_shards(work.source, work.shards, counting, work.staging())
        assert written == sum(shard.nbytes for shard in work.shards[stop:])
        assert calls == ([] if stop else ["layers.2.w", "layers.10.w"])
        result = publish(work)
        reference = reference or result
        assert result == reference


@pytest.mark.parametrize("damage", [b"\x01", None])
def test_u2_1_a_finished_shard_that_was_damaged_on_disk_is_redone(damage: bytes | None, work: Work) -> None:
    work.write()
    shard = work.shards[1]
    file = work.staging().files / shard.file
    before = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert work.write() == shard.nbytes
    assert file.read_bytes() == before


def nan_in(tensor: Tensor) -> Tensor:
    tensor[1, 2] = torch.nan
    return tensor


def infinite_in(tensor: Tensor) -> Tensor:
    tensor[2, 3] = -torch.inf
    return tensor


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tensor: tensor.mT, r"F32 \[4, 3\], planned F32 \[3, 4\]"),
        (lambda tensor: tensor[:2], r"F32 \[2, 4\], planned F32 \[3, 4\]"),
        (lambda tensor: tensor[:, :0], r"F32 \[3, 0\], planned"),
        (lambda tensor: tensor.double(), r"F64 \[3, 4\], planned F32"),
        (lambda tensor: tensor.bfloat16(), r"BF16 \[3, 4\], planned F32"),
        (nan_in, "NaN or infinite"),
        (infinite_in, "NaN or infinite"),
    ],
    ids=["transposed", "cut", "emptied", "wider-type", "narrower-type", "nan", "infinite"],
)
def test_u4_1_a_computed_tensor_that_is_not_as_planned_fails_the_write(
    spoil: Callable[[Tensor], Tensor], reason: str, work: Work
) -> None:
    def compute(planned: PlannedTensor) -> Tensor:
        tensor = computed(planned)
        return spoil(tensor) if planned.name == "layers.10.w" else tensor

    with pytest.raises((OutputError, CheckpointError), match=rf"tensor layers\.10\.w.*{reason}"):
        work.write(compute)
    assert not work.out.exists()
    assert work.staging().finished() == {}
    work.write()  # and the sound computation goes through in the same place
    assert len(publish(work)) == len(work.shards) + 2


def test_u4_1_a_source_that_no_longer_has_the_planned_form_fails_the_write(work: Work) -> None:
    source = Checkpoint.open(work.source.path)
    wrong = plan_shards([PlannedTensor("new.embed", "F32", (5, 9), copy_of="embed")], 10**9)
    with pytest.raises(OutputError, match=r"tensor new\.embed: F32 \[9, 5\], planned F32 \[5, 9\]"):
        write_shards(source, wrong, computed, work.staging())
    gone = plan_shards([PlannedTensor("new", "F32", (5, 9), copy_of="gone")], 10**9)
    with pytest.raises(CheckpointError, match="tensor gone is missing"):
        write_shards(source, gone, computed, Staging(work.out.with_name("other"), {}))


def test_a_tensor_that_is_not_contiguous_is_written_by_its_values(work: Work) -> None:
    work.write(lambda planned: computed(planned).mT.contiguous().mT)
    first = publish(work)
    shutil.rmtree(work.out)
    work.write()
    assert publish(work) == first


def rewrite(file: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["layers.2.w"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["extra"] = torch.ones(1)


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors["layers.2.w"] = tensors["layers.2.w"].mT.contiguous()


def retype(tensors: dict[str, Tensor]) -> None:
    tensors["layers.2.w"] = tensors["layers.2.w"].double()


@pytest.mark.parametrize("edit", [drop, add, transpose, retype])
@pytest.mark.parametrize("max_shard_bytes", [150, 10**9])
def test_u4_1_verification_finds_what_was_written_wrongly(
    edit: Callable[[dict[str, Tensor]], None], max_shard_bytes: int, work: Work
) -> None:
    planned = [tensor for shard in work.shards for tensor in shard.tensors]
    shards = plan_shards(planned, max_shard_bytes)
    staging = work.staging()
    write_shards(work.source, shards, computed, staging)
    shutil.copy(work.source.path / "config.json", staging.files)
    verify_output(staging.files, shards)
    rewrite(staging.files / shards[0].file, edit)
    with pytest.raises((OutputError, CheckpointError), match=r"layers\.2\.w|extra"):
        verify_output(staging.files, shards)


def test_u4_1_verification_finds_a_broken_index_a_lost_shard_and_a_swapped_file(work: Work) -> None:
    work.write()
    files = work.staging().files
    shutil.copy(work.source.path / "config.json", files)
    verify_output(files, work.shards)
    index = (files / INDEX_FILE).read_text()
    (files / INDEX_FILE).write_text(index.replace('"layers.2.w"', '"layers.3.w"'))
    with pytest.raises(CheckpointError, match=r"layers\.[23]\.w"):
        verify_output(files, work.shards)
    (files / INDEX_FILE).write_text(index)
    other = plan_shards([tensor for shard in work.shards for tensor in shard.tensors], 200)
    with pytest.raises(OutputError, match=r"tensor .* is in model-.*, planned in model-"):
        verify_output(files, other)
    (files / work.shards[2].file).unlink()
    with pytest.raises(CheckpointError, match=f"{work.shards[2].file}, which does not exist"):
        verify_output(files, work.shards)


def test_u9_2_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(shard.nbytes for shard in work.shards)
    usage = shutil.disk_usage(work.source.path)
    asked: list[Path] = []

    def limited(free: int) -> None:
        def disk_usage(path: Path) -> object:
            asked.append(path)
            return usage._replace(free=free)

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)

    limited(needed + SPARE_BYTES - 1)
    with pytest.raises(OutputError, match=r"out: needs 0\.00 GB of disk, 0\.07 GB are free"):
        work.write()
    assert work.source.bytes_read == 0
    assert tree(work.staging().files) == {}
    limited(needed + SPARE_BYTES)
    work.write()
    limited(SPARE_BYTES)
    assert work.write() == 0  # finished shards need no room
    require_disk_space(work.out / "deep" / "er", 0)
    assert asked[-1] == work.out.parent


@pytest.mark.parametrize("room", [0, 1, 150, 400, 500])
def test_a_disk_that_fills_up_is_one_line_and_the_next_run_finishes_with_the_same_bytes(
    room: int, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    work.write()
    expected = publish(work)
    shutil.rmtree(work.out)
    before = tree(work.source.path)
    real, left = os.write, room

    def write(descriptor: int, piece: memoryview) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(descriptor, piece[:left])  # a full disk takes a part of the piece first
        left -= count
        return count

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OutputError) as error:
        work.write()
    monkeypatch.undo()
    message = str(error.value)
    assert "\n" not in message
    assert f"{work.out}: cannot write model-0000" in message and "the disk is full" in message
    assert "make room and run the same command again" in message
    finished = work.staging().finished()
    assert f"{len(finished)} finished shards are kept in {work.staging().path}" in message
    assert len(finished) == sum(room >= size for size in done_after(work))
    assert not work.out.exists()
    assert tree(work.source.path) == before
    assert work.write() == sum(shard.nbytes for shard in work.shards if shard.file not in finished)
    assert publish(work) == expected


def done_after(work: Work) -> list[int]:
    """Bytes on disk when each shard is complete, header included."""
    sizes = [len(shard.header()) + shard.nbytes for shard in work.shards]
    return [sum(sizes[: number + 1]) for number in range(len(sizes))]


@pytest.mark.parametrize("place", ["mark", "index", "other file"])
def test_a_disk_that_fills_up_beside_the_shards_is_the_same_error(
    place: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    staging = work.staging()
    if place == "mark":
        monkeypatch.setattr(staging, "finish", full)
    elif place == "index":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutputError, match=r"cannot write .*: the disk is full"):
        write_shards(work.source, work.shards, computed, staging)
        copy_other_files(work.source, staging, ())


def test_another_write_error_says_what_the_system_said(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, piece: memoryview) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OutputError, match="Input/output error"):
        work.write()


def test_u6_1_everything_beside_the_weights_is_copied(work: Work) -> None:
    files = {
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}\r\n",
        "preprocessor_config.json": b"{}",
        "modeling_custom.py": b"print('never run')\n",
        "unknown.bin2": bytes(range(256)),
        "nested/deeper/notes.txt": b"kept",
        "README.md": b"# card",
    }
    for name, content in files.items():
        (work.source.path / name).parent.mkdir(parents=True, exist_ok=True)
        (work.source.path / name).write_bytes(content)
    (work.source.path / ".gitattributes").write_text("not part of a model")
    staging = work.staging()
    copied = copy_other_files(work.source, staging, {"README.md", "config.json"})
    del files["README.md"]
    assert tree(staging.files) == files
    assert copied == sorted(files)


def test_u6_1_links_are_copied_as_the_files_they_point_to(work: Work, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"blob")
    (work.source.path / "tokenizer.json").symlink_to(tmp_path / "blob")
    staging = work.staging()
    copy_other_files(work.source, staging, {"config.json"})
    copy = staging.files / "tokenizer.json"
    assert copy.read_bytes() == b"blob" and not copy.is_symlink()
