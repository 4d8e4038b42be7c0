"""What is seen of a model, layer by layer: records of sums that merge exactly and are saved as safetensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from burnish.errors import CheckpointError


@dataclass(frozen=True)
class LayerSums:
    """Sums of one layer: a dataclass whose fields are tensors, or None where a record does not have them.

    Attributes:
        KEPT: fields that are properties of the model and not sums; merging keeps them.
    """

    KEPT: ClassVar[frozenset[str]] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        """The sums that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def __add__(self, other: Self) -> Self:
        """The record of both sets of tokens.

        Raises:
            ValueError: the records hold different statistics, or are of different sizes.
        """
        mine, theirs = self.tensors(), other.tensors()
        if {name: t.shape for name, t in mine.items()} != {name: t.shape for name, t in theirs.items()}:
            raise ValueError(f"statistics differ in kind: {sorted(mine)} and {sorted(theirs)}")
        return type(self)(**{name: mine[name] if name in self.KEPT else mine[name] + theirs[name] for name in mine})


Layer = TypeVar("Layer", bound=LayerSums)


@dataclass(frozen=True)
class ModelSums(Generic[Layer]):
    """The record of a whole model: layer index -> sums of that layer, each with a `num_tokens`.

    Attributes:
        FORMAT: what the file is, and its version.
        KIND: the record's name in errors.
        LAYER: class of the layers' records.
    """

    FORMAT: ClassVar[str]
    KIND: ClassVar[str]
    LAYER: ClassVar[type[LayerSums]]

    layers: dict[int, Layer]

    def __add__(self, other: Self) -> Self:
        """The record of both sets of tokens; exact, so that shards and machines add up."""
        if self.layers.keys() != other.layers.keys():
            raise ValueError(f"statistics cover different layers: {list(self.layers)} and {list(other.layers)}")
        return type(self)({layer: sums + other.layers[layer] for layer, sums in self.layers.items()})

    @property
    def num_tokens(self) -> int:
        """Calibration tokens seen by the first layer (by all of them)."""
        return int(next(iter(self.layers.values())).tensors()["num_tokens"])

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(tensor.nbytes for sums in self.layers.values() for tensor in sums.tensors().values())

    def save(self, file: Path) -> None:
        """Write one safetensors file; tensors are named `layers.<layer>.<sum>`."""
        tensors = {
            f"layers.{layer}.{name}": tensor.contiguous()
            for layer, sums in self.layers.items()
            for name, tensor in sums.tensors().items()
        }
        partial = file.with_name(file.name + ".partial")
        partial.write_bytes(save(tensors, metadata={"format": self.FORMAT}))
        partial.replace(file)

    @classmethod
    def load(cls, *files: Path) -> Self:
        """Read what `save` wrote, in one file or with its layers over several.

        Raises:
            CheckpointError: a file is missing or of another format.
        """
        found: dict[int, dict[str, Tensor]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as stored:
                    if (stored.metadata() or {}).get("format") != cls.FORMAT:
                        raise CheckpointError(f"{file}: holds no {cls.KIND} ({cls.FORMAT})")
                    for key in stored.keys():  # noqa: SIM118 (not a mapping)
                        _, layer, name = key.split(".")
                        found.setdefault(int(layer), {})[name] = stored.get_tensor(key)
                layers = {layer: cls.LAYER(**found[layer]) for layer in sorted(found)}
            except (OSError, ValueError, TypeError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read as {cls.KIND} ({error})") from error
        return cls(layers)  # type: ignore[arg-type]
