"""Line charts as SVG that stands in a page: axes, ticks, intervals, lines across, and what every point says.

Nothing is coloured here: classes `s0` to `s7` (a series), `dash0` to `dash5`, `level`, `grid` and the like are given
their colours by the page's style sheet, which knows light, dark and paper. Every point is a circle with a `<title>`, so
that its values are shown on hovering even where no script runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from igpt_cli.report.page_html import text

#: The drawing in its own units, and where the axes lie in it.
WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 44, 62
COLOURS, DASHES = 8, 4


@dataclass(frozen=True)
class Line:
    """A series.

    Attributes:
        name: for the legend.
        points: (x, y), x rising.
        says: what each point says on hovering.
        band: (low, high) of each point, or nothing.
        series: its number: the colour, and the dashes when the colours come again; None for the grey of what is beside
            the point.
        dots: the points are drawn, not only found by hovering.
        joined: a line goes through them.
    """

    name: str
    points: Sequence[tuple[float, float]]
    says: Sequence[str]
    band: Sequence[tuple[float, float]] = ()
    series: int | None = 0
    dots: bool = False
    joined: bool = True
    dash: int = 0

    @property
    def classes(self) -> str:
        """Those of the style sheet: colour and dashes."""
        if self.series is None:
            return f"faint dash{self.dash % DASHES}"
        return f"s{self.series % COLOURS} dash{(self.series // COLOURS + self.dash) % DASHES}"


@dataclass(frozen=True)
class Level:
    """A value that goes across the whole chart, such as what guessing reaches."""

    name: str
    y: float
    series: int | None = None


def line_chart(
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    x_label: str,
    y_label: str,
    label: str,
    from_zero: bool = False,
    whole_x: bool = False,
) -> str:
    """An `<svg>` element and its legend, a list.

    Args:
        lines: at least one point in all.
        label: what the chart shows, in a sentence, for those who do not see it.
        from_zero: the y axis begins at 0.
        whole_x: ticks of the x axis are whole numbers.

    >>> line_chart([Line("a", [(0, 1), (1, 2)], ["one", "two"])], x_label="x", y_label="y", label="two points")[:25]
    '<svg class="chart" viewBox'
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [level.y for level in levels]
    ys += [y for line in lines for pair in line.band for y in pair]
    x_ticks = ticks(min(xs), max(xs), 7, whole_x)
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys), 6)
    x0, x1 = _around(min(xs), max(xs))
    y0, y1 = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    y0, y1 = (y0, y1) if y1 > y0 else _around(y0, y1)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for y in y_ticks:
        _, v = at(x0, y)
        parts.append(f'<path class="grid" d="M{LEFT} {v:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{v + 4:.1f}" text-anchor="end">{_told(y, y_ticks)}</text>')
    for x in x_ticks:
        u, _ = at(x, y0)
        if LEFT - 0.5 <= u <= WIDTH - RIGHT + 0.5:
            below = HEIGHT - BOTTOM
            parts.append(f'<path class="axis" d="M{u:.1f} {below}v5"/>')
            place = f'x="{u:.1f}" y="{below + 22}" text-anchor="middle"'
            parts.append(f'<text class="tick" {place}>{_told(x, x_ticks)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{text(x_label)}</text>')
    parts.append(f'<text class="name" x="4" y="20">{text(y_label)}</text>')
    for i, level in enumerate(levels):
        _, v = at(x0, level.y)
        parts.append(f'<path class="level {_level_classes(level, i)}" d="M{LEFT} {v:.1f}H{WIDTH - RIGHT}"/>')
    for line in lines:
        parts += _drawn(line, [at(*point) for point in line.points], at)
    for i, level in enumerate(levels):  # above the lines, so that they can be pointed at
        u, v = at(x1, level.y)
        parts.append(_dot(u, v, level.name, f"point {_level_classes(level, i)}"))
    keys = [_key(line.classes, line.name, line.dots, line.joined) for line in lines]
    keys += [_key(f"level {_level_classes(level, i)}", level.name) for i, level in enumerate(levels)]
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{text(label)}"'
    return f'<svg class="chart" {box}>{"".join(parts)}</svg>\n<ul class="legend">{"".join(keys)}</ul>'


def _drawn(line: Line, places: list[tuple[float, float]], at) -> list[str]:
    """A series: its interval, its line, its points."""
    parts = []
    if line.band:
        low = [at(x, bounds[0]) for (x, _), bounds in zip(line.points, line.band)]
        high = [at(x, bounds[1]) for (x, _), bounds in zip(line.points, line.band)]
        if len(places) > 1:
            parts.append(f'<path class="band {line.classes}" d="{_path([*low, *reversed(high)])}Z"/>')
        else:  # a point has no area
            parts.append(f'<path class="line {line.classes}" d="{_path([low[0], high[0]])}"/>')
    if line.joined and len(places) > 1:
        parts.append(f'<path class="line {line.classes}" d="{_path(places)}"/>')
    shown = "dot" if line.dots or len(places) == 1 else "point"
    size = 4 if line.joined else 5.5
    parts += [_dot(*place, says, f"{shown} {line.classes}", size) for place, says in zip(places, line.says)]
    return [f"<g>{''.join(parts)}</g>"]


def _dot(u: float, v: float, says: str, classes: str, size: float = 4) -> str:
    return f'<circle class="{classes}" cx="{u:.1f}" cy="{v:.1f}" r="{size:g}"><title>{text(says)}</title></circle>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{u:.1f} {v:.1f}" for u, v in places)


def _level_classes(level: Level, i: int) -> str:
    dashes = f"dash{1 + i % 5}"
    return dashes if level.series is None else f"s{level.series % COLOURS} {dashes}"


def _key(classes: str, name: str, dots: bool = False, joined: bool = True) -> str:
    """An entry of the legend: a bit of the line, and the name."""
    line = f'<path class="line {classes}" d="M1 7H33"/>' if joined else ""
    dot = f'<circle class="dot {classes}" cx="17" cy="7" r="4"/>' if dots else ""
    return f'<li><svg class="key" viewBox="0 0 34 14" aria-hidden="true">{line}{dot}</svg>{text(name)}</li>'


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers from about `low` to about `high`, about `most` of them, 1, 2, 2.5 or 5 times a power of 10 apart.

    >>> ticks(0, 24, 7, whole=True), ticks(2.31, 6.24, 6)
    ([0, 5, 10, 15, 20, 25], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    """
    low, high = (low, high) if high > low else _around(low, high)
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [i * step if whole else round(i * step, digits) for i in range(first, last + 1)]


def _around(low: float, high: float) -> tuple[float, float]:
    """An interval that is not empty."""
    return (low, high) if high > low else (low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5))


def _told(value: float, among: Sequence[float]) -> str:
    """A tick's number, all of an axis with the same decimals."""
    decimals = max(len(f"{v:.6f}".rstrip("0").partition(".")[2]) for v in among)
    return f"{value:,.{decimals}f}"
