"""Line charts: positions of lines, intervals and ticks, for templates/parts.html.

Nothing is coloured here: classes `s0` to `s7` (a series), `dash0` to `dash5`, `level`, `grid` and the like are given
their colours by the page's style sheet, which knows light, dark and paper. Every point is a circle with a `<title>`, so
that its values are shown on hovering even where no script runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]
COLOURS, DASHES = 8, 4


@dataclass(frozen=True)
class Line:
    """A series.

    Attributes:
        name: for the legend.
        points: (x, y), x rising.
        says: what each point says on hovering.
        band: (low, high) of each point, or nothing.
        series: its number: the colour, and the dashes when the colours come again; None for the grey of a
            comparison.
        dots: the points are drawn, not only found by hovering.
        joined: a line goes through them.
    """

    name: str
    points: Sequence[Point]
    says: Sequence[str]
    band: Sequence[Point] = ()
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

    @property
    def outline(self) -> list[Point]:
        """The corners of its interval, low ones first."""
        low, high = ([(x, bounds[k]) for (x, _), bounds in zip(self.points, self.band)] for k in (0, 1))
        return [*low, *reversed(high)]


@dataclass(frozen=True)
class Level:
    """A value that goes across the whole chart, such as what guessing reaches."""

    name: str
    y: float
    series: int | None = None

    def classes(self, i: int) -> str:
        """Those of the style sheet, for the level of this number."""
        return f"dash{1 + i % 5}" if self.series is None else f"s{self.series % COLOURS} dash{1 + i % 5}"


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes.

    Attributes:
        lines: at least one point in all.
        label: what the chart shows, in a sentence, for those who do not see it.
        from_zero: the y axis begins at 0.
        whole_x: ticks of the x axis are whole numbers.
    """

    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    x_label: str = ""
    y_label: str = ""
    label: str = ""
    from_zero: bool = False
    whole_x: bool = False

    # The drawing in its own units, and where the axes lie in it.
    width, height = 720, 380
    left, right, top, bottom = 62, 700, 44, 318

    @cached_property
    def _ys(self) -> list[float]:
        ys = [y for line in self.lines for _, y in line.points] + [level.y for level in self.levels]
        return ys + [y for line in self.lines for pair in line.band for y in pair]

    @cached_property
    def _x_range(self) -> Point:
        xs = [x for line in self.lines for x, _ in line.points]
        return _around(min(xs), max(xs))

    @cached_property
    def _y_ticks(self) -> list[float]:
        return ticks(min(0.0, *self._ys) if self.from_zero else min(self._ys), max(self._ys), 6)

    @cached_property
    def _y_range(self) -> Point:
        return _around(min(self._y_ticks[0], *self._ys), max(self._y_ticks[-1], *self._ys))

    def u(self, x: float) -> str:
        """Where a value of x lies, from the left."""
        low, high = self._x_range
        return f"{self.left + (x - low) / (high - low) * (self.right - self.left):.1f}"

    def v(self, y: float) -> str:
        """Where a value of y lies, from the top."""
        low, high = self._y_range
        return f"{self.bottom - (y - low) / (high - low) * (self.bottom - self.top):.1f}"

    def path(self, points: Iterable[Point]) -> str:
        """A line through points."""
        return "M" + "L".join(f"{self.u(x)} {self.v(y)}" for x, y in points)

    @property
    def x_ticks(self) -> list[tuple[str, str]]:
        """(place, number) of the ticks within the axis."""
        found = ticks(*self._x_range, 7, self.whole_x)
        shown = [(self.u(x), _tick_text(x, found)) for x in found]
        return [(u, text) for u, text in shown if self.left - 0.5 <= float(u) <= self.right + 0.5]

    @property
    def y_ticks(self) -> list[tuple[str, str]]:
        """(place, number)."""
        return [(self.v(y), _tick_text(y, self._y_ticks)) for y in self._y_ticks]


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers from about `low` to about `high`, about `most` of them, 1, 2, 2.5 or 5 times a power of 10 apart.

    >>> ticks(0, 24, 7, whole=True), ticks(2.31, 6.24, 6)
    ([0.0, 5.0, 10.0, 15.0, 20.0, 25.0], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    """
    locator = MaxNLocator(most - 1, steps=(1, 2, 2.5, 5, 10), integer=whole, min_n_ticks=1)
    return [float(tick) for tick in locator.tick_values(*_around(low, high))]


def _around(low: float, high: float) -> Point:
    """An interval that is not empty."""
    return (low, high) if high > low else (low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5))


def _tick_text(value: float, among: Sequence[float]) -> str:
    """A tick's number, all of an axis with the same decimals."""
    decimals = max(len(f"{v:.6f}".rstrip("0").partition(".")[2]) for v in among)
    return f"{value:,.{decimals}f}"
