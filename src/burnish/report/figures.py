"""Numbers as a reader takes them in at a glance, and drawings as inline SVG: pure functions from data to text."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

SHADES = 9
"""Steps of the sequential palette; the page's style sheet colours the classes q0 (lowest) to q8 (highest)."""


def _prefixed(value: float, prefixes: Sequence[str]) -> str:
    power = 0
    while power + 1 < len(prefixes) and abs(value) >= 999.5:
        value /= 1000
        power += 1
    if power == 0:
        return f"{value:.0f} {prefixes[0]}".rstrip()
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {prefixes[power]}"


def count(value: int) -> str:
    """A number of things to three digits.

    >>> count(3_340_000_000), count(999_999), count(64)
    ('3.34 B', '1.00 M', '64')
    """
    return _prefixed(value, ("", "K", "M", "B", "T"))


def size(value: int) -> str:
    """A number of bytes to three digits, in decimal units.

    >>> size(6_700_000_000), size(512)
    ('6.70 GB', '512 B')
    """
    return _prefixed(value, ("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    >>> duration(0.0042), duration(12.34), duration(59.97), duration(7384)
    ('4 ms', '12.3 s', '1 min 0 s', '2 h 3 min')
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float) -> str:
    """A measured value to three significant digits, in plain notation where that stays short.

    >>> number(0.012345), number(1234.5), number(0.0000321), number(0)
    ('0.0123', '1234', '3.21e-05', '0')
    """
    if value == 0:
        return "0"
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:#.3g}".rstrip(".")


def ratio(value: float) -> str:
    """A factor; one below 1 never reads as 1.

    >>> ratio(1.6), ratio(0.834), ratio(0.9999), ratio(41.7), ratio(0.0042)
    ('1.60×', '0.83×', '0.999×', '42×', '0.0042×')
    """
    if 0.995 <= value < 1:
        return f"{math.floor(value * 1000) / 1000:.3f}×"
    if value >= 9.995:
        return f"{value:.0f}×"
    return f"{value:.2f}×" if value >= 0.0995 else f"{value:.2g}×"


def change(before: float, after: float, less: str, more: str) -> str:
    """How much less or more the second is, as a factor of at least one.

    >>> change(16, 4, "smaller", "larger"), change(4, 5, "smaller", "larger"), change(4, 4, "smaller", "larger")
    ('4.00× smaller', '1.25× larger', 'unchanged')
    """
    if before == after:
        return "unchanged"
    if not (before > 0 and after > 0):
        return ""
    return f"{ratio(before / after)} {less}" if after < before else f"{ratio(after / before)} {more}"


def with_error(value: float, error: float | None) -> str:
    """A value with its standard error, both to the decimal that the error's second digit has.

    >>> with_error(12.4123, 0.1234), with_error(-1523.2, 31.0), with_error(12.4123, None)
    ('12.41 ± 0.12', '−1523 ± 31', '12.4')
    """
    if not error:
        return number(value)
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f}".replace("-", "−") + f" ± {error:.{decimals}f}"


def shade(value: float, low: float, high: float) -> int:
    """Palette step, 0 to 8, of a value between `low` and `high`.

    >>> shade(0.0, 0, 1), shade(0.5, 0, 1), shade(1.0, 0, 1), shade(0.0, 0, 0)
    (0, 4, 8, 0)
    """
    return 0 if high <= low else min(SHADES - 1, int((value - low) / (high - low) * SHADES))


def heat_map(
    values: Sequence[Sequence[float] | None],
    marked: Sequence[Collection[int]],
    tips: Sequence[Sequence[str]],
    rows: Sequence[int],
    *,
    title: str,
    row: str = "layer",
    column: str = "expert",
) -> str:
    """A table of cells coloured row by row, some of them marked: two SVG elements, the row labels and the cells.

    The labels stand apart so that the page can hold them in place while the cells scroll sideways.

    Args:
        values: one sequence a row, or None where nothing was measured (such a row is drawn hatched). Colour runs from
            zero, or the row's lowest value where that is negative, to the row's highest.
        marked: the columns of each row that get an outline and a dot.
        tips: the text that each cell shows under the pointer.
        rows: the label of each row.
        title: what the drawing shows, for readers who cannot see it.
        row: name of the vertical axis.
        column: name of the horizontal axis.
    """
    columns = max((len(line) for line in tips), default=0)
    width = max(8, min(44, 1008 // max(columns, 1)))
    height = max(11, min(28, width))
    gap = 1 if width < 14 else 2
    head, foot = 34, 2
    label_width = 46
    total_width, total_height = columns * width + 2, head + len(tips) * height + foot
    column_step = 1 if width >= 18 else 4 if width >= 12 else 8
    row_step = 1 if height >= 14 else 4

    axis = [
        f'<svg class="rows" aria-hidden="true" width="{label_width}" height="{total_height}"'
        f' viewBox="0 0 {label_width} {total_height}">',
        f'<text class="axis" x="0" y="{head - 9}">{escape(row)}</text>',
    ]
    cells = [
        f'<svg class="cells" role="img" aria-label="{escape(title)}" width="{total_width}" height="{total_height}"'
        f' viewBox="0 0 {total_width} {total_height}">',
        f'<text class="axis" x="1" y="10">{escape(column)}</text>',
    ]
    for index in range(0, columns, column_step):
        x = 1 + index * width + width / 2
        cells.append(f'<text class="tick" x="{x:g}" y="{head - 9}" text-anchor="middle">{index}</text>')
    radius = max(1.7, round(0.13 * height, 1))
    inner_width, inner_height = width - gap, height - gap
    for index, (line, kept, texts) in enumerate(zip(values, marked, tips, strict=True)):
        y = head + index * height
        if index % row_step == 0 or row_step == 1:
            middle = y + inner_height / 2
            axis.append(
                f'<text class="tick" x="{label_width - 8}" y="{middle:g}" text-anchor="end"'
                f' dominant-baseline="central">{rows[index]}</text>'
            )
        low, high = (min(0.0, *line), max(line)) if line else (0.0, 0.0)
        cells.append(f'<g transform="translate(1 {y})">')
        for position, text in enumerate(texts):
            colour = "none" if line is None else f"q{shade(line[position], low, high)}"
            cells.append(
                f'<rect class="{colour}" x="{position * width}" width="{inner_width}" height="{inner_height}">'
                f"<title>{escape(text)}</title></rect>"
            )
        for position in sorted(kept):
            x = position * width
            cells.append(
                f'<rect class="mark" x="{x}" width="{inner_width}" height="{inner_height}"/>'
                f'<circle class="mark" cx="{x + inner_width / 2:g}" cy="{inner_height / 2:g}" r="{radius:g}"/>'
            )
        cells.append("</g>")
    return "\n".join([*axis, "</svg>", *cells, "</svg>"])


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from `low` to `high` (both above zero), as percentages of whatever width the page has."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float]) -> LogScale:
        """The axis that shows all of `values` with a margin.

        >>> scale = LogScale.around([10.0, 40.0])
        >>> scale.low < 10 and scale.high > 40
        True
        """
        low, high = min(values), max(values)
        margin = max((high / low) ** 0.08, 1.02)
        return cls(low / margin, high * margin)

    def percent(self, value: float) -> float:
        """Place of a value, 0 at the left end and 100 at the right; values off the axis stick to its ends.

        >>> LogScale(1, 100).percent(10)
        50.0
        """
        inside = min(max(value, self.low), self.high)
        return round(100 * math.log(inside / self.low) / math.log(self.high / self.low), 2)

    def ticks(self) -> tuple[float, ...]:
        """At most five round values on the axis.

        >>> LogScale(4, 120).ticks(), LogScale(8.1, 8.8).ticks()
        ((5.0, 10.0, 20.0, 50.0, 100.0), (8.2, 8.4, 8.6, 8.8))
        """
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for leads, stride in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), stride) for stride in range(1, last - first + 1))):
            places = [lead * 10.0**exponent for exponent in range(first, last + 1, stride) for lead in leads]
            ticks = tuple(place for place in places if self.low <= place <= self.high)
            if 3 <= len(ticks) <= 5:
                return ticks
        return _round_values(self.low, self.high)


def _round_values(low: float, high: float) -> tuple[float, ...]:
    span = high - low
    base = 10.0 ** math.floor(math.log10(span / 4))
    step = next(base * lead for lead in (1, 2, 5, 10) if span / (base * lead) <= 4)
    inside = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return tuple(round(step * i, 10) for i in inside)


@dataclass(frozen=True)
class LinearScale:
    """A linear axis from `low` to `high`, as percentages of whatever width or height the page gives it."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Place of a value, 0 at the low end and 100 at the high one; values off the axis stick to its ends.

        >>> LinearScale(0, 200).percent(50)
        25.0
        """
        inside = min(max(value, self.low), self.high)
        return round(100 * (inside - self.low) / (self.high - self.low), 2)

    def ticks(self) -> tuple[float, ...]:
        """At most five round values on the axis.

        >>> LinearScale(0, 10_500_000).ticks()
        (0.0, 5000000.0, 10000000.0)
        """
        return _round_values(self.low, self.high)


def interval(scale: LogScale, value: float, error: float | None, *, reference: float | None, title: str) -> str:
    """A dot at `value` with a whisker of one standard error to each side, and a line at the reference.

    Places are percentages, so that the drawing stretches with its table cell while its strokes and dots do not.
    """
    at = scale.percent(value)
    parts = [f'<svg class="interval" role="img" aria-label="{escape(title)}" width="100%" height="18">']
    parts += [
        f'<line class="grid" x1="{scale.percent(tick):g}%" x2="{scale.percent(tick):g}%" y1="0" y2="18"/>'
        for tick in scale.ticks()
    ]
    if reference is not None:
        x = scale.percent(reference)
        parts.append(f'<line class="reference" x1="{x:g}%" x2="{x:g}%" y1="0" y2="18"/>')
    if error:
        left, right = scale.percent(value - error), scale.percent(value + error)
        parts.append(f'<line class="whisker" x1="{left:g}%" x2="{right:g}%" y1="9" y2="9"/>')
    parts.append(f'<circle class="dot" cx="{at:g}%" cy="9" r="4"/></svg>')
    return "".join(parts)


def axis(scale: LogScale) -> str:
    """The tick labels that stand above a column of intervals."""
    labels = "".join(
        f'<text class="tick" x="{scale.percent(tick):g}%" y="11" text-anchor="middle">{tick:g}</text>'
        for tick in scale.ticks()
    )
    return f'<svg class="interval" aria-hidden="true" width="100%" height="14">{labels}</svg>'


Points = Sequence[tuple[float, float]]
SHOWN_POINTS = 500
"""A line of more points than this is drawn through their means."""


@dataclass(frozen=True)
class Line:
    """A line of a drawing.

    Attributes:
        kind: class of the style sheet: `train` (faint), `eval` (strong), or `q0` to `q8` of the palette.
        points: (x, value) in order.
        dotted: mark each point, with its value under the pointer.
    """

    kind: str
    points: Points
    dotted: bool = False


def curve(train: Points, evaluated: Points, *, title: str, unit: str = "tokens") -> str:
    """A faint line for training, a strong one with dots for evaluations, over tokens, as `lines` draws them."""
    return lines([Line("train", train), Line("eval", evaluated, dotted=True)], title=title, unit=unit)


def lines(drawn: Sequence[Line], *, title: str, unit: str, reach: Sequence[float] = ()) -> str:
    """Lines over a common axis: three SVG elements, the labels of the vertical axis, the drawing, and the labels of the
    horizontal axis.

    The vertical axis is logarithmic where the values are above zero and span more than a factor of ten. Values that are
    not finite are left out, and the line is broken there. The drawing has 1000 units each way and stretches with the
    page, while its strokes do not.

    Args:
        drawn: from the one below to the one on top.
        title: what the drawing shows, for readers who cannot see it.
        unit: of the horizontal axis.
        reach: values that the vertical axis shows in any case; it is then linear.

    Raises:
        ValueError: no finite value at all.
    """
    finite = [point for line in drawn for point in line.points if math.isfinite(point[1])]
    if not finite:
        raise ValueError("no finite value to draw")
    across = LinearScale(0.0, max(1.0, *(x for x, _ in finite)))
    values = [y for _, y in finite]
    up = _linear_scale([*values, *reach]) if reach else _value_scale(values)

    def place(x: float, y: float) -> str:
        return f"{10 * across.percent(x):g},{1000 - 10 * up.percent(y):g}"

    labels = "".join(
        f'<text class="tick" x="100%" y="{100 - up.percent(tick):g}%" text-anchor="end" dominant-baseline="central">'
        f"{tick:g}</text>"
        for tick in up.ticks()
    )
    parts = [f'<svg class="ys" aria-hidden="true">{labels}</svg>']
    parts.append(f'<svg class="plot" role="img" aria-label="{escape(title)}" viewBox="0 0 1000 1000"'
                 ' preserveAspectRatio="none">')  # fmt: skip
    for tick in up.ticks():
        parts.append(f'<path class="grid" d="M{place(0, tick)}H1000"/>')
    for line in drawn:
        for piece in _unbroken(thinned(line.points)):
            parts.append(f'<polyline class="{line.kind}" points="{" ".join(place(x, y) for x, y in piece)}"/>')
    for x, y in (point for line in drawn if line.dotted for point in line.points):
        if math.isfinite(y):
            tip = f"{number(y)} after {count(round(x))} {unit}"
            parts.append(f'<path class="point" d="M{place(x, y)}h0"><title>{escape(tip)}</title></path>')
    labels = "".join(
        f'<text class="tick" x="{across.percent(tick):g}%" y="12" text-anchor="{_anchor(across.percent(tick))}">'
        f"{count(round(tick))}</text>"
        for tick in across.ticks()
        if tick.is_integer()
    )
    parts.append(f'</svg>\n<svg class="xs" aria-hidden="true">{labels}</svg>')
    return "\n".join(parts)


def thinned(points: Points, limit: int = SHOWN_POINTS) -> Points:
    """Means over as many neighbours as it takes to have at most `limit` points.

    >>> thinned([(1, 10), (2, 20), (3, 30), (4, 60), (5, 7)], limit=3)
    [(1.5, 15.0), (3.5, 45.0), (5.0, 7.0)]
    """
    width = -(-len(points) // limit)
    if width <= 1:
        return points
    pieces = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]


def bars(values: Sequence[float], kept: Collection[int], *, title: str, what: str) -> str:
    """One bar a layer, from zero up (down where negative), those of the kept layers filled: the bars and their labels.

    Args:
        values: one for each layer.
        kept: the layers that stayed.
        title: what the drawing shows, for readers who cannot see it.
        what: name of the value, for the text under the pointer.
    """
    low, high = min(0.0, *values), max(0.0, *values)
    scale = LinearScale(low, high if high > low else low + 1)
    width = 100 / len(values)
    zero = 100 - scale.percent(0)
    parts = [f'<svg class="bars" role="img" aria-label="{escape(title)}">']
    for layer, value in enumerate(values):
        top = 100 - scale.percent(value)
        fate = "kept" if layer in kept else "removed"
        parts.append(
            f'<rect class="{fate}" x="{layer * width + 0.1 * width:.3f}%" y="{min(top, zero):g}%"'
            f' width="{0.8 * width:.3f}%" height="{abs(top - zero):g}%">'
            f"<title>{escape(f'layer {layer}: {what} {number(value)}, {fate}')}</title></rect>"
        )
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if len(values) / step <= 16)
    labels = "".join(
        f'<text class="tick" x="{(layer + 0.5) * width:.3f}%" y="12" text-anchor="middle">{layer}</text>'
        for layer in range(0, len(values), step)
    )
    return "\n".join([*parts, f'</svg>\n<svg class="xs" aria-hidden="true">{labels}</svg>'])


def logarithmic(values: Sequence[float]) -> bool:
    """Whether a drawing of these values needs a logarithmic axis: above zero, and more than a factor of ten apart.

    >>> logarithmic([1, 10]), logarithmic([0.9, 10]), logarithmic([0, 10])
    (False, True, False)
    """
    return 0 < 10 * min(values) < max(values)


def _value_scale(values: Sequence[float]) -> LinearScale | LogScale:
    return LogScale.around(values) if logarithmic(values) else _linear_scale(values)


def _linear_scale(values: Sequence[float]) -> LinearScale:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(0.1 * abs(high), 0.1)
    return LinearScale(0.0 if 0 <= low < 0.4 * high else low - margin, high + margin)


def _unbroken(points: Points) -> list[list[tuple[float, float]]]:
    """Runs of finite points."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _anchor(percent: float) -> str:
    """Labels at the ends of an axis stay inside it."""
    return "start" if percent < 4 else "end" if percent > 96 else "middle"
