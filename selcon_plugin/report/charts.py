"""Small charts as SVG, each with the same figures as a table.

Lines differ by color, dash and marker: none of them is needed alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Colors are classes c0..c6 of the style sheet (Okabe and Ito's palette).
NUM_COLORS = 7
# Stands for a figure that is not known.
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
        name: Its name, in words.
        x: Places on the horizontal axis, rising.
        y: Values.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


def marker_path(number: int, x: float, y: float, size: float) -> str:
    """Return SVG path data of the marker of a series: circle, square, triangle, ...

    Args:
        number: Which series; there are five shapes.
        x: Its middle.
        y: Its middle.
        size: Half its width.

    Returns:
        Data for the attribute ``d``.
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
) -> str:
    """Draw lines, with a legend and a table of the same figures.

    Args:
        series: Lines; those without a finite value are left out.
        title: What the chart shows.
        x_label: What the horizontal axis shows.
        y_label: What the vertical axis shows.
        steps: Whether values hold for an interval that begins at their place: a histogram.
        rule: Place of a vertical line, and what it is.
        from_zero: Whether the vertical axis begins at 0.

    Returns:
        HTML of a figure; empty where no line has two points.
    """
    lines = [_finite(line) for line in series]
    lines = [line for line in lines if line.x]
    if max((len(line.x) for line in lines), default=0) < 2:
        return ""
    plot = _Plot(lines, from_zero, rule[0] if rule else None)
    body = [plot.grid(x_label, y_label)]
    for number, line in enumerate(lines):
        body.append(_draw(plot, line, number, steps))
    if rule is not None:
        body.append(plot.rule(*rule))
    names = ", ".join(line.name for line in lines)
    said = escape(f"{title}: {names} over {x_label}. The table below has the figures.")
    legend = _legend(lines) if len(lines) > 1 else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{said}">'
        f"{''.join(body)}</svg>{legend}{_table(lines, x_label)}</figure>"
    )


def _finite(line: Series) -> Series:
    pairs = [
        (x, y)
        for x, y in zip(line.x, line.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    return Series(line.name, [x for x, _ in pairs], [y for _, y in pairs])


class _Plot:
    """Axes: from figures to places in the picture."""

    def __init__(
        self, lines: Sequence[Series], from_zero: bool, rule: float | None
    ) -> None:
        # From 0, so that charts of one run have the same axis.
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

    def grid(self, x_label: str, y_label: str) -> str:
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(
                f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{number(value)}</text>"
            )
        for value in self.x_ticks:
            if self._x[0] <= value <= self._x[1]:
                parts.append(
                    f'<text x="{self.x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
                    f'text-anchor="middle">{number(value)}</text>'
                )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        )
        if y_label:
            height = (_TOP + _HEIGHT - _BOTTOM) / 2
            parts.append(
                f'<text transform="translate(12 {height}) rotate(-90)" '
                f'text-anchor="middle">{escape(y_label)}</text>'
            )
        return "".join(parts)

    def rule(self, value: float, name: str) -> str:
        x = self.x(value)
        anchor, place = ("end", x - 5) if x > _WIDTH / 2 else ("start", x + 5)
        return (
            f'<path class="rule" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
            f'<text class="strong" x="{place:.1f}" y="{_TOP + 10}" text-anchor="{anchor}">'
            f"{escape(name)}</text>"
        )


def _draw(plot: _Plot, line: Series, number_: int, steps: bool) -> str:
    color = f"c{number_ % NUM_COLORS}"
    places = [(plot.x(x), plot.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    if steps:
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
        path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    else:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = _DASHES[number_ % len(_DASHES)]
    drawn = f'<path class="line s{color}" stroke-dasharray="{dash}" d="{path}"/>'
    if steps or len(places) > _MARKERS_UP_TO:
        return drawn
    marks = "".join(
        f'<path class="f{color}" d="{marker_path(number_, x, y, 3)}">'
        f"<title>{escape(line.name)}: {number(value)} at {number(at)}</title></path>"
        for (x, y), at, value in zip(places, line.x, line.y, strict=True)
    )
    return drawn + marks


def _legend(lines: Sequence[Series]) -> str:
    entries = "".join(
        '<li><svg viewBox="0 0 30 12" aria-hidden="true">'
        f'<path class="line sc{i % NUM_COLORS}" '
        f'stroke-dasharray="{_DASHES[i % len(_DASHES)]}" d="M0 6H30"/>'
        f'<path class="fc{i % NUM_COLORS}" d="{marker_path(i, 15, 6, 3)}"/></svg>'
        f"{escape(line.name)}</li>"
        for i, line in enumerate(lines)
    )
    return f'<ul class="legend">{entries}</ul>'


def _table(lines: Sequence[Series], x_label: str) -> str:
    """Write the figures; of long lines evenly spaced ones, the last among them."""
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
    return (
        f"<details><summary>Table{note}</summary>"
        f"{table([x_label, *(line.name for line in lines)], rows)}</details>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, first: bool = True) -> str:
    """Write a table that scrolls by itself where it is wide.

    Args:
        head: Headings of the columns, plain text.
        rows: Cells, plain text.
        first: Whether the first cell of a row is its heading.

    Returns:
        HTML.
    """
    heading = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = []
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if first and row:
            cells[0] = f'<th scope="row">{escape(row[0])}</th>'
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(head[0])}, table"><table><thead><tr>{heading}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round numbers for an axis.

    Args:
        low: Smallest value shown.
        high: Largest value shown.
        count: About how many.

    Returns:
        Rising multiples of 1, 2 or 5 times a power of ten, which enclose both values.

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
    """Write a number as short as it reads well.

    Args:
        value: Any number.

    Returns:
        At most four digits that count, without needless zeros.

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
