"""The decision as a record: which layers, channels, heads and neurons stay.

A plan is a readable JSON file with index lists as ranges ("0-5,9"). It can be edited by hand and applied with `plan=`
(`--plan FILE`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, PlainSerializer

from burnish.errors import BurnishError
from burnish.families.conversion import load_plan
from burnish.prune.layout import Sizes


def to_ranges(indices: Iterable[int]) -> str:
    """Ascending indices as ranges.

    Examples:
        >>> to_ranges([0, 1, 2, 3, 4, 5, 9])
        '0-5,9'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: Any) -> Any:
    """The indices of a list of ranges; anything but text is left to the caller's own check."""
    if not isinstance(text, str):
        return text
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdecimal() or not (last or first).strip().isdecimal():
            raise ValueError(f"{part!r}: expected ranges such as 0-5,9")
        indices += range(int(first), int(last or first) + 1)
    return tuple(indices)


Indices = Annotated[tuple[int, ...], BeforeValidator(from_ranges), PlainSerializer(to_ranges)]


class LayerPlan(BaseModel):
    """What stays of one layer.

    Attributes:
        layer: its index in the source.
        heads: query heads; a key-value head stays with the first of its query heads and goes with the last.
        neurons: of the feed-forward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    heads: Indices
    neurons: Indices


class PrunePlan(BaseModel):
    """What stays of a model.

    Attributes:
        family: model type.
        source: sizes before.
        target: sizes after.
        block_influence: of every layer of the source; None when not known.
        hidden: channels of the residual stream.
        layers: the layers that stay, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["burnish.prune.plan/1"] = "burnish.prune.plan/1"
    family: str
    source: Sizes
    target: Sizes
    notes: list[str] = []
    block_influence: list[FiniteFloat] | None = None
    hidden: Indices
    layers: list[LayerPlan]

    def require_fits(self, family: str, sizes: Sizes) -> Self:
        """Hold the plan against a model.

        Raises:
            BurnishError: another model, indices out of range or order, or numbers that are not those of `target`;
                names the place and the value.
        """
        if (self.family, self.source) != (family, sizes):
            raise BurnishError(f"the plan is for {self.family} ({self.source}), the model is {family} ({sizes})")
        _require_sound("layers", [layer.layer for layer in self.layers], self.target.layers, sizes.layers)
        _require_sound("hidden", self.hidden, self.target.hidden_size, sizes.hidden_size)
        for layer in self.layers:
            place = f"layer {layer.layer}"
            _require_sound(f"{place}: neurons", layer.neurons, self.target.intermediate_size, sizes.intermediate_size)
            _require_sound(f"{place}: heads", layer.heads, self.target.heads, sizes.heads)
            groups = [head // sizes.group for head in layer.heads]
            counts = {groups.count(group) for group in groups}
            if len(set(groups)) != self.target.kv_heads or len(counts) != 1:
                raise BurnishError(
                    f"plan: {place}: heads {to_ranges(layer.heads)} are of {len(set(groups))} key-value heads with"
                    f" {sorted(counts)} each: needs {self.target.kv_heads} with as many each"
                )
        return self

    def to_json(self) -> str:
        """Indented JSON with one line a layer, so that a diff shows what changed."""
        head = self.model_dump(exclude={"layers"})
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        layers = ",\n".join(f"    {json.dumps(layer.model_dump())}" for layer in self.layers)
        return "{\n" + "\n".join(lines) + '\n  "layers": [\n' + layers + "\n  ]\n}\n"

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a plan file; raises as `load_plan`."""
        return load_plan(cls, file)


def _require_sound(place: str, indices: Iterable[int], count: int, limit: int) -> None:
    found = list(indices)
    if len(found) != count:
        raise BurnishError(f"plan: {place}: {len(found)} indices, the target says {count}")
    if found != sorted(set(found)) or not 0 <= found[0] <= found[-1] < limit:
        raise BurnishError(f"plan: {place}: {to_ranges(found)}: needs ascending indices within 0..{limit - 1}")
