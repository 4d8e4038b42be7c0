"""Plans: ranges, a file that can be read, edited and applied, and one line for each that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.errors import BurnishError
from burnish.prune import PrunePlan, Sizes
from burnish.prune.plan import from_ranges, to_ranges

SOURCE = Sizes(layers=4, hidden_size=8, intermediate_size=6, heads=4, kv_heads=2)
TARGET = Sizes(layers=2, hidden_size=3, intermediate_size=2, heads=2, kv_heads=2)


def plan(**changes: Any) -> PrunePlan:
    layers = [{"layer": layer, "heads": "1,2", "neurons": "0,5"} for layer in (0, 3)]
    content = {"family": "llama", "source": SOURCE, "target": TARGET, "hidden": "2-4", "layers": layers}
    return PrunePlan(**{**content, **changes})


def one_layer(**changes: Any) -> list[dict[str, Any]]:
    return [{"layer": 0, "heads": "1,2", "neurons": "0,5", **changes}, {"layer": 3, "heads": "0,3", "neurons": "1-2"}]


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_round_trip(indices: set[int]) -> None:
    text = to_ranges(sorted(indices))
    assert from_ranges(text) == tuple(sorted(indices))
    assert all(b > a + 1 for a, b in zip(ends(text)[1::2], ends(text)[2::2], strict=False))  # no run is cut in two


def ends(text: str) -> list[int]:
    return [int(number) for part in text.split(",") for number in (part.split("-") * 2)[:2]]


def test_ranges_are_compact() -> None:
    assert to_ranges([0, 1, 2, 3, 4, 5, 9]) == "0-5,9"
    assert from_ranges("0-2, 7") == (0, 1, 2, 7)


def test_a_plan_is_readable_json_and_comes_back(tmp_path: Path) -> None:
    written = plan(block_influence=[0.4, 0.1, 0.2, 0.3])
    (tmp_path / "plan.json").write_text(written.to_json())
    assert PrunePlan.load(tmp_path / "plan.json") == written
    assert json.loads(written.to_json())["layers"][1] == {"layer": 3, "heads": "1-2", "neurons": "0,5"}
    written.require_fits("llama", SOURCE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "qwen3"}, "the plan is for qwen3"),
        ({"source": TARGET.model_copy(update={"layers": 4})}, r"the plan is for llama \(4 layers, hidden 3"),
        ({"hidden": "2-5"}, "plan: hidden: 4 indices, the target says 3"),
        ({"hidden": "6-8"}, r"plan: hidden: 6-8: needs ascending indices within 0\.\.7"),
        ({"hidden": (4, 3, 2)}, "plan: hidden: .*needs ascending"),
        ({"hidden": (2, 2, 3)}, "plan: hidden: .*needs ascending"),
        ({"layers": one_layer()[:1]}, "plan: layers: 1 indices, the target says 2"),
        ({"layers": one_layer(layer=3)}, "plan: layers: 3,3: needs ascending"),
        ({"layers": one_layer(neurons="0,6")}, r"plan: layer 0: neurons: 0,6: needs ascending indices within 0\.\.5"),
        (
            {"layers": one_layer(heads="0-1")},
            "plan: layer 0: heads 0-1 are of 1 key-value heads with .2. each: needs 2",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_place(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BurnishError, match=says):
        plan(**changes).require_fits("llama", SOURCE)


def test_a_file_that_is_no_plan_is_refused_by_field(tmp_path: Path) -> None:
    content = json.loads(plan().to_json())
    for field, value in (("hidden", "2-x"), ("hidden", ""), ("target", {"layers": 0}), ("extra", 1)):
        (tmp_path / "plan.json").write_text(json.dumps({**content, field: value}))
        with pytest.raises(BurnishError, match=rf"plan\.json: not a plan: {field}"):
            PrunePlan.load(tmp_path / "plan.json")
