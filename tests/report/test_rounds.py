"""Rounds on the page: which measure is drawn how, and what a reader without pictures gets."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import BurnishError
from burnish.report import read_run, render, write_report
from burnish.report.records import RoundLine, read_rounds
from burnish.report.rounds import round_drawings


def lines(count: int = 3, **changes: Any) -> list[dict[str, Any]]:
    """Rewards 1, 2, ... with a standard error of a quarter, and a third file's worth of other measures."""
    return [
        {
            "rounds": at, "rows": 64 if at else None, "length": 20.0 + at, "ended": 0.25, "kl": 2.0 * at,
            "kl_error": 0.5, "entropy": 40.0 - at, "entropy_error": None, "reward": 1.0 + at, "reward_error": 0.25,
            "win_rate": 0.5 + at / 10, "win_rate_low": 0.4 + at / 10, "win_rate_high": 0.6 + at / 10,
            "reference_coverage": 1.5 + 10 * at, "log_det": 5.0, "gain": 0.0, "fit": {"loss": 0.5},
            **({"coverage": 1.25, "pairs_log_det": 6.0} if at else {}), **changes,
        }
        for at in range(count)
    ]  # fmt: skip


def written(directory: Path, rows: list[dict[str, Any]]) -> None:
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(directory: Path, rows: list[dict[str, Any]]) -> tuple[RoundLine, ...]:
    written(directory, rows)
    return read_rounds(directory / "rounds.jsonl")


def drawn(curve: str) -> list[tuple[str, list[list[float]]]]:
    """Class and points of each polyline."""
    found = ElementTree.fromstring(f"<figure>{curve}</figure>").iter("polyline")
    return [
        (line.get("class", ""), [[float(x) for x in point.split(",")] for point in line.get("points", "").split()])
        for line in found
    ]


def test_a_mean_stands_between_the_ends_of_its_interval(tmp_path: Path) -> None:
    reward, rate, kl, entropy, length, coverage, variety = round_drawings(records(tmp_path, lines()))
    (low_kind, low), (high_kind, high), (kind, middle) = drawn(str(reward.curve))
    assert (low_kind, high_kind, kind) == ("train", "train", "eval")
    assert [x for x, _ in middle] == [0, 500, 1000]
    rise = middle[0][1] - middle[1][1]  # one unit of reward, upwards is less
    assert middle[1][1] - middle[2][1] == pytest.approx(rise, abs=0.3)
    assert low[0][1] - middle[0][1] == pytest.approx(1.96 * 0.25 * rise, abs=0.3)
    assert middle[2][1] - high[2][1] == pytest.approx(1.96 * 0.25 * rise, abs=0.3)
    assert [len(points) for _, points in drawn(str(rate.curve))] == [3, 3, 3]
    assert "from 1.00 to 3.00" in str(reward.curve) and "from 0 to 4.00" in str(kl.curve)
    assert [key.name for key in entropy.keys] == ["measured"]  # no error, no interval
    assert [kind for kind, _ in drawn(str(length.curve))] == ["eval"]
    assert [(key.kind, key.name) for key in coverage.keys] == [
        ("q5", "by the round before"),
        ("eval", "by the reference"),
    ]
    assert coverage.note == "logarithmic scale" and variety.note == ""
    assert [len(points) for _, points in drawn(str(coverage.curve))] == [2, 3]


def test_whole_rounds_alone_are_labelled(tmp_path: Path) -> None:
    curve = str(round_drawings(records(tmp_path, lines(2)))[0].curve)
    axis = curve[curve.index('class="xs"') :]
    assert re.findall(r">(\d+)</text>", axis) == ["0", "1"]


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("reward", "win_rate", "reference_coverage", "coverage", "log_det", "pairs_log_det"))
    names = [drawing.name for drawing in round_drawings(records(tmp_path, lines(**nothing)))]
    assert [name.partition(",")[0] for name in names] == ["KL to the reference", "Entropy", "Length of a completion"]
    assert round_drawings(()) == ()


def test_a_directory_of_rounds_has_a_page_with_all_numbers_in_a_table(tmp_path: Path) -> None:
    written(tmp_path / "my-rounds", lines())
    page = write_report(tmp_path / "my-rounds").read_text()
    words = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))
    assert "on-policy rounds: 2 of sampling, labelling and fitting" in words
    assert "Win rate against the reference" in words and "over rounds" in words
    row = "2 64 3.00 ± 0.25 70 % (60–80) 4.00 ± 0.50 38.0 22.0 25 % 1.25 21.5 5.00 6.00"
    assert row in words and "0 – 1.00 ± 0.25" in words
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert write_report(tmp_path / "my-rounds", overwrite=True).read_text() == page


def test_the_page_of_a_run_has_a_section_of_its_rounds(make_distillation: Callable[..., Path]) -> None:
    directory = make_distillation()
    assert "<h2>Rounds</h2>" not in render(read_run(directory))
    written(directory / "rounds", lines())
    page = render(read_run(directory))
    assert page.count("<h2>Rounds</h2>") == 1 and "38.0" in page
    assert page.index("<h2>Rounds</h2>") < page.index("<h2>How it was made</h2>")


def test_lines_of_rounds_are_not_repeated_among_the_facts(make_distillation: Callable[..., Path]) -> None:
    directory = make_distillation()
    record = json.loads((directory / "burnish.json").read_text())
    record["training"] |= {"rounds": [{"rounds": 7, "reward": 0.125}], "mode": "rounds"}
    (directory / "burnish.json").write_text(json.dumps(record))
    page = render(read_run(directory))
    assert "<dt>mode</dt>" in page and "0.125" not in page


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"kl": "x"}, "kl: "), ({"reward": float("nan")}, "reward: "), ({"rounds": None}, "rounds: ")],
)
def test_a_malformed_line_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    first, second = lines(2)
    with pytest.raises(BurnishError, match=re.escape("rounds.jsonl row 2: ") + complaint):
        records(tmp_path, [first, second | change])
