"""The page of a sweep: what it says, in which order, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import BurnishError
from burnish.recipes.sweep.effects import main_effects, pareto_front
from burnish.report import write_report
from burnish.report.sweep import Evaluated, Final, is_sweep, render_sweep, rungs
from tests.report.test_page import Page

SCORES, GROUPINGS, KEEPS = ("sf", "do-acp", "ean"), ("weights", "none"), (4, 8)


def sample_sweep() -> dict[str, Any]:
    """A grid in which the score multiplies KL, and wider students are closer."""
    rows: list[dict[str, Any]] = []
    for grouping in GROUPINGS:
        for keep in KEEPS:
            for place, score in enumerate(SCORES):
                wide = grouping == "none" and keep == 8
                kl = 2.0 * 1.5**place * (0.5 if wide else 1.0) * (1.1 if keep == 8 else 1.0)
                shared = grouping == "none" and keep == 4
                if shared:
                    kl = 2.0 * 1.5**place
                rows.append(
                    {
                        "label": f"{score}-{grouping}-k{keep}-uniform",
                        "score": score,
                        "grouping": grouping,
                        "scaling": "uniform",
                        "keep": keep,
                        "num_parameters": 2_000_000 if wide else 1_200_000,
                        "nll": {"value": kl + 2, "standard_error": 0.02},
                        "perplexity": {"value": math.exp(kl + 2), "standard_error": 0.5},
                        "forward_kl": {"value": kl, "standard_error": 0.05},
                        "shared_with": f"{score}-weights-k4-uniform" if shared else None,
                    }
                )
    own = sorted((row for row in rows if row["shared_with"] is None), key=lambda row: row["forward_kl"]["value"])
    front = pareto_front([(row["num_parameters"], row["forward_kl"]["value"]) for row in own])
    factors = {name: [row[name] for row in rows] for name in ("score", "grouping", "keep")}
    effects = [
        effect.to_dict() | {"levels": [vars(level) for level in effect.levels]}
        for effect in main_effects(factors, [math.log(row["forward_kl"]["value"]) for row in rows])
    ]
    names = ("label", "score", "grouping", "scaling", "keep")
    return {
        "format": "burnish.sweep/1",
        "teacher": {
            "name": "/models/Qwen3-Tiny",
            "num_parameters": 3_600_000,
            "nll": {"value": 2.0, "standard_error": 0.1},
        },
        "evaluation": {
            "dataset": None,
            "fingerprint": "abc123",
            "num_samples": 8,
            "max_length": 256,
            "num_tokens": 2048,
            "dtype": "float32",
        },
        "rows": rows,
        "front": [own[index]["label"] for index in front],
        "effects": effects,
        "finals": [
            {
                **{name: own[0][name] for name in names},
                "complete": True,
                "evaluations": [{"tokens": 1000, "forward_kl": 0.9}, {"tokens": 2000, "forward_kl": 0.4}],
            },
            {
                **{name: own[1][name] for name in names},
                "complete": False,
                "evaluations": [{"tokens": 1000, "forward_kl": 1.3}],
            },
        ],
    }


RECORD = {
    "format": "burnish.run/1",
    "verb": "sweep",
    "started": "2026-03-02T09:14:07+00:00",
    "options": {"scores": "sf,do-acp,ean", "seed": 0},
    "seconds": {"measure": 75.0},
    "environment": {"versions": {"burnish": "0.1.0"}, "platform": "Linux x86_64", "threads": 1, "devices": ["cpu"]},
    "statistics": {"num_tokens": 65536, "hash": "def"},
    "peak_rss_bytes": 600_000_000,
}

MakeSweep = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> MakeSweep:
    def make_(change: Callable[[dict[str, Any]], None] = lambda sweep: None) -> Path:
        found = sample_sweep()
        change(found)
        directory = tmp_path / "my-sweep"
        directory.mkdir(exist_ok=True)
        (directory / "sweep.json").write_text(json.dumps(found))
        (directory / "burnish.json").write_text(json.dumps(RECORD))
        return directory

    return make_


def test_headline_says_how_many_and_which_is_best(make: MakeSweep) -> None:
    page = Page(render_sweep(make()))
    assert "12 ways to densify Qwen3-Tiny" in page.words and "9 different students" in page.words
    assert "score sf, grouping none, scaling uniform, 8 experts kept" in page.words
    assert "/models" not in page.words


def test_rows_are_ranked_and_a_shared_student_follows_the_one_that_was_measured(make: MakeSweep) -> None:
    html = render_sweep(make())
    _, best, table = html.split('<table class="rows">')[1:]
    assert "shared" not in best and best.count('scope="row"') == 9
    assert best.count("1 more make it") == 3
    cells = re.findall(r"<td>(\S+)</td><td>(\S+)</td><td class=\"n\">(\d+)</td>", table)
    assert len(cells) == 12 and cells[0] == ("sf", "none", "8")
    second = cells.index(("sf", "weights", "4"))
    assert cells[second + 1] == ("sf", "none", "4")
    assert "<td>sf-weights-k4-uniform</td>" in table
    assert len(re.findall(r'<tr class="shared">', table)) == 3
    ranks = [int(rank) for rank in re.findall(r'<th class="n" scope="row">(\d+)</th>', table)]
    assert ranks == list(range(1, 10))


def test_front_is_marked_and_places_are_logarithmic(make: MakeSweep) -> None:
    html = render_sweep(make())
    drawing = html[html.index('<div class="curve front">') : html.index("<figcaption>KL, nats")]
    assert (
        len(re.findall(r'<circle class="other"', drawing)) == 7
        and len(re.findall(r'<circle class="best" cx="[\d.]+%"', drawing)) == 2
    )
    place = {
        tip: (float(x), float(y))
        for x, y, tip in re.findall(r'cx="([\d.]+)%" cy="([\d.]+)%" r="\d"><title>(\S+)', drawing)
    }
    step = place["do-acp-weights-k4-uniform"][1] - place["ean-weights-k4-uniform"][1]
    assert step == pytest.approx(place["sf-weights-k4-uniform"][1] - place["do-acp-weights-k4-uniform"][1], abs=0.02)
    assert step > 0  # a larger divergence lies higher
    assert place["sf-none-k8-uniform"][0] > place["sf-weights-k8-uniform"][0]


def test_one_width_has_no_front_but_a_hint(make: MakeSweep) -> None:
    def narrow(sweep: dict[str, Any]) -> None:
        for row in sweep["rows"]:
            row["num_parameters"] = 1_200_000

    page = Page(render_sweep(make(narrow)))
    assert "add the grouping none" in page.words and not page.having("div", class_="curve front")


def test_effects_are_named_by_size_with_their_shares(make: MakeSweep) -> None:
    sweep = sample_sweep()
    html = render_sweep(make())
    shown = re.findall(
        r"<h3>(\w+(?: \w+)?)<small>explains (\d+) % of the variance; best to worst level ([\d.]+)×", html
    )
    shares = sorted((effect["share"], effect["factor"]) for effect in sweep["effects"])[::-1]
    titles = {"score": "Score", "grouping": "Grouping", "keep": "Kept experts"}
    assert [name for name, _, _ in shown] == [titles[factor] for _, factor in shares]
    assert [int(share) for _, share, _ in shown] == [round(100 * share) for share, _ in shares]
    assert shown[0][2] == "2.25"  # score: 1.5 to the power of two levels


def test_finals_show_who_went_all_the_way_and_who_stopped(make: MakeSweep) -> None:
    page = Page(render_sweep(make()))
    assert "sf-none-k8-uniform 1.10 0.900 0.400 distilled in full" in page.words
    assert "do-acp-none-k8-uniform 1.65 1.30 stopped" in page.words
    assert "Finals" not in Page(render_sweep(make(lambda sweep: sweep.update(finals=[])))).words


def test_rungs_are_the_powers_of_two_below_the_last() -> None:
    cell = {"label": "x", "score": "sf", "grouping": "none", "scaling": "uniform", "keep": 4}
    counts = (1024, 2048, 3072, 4096)
    final = Final(**cell, complete=True, evaluations=tuple(Evaluated(tokens=n, forward_kl=1.0) for n in counts))
    assert rungs([final]) == [1024, 2048, 4096] and rungs([]) == []


def test_a_student_that_overflows_ranks_last(make: MakeSweep) -> None:
    def overflow(sweep: dict[str, Any]) -> None:
        sweep["rows"][0]["forward_kl"] = sweep["rows"][0]["perplexity"] = {"value": None, "standard_error": None}
        sweep["effects"] = []

    html = render_sweep(make(overflow))
    assert html.rindex("not finite") > html.rindex("4.95") and "What matters" not in html


def test_report_knows_a_sweep_and_writes_the_same_page_twice(make: MakeSweep) -> None:
    directory = make()
    assert is_sweep(directory)
    page = write_report(directory)
    first = page.read_bytes()
    assert first.decode() == render_sweep(directory)
    assert write_report(directory, overwrite=True).read_bytes() == first


def test_page_is_self_contained(make: MakeSweep) -> None:
    html = render_sweep(make())
    assert "<script" not in html and not re.search(r'(src|href)="(?!#|data:,)', html)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sweep: sweep.update(format="burnish.sweep/9"), r"sweep.json: format"),
        (lambda sweep: sweep["rows"][2].update(keep="four"), r"sweep.json: rows.2.keep"),
        (lambda sweep: sweep.update(rows=[]), "rows is empty"),
    ],
)
def test_files_that_are_no_sweep_are_refused_by_key(
    make: MakeSweep, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(BurnishError, match=message):
        render_sweep(make(change))
