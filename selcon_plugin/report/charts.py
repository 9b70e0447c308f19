"""Small charts as SVG, each with the same values as a table.

Lines differ in color, dash pattern and marker, so that any one of these identifies a line.
Text is escaped here: ``Markup.format`` escapes the values that it inserts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from selcon_plugin.report.document import Table

# Colors are classes c0..c6 of the style sheet (Okabe and Ito's palette).
NUM_COLORS = 7
# Shown instead of an unknown value.
UNKNOWN = "n/a"
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 2 1 2", "1 2")
_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
_MARKERS_UP_TO = 40
_TABLE_ROWS = 60


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: Name in the legend.
        x: Positions on the horizontal axis, in increasing order.
        y: Values at these positions.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a legend.

    Attributes:
        text: Meaning of the marker.
        marker: SVG of the marker.
        group: Name of the group of marks that the entry can highlight; may be empty.
    """

    text: str
    marker: Markup
    group: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with its legend and its values, ready for the template.

    Attributes:
        title: Caption.
        description: Text alternative for screen readers.
        drawing: Content of the SVG element.
        legend: One entry per line.
        table_title: Heading of the table.
        table: The plotted values.
        size: Width and height of the drawing.
    """

    title: str
    description: str
    drawing: Markup
    legend: Sequence[LegendEntry]
    table_title: str
    table: Table
    size: tuple[int, int] = (_WIDTH, _HEIGHT)


def marker_path(number: int, x: float, y: float, size: float) -> str:
    """Return SVG path data of the marker of a series: circle, square, triangle, ...

    Args:
        number: Number of the series; the five shapes repeat.
        x: Horizontal position of the center.
        y: Vertical position of the center.
        size: Half the width.

    Returns:
        Value of the attribute ``d``.
    """
    s = size
    shapes: tuple[Callable[[], str], ...] = (
        lambda: f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        lambda: f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",
        lambda: f"M{x:.1f} {y - 1.2 * s:.1f}l{1.2 * s:.1f} {2.2 * s:.1f}h{-2.4 * s:.1f}z",
        lambda: (
            f"M{x:.1f} {y - 1.4 * s:.1f}l{1.4 * s:.1f} {1.4 * s:.1f}l{-1.4 * s:.1f} "
            f"{1.4 * s:.1f}l{-1.4 * s:.1f} {-1.4 * s:.1f}z"
        ),
        lambda: f"M{x:.1f} {y + 1.2 * s:.1f}l{1.2 * s:.1f} {-2.2 * s:.1f}h{-2.4 * s:.1f}z",
    )
    return shapes[number % len(shapes)]()


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    steps: bool = False,
    rule: tuple[float, str] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """Draw a line chart with a legend and a table of the same values.

    Args:
        series: Lines; those without a finite value are left out.
        title: Caption of the chart.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        steps: Whether each value holds from its position to the next one, as in a
            histogram.
        rule: Position and label of a vertical reference line.
        from_zero: Whether the vertical axis starts at 0.

    Returns:
        The chart; None if no line has two points.
    """
    lines = [_finite(line) for line in series]
    lines = [line for line in lines if line.x]
    if max((len(line.x) for line in lines), default=0) < 2:
        return None
    plot = _Plot(lines, from_zero, rule[0] if rule else None)
    drawing = plot.grid(x_label, y_label)
    for index, line in enumerate(lines):
        drawing += _draw(plot, line, index, steps)
    if rule is not None:
        drawing += plot.rule(*rule)
    names = ", ".join(line.name for line in lines)
    table_title, table = _table(lines, x_label)
    return Chart(
        title,
        f"{title}: {names} over {x_label}. The table below lists the values.",
        drawing,
        [_legend_entry(line, index) for index, line in enumerate(lines)],
        table_title,
        table,
    )


def _finite(line: Series) -> Series:
    pairs = [
        (x, y)
        for x, y in zip(line.x, line.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    return Series(line.name, [x for x, _ in pairs], [y for _, y in pairs])


class _Plot:
    """The axes of a chart, which map values to positions in the drawing."""

    def __init__(
        self, lines: Sequence[Series], from_zero: bool, rule: float | None
    ) -> None:
        # The axis starts at 0, so that all charts of a run have the same one.
        xs = [0.0, *(x for line in lines for x in line.x)]
        xs += [] if rule is None else [rule]
        ys = [y for line in lines for y in line.y] + ([0.0] if from_zero else [])
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
        self._x = min(xs), max(*xs, min(xs) + 1e-9)
        self._y = (
            min(self.y_ticks[0], min(ys)),
            max(self.y_ticks[-1], max(ys), min(ys) + 1e-9),
        )

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self, x_label: str, y_label: str) -> Markup:
        drawn = Markup()
        for value in self.y_ticks:
            drawn += Markup(
                '<path class="grid" d="M{left} {y:.1f}H{right}"/>'
                '<text x="{x}" y="{base:.1f}" text-anchor="end">{number}</text>'
            ).format(
                left=_LEFT,
                right=_WIDTH - _RIGHT,
                y=self.y(value),
                x=_LEFT - 6,
                base=self.y(value) + 4,
                number=number(value),
            )
        for value in self.x_ticks:
            if self._x[0] <= value <= self._x[1]:
                drawn += Markup(
                    '<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
                ).format(self.x(value), _HEIGHT - _BOTTOM + 16, number(value))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        drawn += Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            middle, _HEIGHT - 6, x_label
        )
        if y_label:
            height = (_TOP + _HEIGHT - _BOTTOM) / 2
            drawn += Markup(
                '<text transform="translate(12 {}) rotate(-90)" '
                'text-anchor="middle">{}</text>'
            ).format(height, y_label)
        return drawn

    def rule(self, value: float, name: str) -> Markup:
        x = self.x(value)
        anchor, place = ("end", x - 5) if x > _WIDTH / 2 else ("start", x + 5)
        return Markup(
            '<path class="rule" d="M{:.1f} {}V{}"/>'
            '<text class="strong" x="{:.1f}" y="{}" text-anchor="{}">{}</text>'
        ).format(x, _TOP, _HEIGHT - _BOTTOM, place, _TOP + 10, anchor, name)


def _draw(plot: _Plot, line: Series, index: int, steps: bool) -> Markup:
    color = f"c{index % NUM_COLORS}"
    places = [(plot.x(x), plot.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    if steps:
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
        path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    else:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = _DASHES[index % len(_DASHES)]
    drawn = Markup('<path class="line s{}" stroke-dasharray="{}" d="{}"/>').format(
        color, dash, path
    )
    if steps or len(places) > _MARKERS_UP_TO:
        return drawn
    mark = Markup('<path class="f{}" d="{}"><title>{}: {} at {}</title></path>')
    for (x, y), at, value in zip(places, line.x, line.y, strict=True):
        shape = marker_path(index, x, y, 3)
        drawn += mark.format(color, shape, line.name, number(value), number(at))
    return drawn


def _legend_entry(line: Series, index: int) -> LegendEntry:
    marker = Markup(
        '<path class="line sc{color}" stroke-dasharray="{dash}" d="M0 6H30"/>'
        '<path class="fc{color}" d="{shape}"/>'
    ).format(
        color=index % NUM_COLORS,
        dash=_DASHES[index % len(_DASHES)],
        shape=marker_path(index, 15, 6, 3),
    )
    return LegendEntry(line.name, marker)


def _table(lines: Sequence[Series], x_label: str) -> tuple[str, Table]:
    """Return the values; long lines are sampled evenly, and the last value is kept."""
    columns = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    places = sorted(set(itertools.chain(*columns)))
    kept = places
    if len(places) > _TABLE_ROWS:
        last = len(places) - 1
        kept = [places[round(i * last / (_TABLE_ROWS - 1))] for i in range(_TABLE_ROWS)]
    rows = [
        [number(place), *(number(c[place]) if place in c else "" for c in columns)]
        for place in kept
    ]
    note = "" if kept is places else f" ({len(kept)} of {len(places)} rows)"
    return f"Table{note}", Table([x_label, *(line.name for line in lines)], rows)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round numbers for an axis.

    Args:
        low: Smallest value shown.
        high: Largest value shown.
        count: Approximate number of ticks.

    Returns:
        Increasing multiples of 1, 2 or 5 times a power of ten that enclose both values.

    Example:
        >>> ticks(0, 19)
        [0.0, 5.0, 10.0, 15.0, 20.0]
    """
    if high - low < 1e-12 * max(1.0, abs(high)):
        room = abs(high) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Format a number briefly.

    Args:
        value: Any number.

    Returns:
        At most four significant digits, without trailing zeros.

    Example:
        >>> [number(value) for value in (0.0, 12936.0, 0.35000001, 1e-7, 66.8537)]
        ['0', '12,936', '0.35', '1e-07', '66.85']
    """
    if not math.isfinite(value):
        return UNKNOWN
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"
