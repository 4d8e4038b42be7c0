"""Numbers and drawings against values worked out by hand."""

import doctest
import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from burnish.report import figures
from burnish.report.figures import LogScale, axis, count, duration, heat_map, interval, ratio, shade, size, with_error


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<figure>{svg}</figure>")


def cells(drawing: ElementTree.Element) -> list[ElementTree.Element]:
    return [rect for rect in drawing.iter("rect") if rect.get("class") != "mark"]


def test_doctests() -> None:
    result = doctest.testmod(figures)
    assert result.attempted > 10
    assert result.failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (9_994, "9.99 K"),
        (9_996, "10.0 K"),
        (999_499, "999 K"),
        (999_500, "1.00 M"),
    ],
)
def test_count_carries_to_the_next_unit(value: int, text: str) -> None:
    assert count(value) == text


def test_units_are_decimal() -> None:
    assert size(1024) == "1.02 kB"
    assert size(5_000_000_000_000) == "5.00 TB"
    assert count(5_000_000_000_000_000) == "5000 T"


def test_duration_at_the_edges_of_its_units() -> None:
    assert [duration(s) for s in (0.9996, 59.94, 59.96, 3599.6)] == ["1.0 s", "59.9 s", "1 min 0 s", "1 h 0 min"]


def test_a_slower_model_never_reads_as_equal() -> None:
    assert ratio(0.994) == "0.99×"
    assert ratio(0.999) == "0.999×"
    assert ratio(1.0) == "1.00×"
    assert ratio(1.001) == "1.00×"


def test_error_sets_the_decimals_of_its_value() -> None:
    assert with_error(0.123456, 0.00098) == "0.12346 ± 0.00098"
    assert with_error(8.704, 0.0996) == "8.704 ± 0.100"


def test_shade_covers_the_palette_and_no_more() -> None:
    steps = [shade(value / 100, 0, 1) for value in range(101)]
    assert steps == sorted(steps)
    assert set(steps) == set(range(figures.SHADES))


def test_heat_map_colours_each_row_by_its_own_highest() -> None:
    drawing = parse(heat_map([[0.0, 1.0, 2.0], [0.0, 10.0, 20.0]], [[2], [1]], [["", "", ""]] * 2, [0, 1], title="t"))
    assert [cell.get("class") for cell in cells(drawing)] == ["q0", "q4", "q8"] * 2


def test_heat_map_starts_at_the_lowest_score_where_that_is_negative() -> None:
    drawing = parse(heat_map([[-1.0, 0.0, 1.0]], [[]], [["", "", ""]], [0], title="t"))
    assert [cell.get("class") for cell in cells(drawing)] == ["q0", "q4", "q8"]


def test_heat_map_of_equal_scores_is_full_and_of_no_scores_is_empty() -> None:
    drawing = parse(heat_map([[3.0, 3.0], [0.0, 0.0], None], [[], [], [1]], [["", ""]] * 3, [0, 1, 2], title="t"))
    assert [cell.get("class") for cell in cells(drawing)] == ["q8", "q8", "q0", "q0", "none", "none"]


def test_heat_map_marks_lie_on_the_marked_cells() -> None:
    drawing = parse(heat_map([[0.0] * 5] * 2, [[1, 4], [0]], [[""] * 5] * 2, [0, 1], title="t"))
    for row, marked in zip(drawing.iter("g"), ([1, 4], [0]), strict=True):
        rects = row.findall("rect")
        places = [rect.get("x") for rect in rects if rect.get("class") != "mark"]
        assert [rect.get("x") for rect in rects if rect.get("class") == "mark"] == [places[i] for i in marked]
        assert len(row.findall("circle")) == len(marked)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 16), (48, 128), (94, 512)])
def test_heat_map_cells_lie_inside_the_drawing_and_apart(rows: int, columns: int) -> None:
    values = [[float(c) for c in range(columns)]] * rows
    drawing = parse(heat_map(values, [[0]] * rows, [[""] * columns] * rows, range(rows), title="t"))
    labels, chart = drawing.findall("svg")
    assert labels.get("height") == chart.get("height")
    width, height = float(chart.get("width", 0)), float(chart.get("height", 0))
    lines = list(chart.iter("g"))
    tops = [float(re.findall(r"[\d.]+", line.get("transform", ""))[1]) for line in lines]
    first = cells(lines[0])
    lefts = [float(cell.get("x", 0)) for cell in first]
    cell_width, cell_height = float(first[0].get("width", 0)), float(first[0].get("height", 0))
    assert cell_width >= 7 and cell_height >= 10
    assert 1 + lefts[-1] + cell_width <= width and tops[-1] + cell_height <= height
    assert all(right - left > cell_width for left, right in pairwise(lefts))
    assert all(lower - upper > cell_height for upper, lower in pairwise(tops))


def test_heat_map_of_128_experts_fits_a_desktop_page() -> None:
    chart = parse(heat_map([[1.0] * 128], [[]], [[""] * 128], [0], title="t")).findall("svg")
    assert sum(float(svg.get("width", 0)) for svg in chart) <= 1088


def test_text_is_escaped() -> None:
    hostile = "<script>\"&'"
    drawing = heat_map([[1.0]], [[]], [[hostile]], [0], title=hostile, row=hostile, column=hostile)
    assert "<script" not in drawing
    parsed = parse(drawing)
    assert [title.text for title in parsed.iter("title")] == [hostile]
    assert parsed.findall("svg")[1].get("aria-label") == hostile
    assert "<script" not in interval(LogScale(1, 100), 10, 1, reference=None, title=hostile)


def test_interval_places_are_logarithmic() -> None:
    drawing = parse(interval(LogScale(1, 10_000), 100, 90, reference=10, title="t"))
    by_class = {element.get("class"): element for element in drawing.iter() if element.get("class") != "grid"}
    assert by_class["dot"].get("cx") == "50%"
    assert by_class["reference"].get("x1") == "25%"
    assert by_class["whisker"].get("x1") == "25%"
    assert by_class["whisker"].get("x2") == f"{round(25 * math.log10(190), 2):g}%"


def test_interval_that_reaches_below_zero_ends_at_the_axis() -> None:
    drawing = parse(interval(LogScale(1, 100), 10, 50, reference=None, title="t"))
    whisker = next(line for line in drawing.iter("line") if line.get("class") == "whisker")
    assert (whisker.get("x1"), whisker.get("x2")) == ("0%", f"{round(50 * math.log10(60), 2):g}%")


@pytest.mark.parametrize("values", [[8.7, 8.7], [8.7, 8.8], [8.7, 24.3], [5.0, 300.0], [3.0, 1e6], [0.01, 1e9]])
def test_axis_has_a_few_round_ticks_inside(values: list[float]) -> None:
    scale = LogScale.around(values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 5 or max(values) / min(values) > 1e5
    assert ticks and all(scale.low <= tick <= scale.high for tick in ticks)
    assert list(ticks) == sorted(set(ticks))
    assert len(list(parse(axis(scale)).iter("text"))) == len(ticks)
