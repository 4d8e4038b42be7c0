"""A zeroth-order run as a log of scalars: base weights and log together are the tuned weights, bit for bit.

The file holds JSON lines: a header, a line a step, and at the end the hash of the weights that came out. Twenty
thousand steps are about three megabytes, whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from burnish.errors import BurnishError
from burnish.optim.perturbation import noise_layout, perturbation

if TYPE_CHECKING:
    from burnish.optim.mezo import MeZO

FORMAT = "burnish.trajectory/1"


@dataclass(frozen=True)
class Record:
    """One step.

    Attributes:
        step: its number, from 0.
        block: number of the perturbed block.
        seed: of the first direction; those of further queries follow from it.
        gradients: projected gradient of each query; none for a step that was left out.
        lr: learning rate of each group.
        loss: mean of the evaluated losses; None where one was no number.
        repeats: batches that were measured along the same directions.
    """

    step: int
    block: int
    seed: int
    gradients: tuple[float, ...]
    lr: tuple[float, ...]
    loss: float | None
    repeats: int = 1

    def merged(self, other: Record) -> Record:
        """The mean of this record, of `repeats` batches, and of one more batch in the same step."""
        count = self.repeats + 1
        if self.loss is None or other.loss is None:
            return dataclasses.replace(self, gradients=(), loss=None, repeats=count)
        pairs = zip(self.gradients, other.gradients, strict=True)
        return dataclasses.replace(
            self,
            gradients=tuple((mine * self.repeats + theirs) / count for mine, theirs in pairs),
            loss=(self.loss * self.repeats + other.loss) / count,
            repeats=count,
        )


@dataclass(frozen=True)
class Header:
    """What a replay needs besides the base weights.

    Attributes:
        format: of the file.
        optimizer: class.
        options: of it that decide where the weights go.
        perturbation: `Perturbation.describe()`.
        groups: names and weight decay of each group.
        blocks: names of the tensors of each block.
        noise: generator and layout of the noise.
        torch: version that drew it.
        fingerprint: of the tuned tensors before the first step.
        base: of the rest of the model, as the caller tells it.
    """

    format: str
    optimizer: str
    options: dict[str, Any]
    perturbation: dict[str, Any]
    groups: list[dict[str, Any]]
    blocks: list[list[str]]
    noise: str
    torch: str
    fingerprint: str
    base: str | dict[str, Any] = ""


@dataclass(frozen=True)
class Trajectory:
    """A log that was read.

    Attributes:
        header: of the run.
        records: its steps, in order.
        result: hash of the weights that came out; None for a run that did not end.
    """

    header: Header
    records: tuple[Record, ...]
    result: str | None = None

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Trajectory:
        """Read a log.

        Raises:
            BurnishError: the file is missing, is no log, or a line is cut short, changed or missing; names the line.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BurnishError(f"{path}: cannot be read ({error})") from error
        result: str | None = None
        records: list[Record] = []
        header: Header | None = None
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                if header is None:
                    if values.get("format") != FORMAT:
                        raise BurnishError(f"{path}: not a log of this kind: its first line names no {FORMAT!r}")
                    header = Header(**values)
                elif "result" in values:
                    result = values["result"]
                else:
                    record = Record(**values | {key: tuple(values[key]) for key in ("gradients", "lr")})
                    if record.step != len(records) or result is not None:
                        raise BurnishError(f"{path} line {number}: step {record.step}, expected {len(records)}")
                    records.append(record)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise BurnishError(f"{path} line {number}: not a step ({error}); the file is cut or changed") from error
        if header is None:
            raise BurnishError(f"{path}: empty, a header is expected")
        return Trajectory(header, tuple(records), result)


class TrajectoryWriter:
    """Appends to a log; a run that goes on from an earlier step drops what came after it.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._steps: int | None = None

    def begin(self, header: Callable[[], Header], step: int) -> None:
        """Make sure that the file holds a header and all steps before `step`, and nothing else.

        Raises:
            BurnishError: steps are missing, or a run from step 0 finds a file.
        """
        if self._steps == step:
            return
        if step == 0:
            if self.path.exists():
                raise BurnishError(f"{self.path} exists already: it may be all there is of a run; give another file")
            self.path.write_text(_line(dataclasses.asdict(header())), encoding="utf-8")
        else:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
            if len(lines) <= step:
                raise BurnishError(
                    f"{self.path}: holds {max(len(lines) - 1, 0)} steps, but the run goes on from step {step}: start"
                    " anew, or from an earlier checkpoint"
                )
            self.path.write_text("".join(lines[: step + 1]), encoding="utf-8")
        self._steps = step

    def append(self, record: Record) -> None:
        """Write one step."""
        self._write(dataclasses.asdict(record))
        self._steps = record.step + 1

    def end(self, result: str) -> None:
        """Write the hash of the weights that came out."""
        self._write({"result": result})

    def _write(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(values))


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash (XXH3, 128 bit, hexadecimal) of names, shapes, types and bits of tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replay(
    params: nn.Module | Iterable[tuple[str, Tensor]],
    trajectory: Trajectory,
    *,
    base: str | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> MeZO:
    """Turn base weights into tuned ones, in place, by the steps of a log.

    Args:
        params: the base model, or its named tensors.
        trajectory: the log.
        base: what the rest of the model is; compared with the header where it is given.
        advance: called with 1 after each step.

    Returns:
        The optimizer after the last step; training may go on with it.

    Raises:
        BurnishError: the weights are not those that the run began with, the noise of this device is another, or what
            came out is not what the run ended with.
    """
    from burnish.optim.mezo import MeZO
    from burnish.optim.mezo_bcd import MeZOBCD

    header = trajectory.header
    named = dict(params.named_parameters() if isinstance(params, nn.Module) else params)
    missing = [name for group in header.groups for name in group["names"] if name not in named]
    if missing:
        raise BurnishError(f"the log moves {missing[0]}, which this model does not have: give the model it began with")
    if base is not None and base != header.base:
        raise BurnishError(f"the log is of base model {header.base}, this one is {base}: give the model it began with")
    groups = [
        {"params": [(name, named[name]) for name in group["names"]], "weight_decay": group["weight_decay"]}
        for group in header.groups
    ]
    tensors = [pair for group in groups for pair in group["params"]]
    if fingerprint(tensors) != header.fingerprint:
        raise BurnishError("these weights are not those that the run began with: give the same model and dtype")
    if noise_layout(tensors[0][1].device) != header.noise:
        raise BurnishError(
            f"the log's noise is {header.noise!r}, here it is {noise_layout(tensors[0][1].device)!r}: replay on the"
            " same kind of device"
        )
    if torch.__version__ != header.torch:
        warnings.warn(f"the log was written with torch {header.torch}, this is {torch.__version__}", stacklevel=2)
    options = {**header.options, "perturbation": perturbation(**header.perturbation)}
    if header.optimizer == MeZOBCD.__name__:
        optimizer: MeZO = MeZOBCD(groups, **options | {"blocks": header.blocks})
    else:
        optimizer = MeZO(groups, **options)
    for record in trajectory.records:
        optimizer.apply(record, replay=True)
        advance(1)
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = trajectory.records[-1].lr[number] if trajectory.records else group["lr"]
    if trajectory.result is not None and optimizer.fingerprint() != trajectory.result:
        raise BurnishError(
            "the replayed weights differ from those that the run ended with: another torch or processor?"
        )
    return optimizer


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
