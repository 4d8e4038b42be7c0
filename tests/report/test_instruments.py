"""The section of spectra: what is drawn from which line, and what is refused."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import BurnishError
from burnish.report import read_run, render, write_report
from burnish.report.instruments import last_spectra, spectrum_drawings, subspace_drawings
from burnish.report.records import AdapterSpectrum, Subspace, read_instruments


def spectrum(step: int, adapter: str, values: tuple[float, ...], **measures: Any) -> AdapterSpectrum:
    return AdapterSpectrum(
        step=step,
        adapter=adapter,
        singular_values=values,
        **{"effective_rank": None, "growth_variation": None} | measures,
    )


def written(directory: Path, name: str, lines: list[dict[str, Any]]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def sample_spectra() -> list[dict[str, Any]]:
    """Two adapters whose square roots grow by 0.1 and 0.05 a step."""
    return [
        {
            "step": step,
            "adapter": f"layers.{layer}.q_proj",
            "singular_values": [(0.1 * step) ** 2, (0.05 * step) ** 2],
            "effective_rank": None if step == 0 else 1.5 + layer / 4,
            "growth_variation": None if step == 0 else 0.2,
            "scale": 2.0,
            "dora": layer == 1,
        }
        for step in (0, 5, 10)
        for layer in (0, 1)
    ]


def sample_subspaces() -> list[dict[str, Any]]:
    shared = {"gradient_alignment": 0.9, "update_alignment": None, "bulk_share": 0.3}
    return [{"step": step, "eigenvalues": [20.0 - step, 0.5], **shared} for step in (0, 10)]


def drawn_lines(curve: str) -> dict[str, list[list[float]]]:
    """Points of each polyline by its class."""
    lines: dict[str, list[list[float]]] = {}
    for line in ElementTree.fromstring(f"<figure>{curve}</figure>").iter("polyline"):
        points = [[float(number) for number in point.split(",")] for point in line.get("points", "").split()]
        lines[line.get("class", "")] = points
    return lines


def test_modes_are_the_square_roots_of_the_median_over_adapters() -> None:
    spectra = [
        spectrum(step, f"layer {layer}", ((step * rate) ** 2, (step * rate / 2) ** 2))
        for step in (0, 4, 8)
        for layer, rate in enumerate((1.0, 2.0, 3.0))
    ]
    growth = spectrum_drawings(spectra)[0]
    lines = drawn_lines(str(growth.curve))
    assert list(lines) == ["q3", "q8"]  # the largest on top
    # medians 16 and 8 at the end, on a linear axis from 0 to 16 and a margin of 6%
    top = 16 * 1.06
    assert lines["q8"] == [
        [0, 1000],
        [500, pytest.approx(1000 - 8000 / top, abs=0.2)],
        [1000, pytest.approx(56.6, abs=0.2)],
    ]
    assert lines["q3"][2][1] == pytest.approx(1000 - 8000 / top, abs=0.2)
    assert growth.note == "median of 3 adapters"
    assert [(key.kind, key.name) for key in growth.keys] == [
        ("q8", "largest singular value"),
        ("q3", "singular value 2"),
    ]


def test_growth_is_drawn_on_a_linear_axis_where_the_file_starts_late_too() -> None:
    """Equal rates are straight lines only there: square roots of 1, 10, 19 are evenly spaced."""
    spectra = [spectrum(step, "q", (root**2,)) for step, root in ((10, 1.0), (20, 10.0), (30, 19.0))]
    heights = [y for _, y in drawn_lines(str(spectrum_drawings(spectra)[0].curve))["q8"]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_measures_have_a_median_and_a_range_and_start_where_they_are_known() -> None:
    spectra = [
        spectrum(step, f"layer {layer}", (1.0, 1.0), effective_rank=rank)
        for step, ranks in ((0, (None, None, None)), (2, (2.0, 4.0, 9.0)), (4, (2.0, 5.0, 9.0)))
        for layer, rank in enumerate(ranks)
    ]
    names = [drawing.name for drawing in spectrum_drawings(spectra)]
    assert names == ["Square roots of the singular values", "Effective rank"]
    drawing = spectrum_drawings(spectra)[1]
    assert [key.name for key in drawing.keys] == ["median of 3 adapters", "lowest and highest"]
    curves = re.findall(r'<polyline class="(\w+)" points="([^"]+)"', str(drawing.curve))
    assert [kind for kind, _ in curves] == ["train", "train", "eval"]
    heights = [float(points.split()[0].split(",")[1]) for _, points in curves]
    assert heights[0] > heights[2] > heights[1]  # lowest, highest, median; upwards is less
    assert all(points.startswith("500,") for _, points in curves)


def test_a_single_adapter_has_no_range() -> None:
    (_, rank) = spectrum_drawings([spectrum(step, "one", (1.0,), effective_rank=1.0) for step in (1, 2)])
    assert [key.name for key in rank.keys] == ["one adapter"]


def test_adapters_of_other_ranks_count_where_they_have_a_mode() -> None:
    spectra = [spectrum(1, "wide", (16.0, 9.0)), spectrum(1, "narrow", (4.0,))]
    lines = drawn_lines(str(spectrum_drawings(spectra)[0].curve))
    # median of 4 and 2 is the first mode; the second is of one adapter alone, 3
    assert lines["q3"] == lines["q8"]


def test_the_table_shows_the_newest_line_of_each_adapter_in_their_order() -> None:
    spectra = [spectrum(step, name, (float(step),)) for step in (1, 2) for name in ("v", "k")]
    assert [(line.adapter, line.step) for line in last_spectra(spectra)] == [("v", 2), ("k", 2)]


def test_eigenvalues_far_apart_are_logarithmic_and_missing_alignments_leave_no_line() -> None:
    top, length, bulk = subspace_drawings([Subspace(**line) for line in sample_subspaces()])
    assert (top.name, top.note) == ("Largest eigenvalues of the Hessian", "logarithmic scale")
    assert length.name == "Length inside the span of the top 2"
    assert [key.name for key in length.keys] == ["gradient"]
    assert 'class="eval"' not in length.curve and 'class="eval"' in bulk.curve
    assert spectrum_drawings([]) == () and subspace_drawings([]) == ()
    nothing = {"gradient_alignment": None, "update_alignment": None, "bulk_share": None}
    assert len(subspace_drawings([Subspace(step=0, eigenvalues=(1.0,), **nothing)])) == 1


def test_a_directory_of_instruments_alone_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "my-training"
    written(run, "spectrum.jsonl", sample_spectra())
    written(run, "subspace.jsonl", sample_subspaces())
    page = write_report(run).read_text()
    words = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))
    assert "my-training" in words and "what instruments saw over 10 steps of training" in words
    for heading in ("Square roots of the singular values", "Effective rank", "Largest eigenvalues of the Hessian"):
        assert heading in words
    assert re.search(r"layers\.1\.q_proj \(DoRA\) 2 2\.00 1\.00 0\.250 1\.75 0\.200", words)
    assert "the values are those of the product alone" in words
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert write_report(run, overwrite=True).read_text() == page


def test_the_page_of_a_run_has_a_section_where_instruments_wrote(make_distillation: Callable[..., Path]) -> None:
    directory = make_distillation()
    before = render(read_run(directory))
    assert "Spectra" not in before
    written(directory, "spectrum.jsonl", sample_spectra())
    after = render(read_run(directory))
    assert after.count("<h2>Spectra</h2>") == 1 and "2 adapters after step 10" in after
    assert after.index("<h2>Training</h2>") < after.index("<h2>Spectra</h2>") < after.index("<h2>How it was made</h2>")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"singular_values": []}, "0 singular values of q: expected some, none below 0"),
        ({"singular_values": [1.0, -1.0]}, "2 singular values of q: expected some, none below 0"),
        ({"singular_values": [math.nan]}, "singular_values.0: "),
        ({"effective_rank": "high"}, "effective_rank: "),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: dict[str, Any], complaint: str) -> None:
    good = {"step": 0, "adapter": "q", "singular_values": [1.0], "effective_rank": 1.0, "growth_variation": 0.0}
    written(tmp_path, "spectrum.jsonl", [good, good | line])
    with pytest.raises(BurnishError, match=re.escape("spectrum.jsonl row 2: ") + ".*" + re.escape(complaint)):
        read_instruments(tmp_path)


def test_the_axis_of_effective_ranks_reaches_from_nothing_to_the_rank() -> None:
    """So that pages of two optimizers can be compared."""
    spectra = [spectrum(step, "q", (1.0,) * 8, effective_rank=7.8) for step in (1, 2)]
    ((_, height), _) = drawn_lines(str(spectrum_drawings(spectra)[1].curve))["eval"]
    assert height == pytest.approx(1000 - 1000 * 7.8 / (8 * 1.06), abs=0.2)
