"""Act on a plan: stream the shards of an output, copy what lies beside the weights, verify what was written."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from burnish.checkpoint.layout import PlannedTensor, Shard, index_json
from burnish.checkpoint.source import INDEX_FILE, Checkpoint, require_finite
from burnish.checkpoint.staging import Staging
from burnish.checkpoint.tensors import TensorInfo, dtype_name
from burnish.errors import OutputError

if TYPE_CHECKING:
    import torch

Compute = Callable[[PlannedTensor], "torch.Tensor"]
SPARE_BYTES = 64 * 2**20


def require_disk_space(out: Path, needed: int) -> None:
    """Raise OutputError when the file system of `out` has less than `needed` bytes (and a little) to spare."""
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        raise OutputError(f"{out}: needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free: free some space")


def write_shards(
    source: Checkpoint,
    shards: Collection[Shard],
    compute: Compute,
    staging: Staging,
    *,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> int:
    """Write all shards and their index into `staging`, one tensor at a time.

    Finished shards of an interrupted run are verified by hash and kept. Copied tensors are moved as bytes, never
    decoded; computed ones are checked against the planned shape and type and must be finite.

    Args:
        source: where copied tensors come from.
        shards: the plan.
        compute: gives the tensor for each planned tensor that is not a copy.
        staging: where finished files are kept until all are there.
        advance: called with the number of bytes done, for progress.

    Returns:
        Bytes written by this call.

    Raises:
        OutputError: the disk is full, or a computed tensor is not as planned.
        CheckpointError: a source tensor cannot be read.
    """
    pending = [shard for shard in shards if not staging.verified(shard.file)]
    require_disk_space(staging.out, sum(shard.nbytes for shard in pending))
    advance(sum(shard.nbytes for shard in shards) - sum(shard.nbytes for shard in pending))
    written = 0
    with _one_thread():
        for shard in pending:
            with staging.explaining(shard.file):
                digest = _write_shard(source, shard, compute, staging.files / shard.file, advance)
                staging.finish(shard.file, digest)
            written += shard.nbytes
    if len(shards) > 1:
        with staging.explaining(INDEX_FILE):
            (staging.files / INDEX_FILE).write_text(json.dumps(index_json(shards), indent=2) + "\n", encoding="utf-8")
    return written


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread meanwhile: every pass is bound by memory, and threads that wait for each other cost up to 4x."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_shard(source: Checkpoint, shard: Shard, compute: Compute, file: Path, advance: Callable[[int], None]) -> str:
    partial = file.with_name(file.name + ".partial")
    digest = xxhash.xxh3_128()
    with partial.open("wb", buffering=0) as stream:
        digest.update(header := shard.header())
        _write_all(stream.fileno(), memoryview(header))
        for tensor, following in itertools.zip_longest(shard.tensors, shard.tensors[1:]):
            if following is not None and following.copy_of is not None:
                source.expect([following.copy_of])
            for piece in _pieces(source, tensor, compute):
                digest.update(piece)
                _write_all(stream.fileno(), piece)
                advance(len(piece))
        os.fsync(stream.fileno())
    partial.replace(file)
    return digest.hexdigest()


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _pieces(source: Checkpoint, planned: PlannedTensor, compute: Compute) -> Iterator[memoryview]:
    import torch

    if planned.copy_of is not None:
        info = source.info(planned.copy_of)
        _require_as_planned(planned, info.dtype, info.shape)
        yield from source.chunks(planned.copy_of)
        return
    tensor = compute(planned)
    _require_as_planned(planned, dtype_name(tensor.dtype), tuple(tensor.shape))
    require_finite(tensor, TensorInfo(planned.name, planned.dtype, planned.shape, Path("output"), 0, planned.nbytes))
    yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _require_as_planned(planned: PlannedTensor, dtype: str, shape: tuple[int, ...]) -> None:
    if (dtype, shape) != (planned.dtype, planned.shape):
        raise OutputError(
            f"tensor {planned.name}: {dtype} {list(shape)}, planned {planned.dtype} {list(planned.shape)}"
        )


def copy_other_files(source: Checkpoint, staging: Staging, replaced: Collection[str]) -> list[str]:
    """Copy all that lies beside the weights, but for the files in `replaced`; returns the copied names, sorted."""
    copied = []
    for relative in source.other_files():
        if str(relative) not in replaced:
            target = staging.files / relative
            with staging.explaining(str(relative)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.path / relative, target)
            copied.append(str(relative))
    return copied


def verify_output(directory: Path, shards: Collection[Shard]) -> None:
    """Reopen a written checkpoint and hold it against its plan: names, shapes, types, files and index.

    Raises:
        OutputError: a planned tensor is missing or different, or there is one that was not planned.
        CheckpointError: a file is truncated or corrupt, or the index disagrees with the files.
    """
    written = Checkpoint.open(directory).tensors
    planned = {tensor.name: (tensor, shard.file) for shard in shards for tensor in shard.tensors}
    if strange := sorted(written.keys() ^ planned.keys()):
        raise OutputError(f"{directory}: written and planned tensors differ: {', '.join(strange[:3])}")
    for name, (tensor, file) in planned.items():
        _require_as_planned(tensor, written[name].dtype, written[name].shape)
        if written[name].file.name != file:
            raise OutputError(f"{directory}: tensor {name} is in {written[name].file.name}, planned in {file}")
