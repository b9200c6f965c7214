"""Panels: what a chart shows, as data, and the scales on which it lies. A page draws them, and so does Matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The size of a panel on a page and the room around its axes, in pixels of a page that is as wide as a telephone.
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 12, 42
# The width of a character of a tick label.
CHARACTER = 7
# Of a longer line, the lowest and the highest point of each of half as many stretches are drawn.
MOST_POINTS = 400
# Eight colours that people with any kind of colour vision can tell apart, on white and on the page's dark background;
# a style has a marker and dashes of its own besides.
LIGHT = ("#0072b2", "#f2460d", "#41174f", "#993df5", "#910808", "#d16161", "#080891", "#772237")
DARK = ("#6cb2f7", "#f5c73d", "#bbbbbb", "#c639a3", "#b5fa9e", "#916f08", "#993df5", "#22774c")
STYLES = len(LIGHT)
DASHES = ((), (6, 3), (2, 3), (8, 3, 2, 3), (), (6, 3), (2, 3), (8, 3, 2, 3))
# By style, a marker as Matplotlib calls it, and as an SVG path around its centre.
MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-4-4h8v8h-8z",
    "^": "M0-5l5 9h-10z",
    "D": "M0-5.5l5 5.5l-5 5.5l-5-5.5z",
    "v": "M0 5l5-9h-10z",
    "P": "M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M-5-3l2-2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3z",
    "p": "M0-5l5 4l-2 6h-6l-2-6z",
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis: the range that is shown, and its tick labels.

    Attributes:
        low: the least value.
        high: the greatest value.
        ticks: values and their labels.
        log: whether equal distances are equal factors.
        name: what the values are.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False
    name: str = ""

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1; values beyond an end lie at it."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point with its interval.

    Attributes:
        x: its place along.
        y: its height.
        low: the lower end of its interval.
        high: the upper end of its interval.
        note: stands beside it.
        hollow: whether it is an outline only.
        ringed: whether a ring is around it.
    """

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    note: str = ""
    hollow: bool = False
    ringed: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one kind.

    Attributes:
        name: stands in the legend.
        points: from left to right.
        style: number of its colour, marker and dashes.
        marked: whether its points are marked, or only joined.
        level: whether it goes across the panel, at the height of its only point.
    """

    name: str
    points: Sequence[Point]
    style: int = 0
    marked: bool = True
    level: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart.

    Attributes:
        title: what it shows.
        note: how to read it: what its intervals are, and which range its axis has.
        x: the horizontal axis.
        y: the vertical axis.
        lines: what is drawn.
        levels: heights at which a line goes across, with a name.
        places: values of x at which a line goes up, with a name.
    """

    title: str
    note: str
    x: Scale
    y: Scale
    lines: Sequence[Line] = ()
    levels: Sequence[tuple[float, str]] = ()
    places: Sequence[tuple[float, str]] = ()


def linear_scale(low: float, high: float, *, name: str = "") -> Scale:
    """A scale with three to seven round ticks; one without extent is widened.

    >>> [label for _, label in linear_scale(0, 12_000).ticks]
    ['0', '2,000', '4,000', '6,000', '8,000', '10,000', '12,000']
    """
    if not low < high:
        low, high = low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    # Adding zero makes -0.0 zero.
    ticks = [(step * number, _tick_text(round(step * number, 12) + 0.0)) for number in numbers]
    return Scale(low=low, high=high, ticks=ticks, name=name)


def log_scale(values: Iterable[float], *, name: str = "", ticks: Sequence[float] = ()) -> Scale:
    """A logarithmic scale around positive values, with ticks at those given or at round numbers.

    >>> [label for _, label in log_scale([0.02, 0.9]).ticks]
    ['0.02', '0.05', '0.1', '0.2', '0.5', '1']
    """
    shown = [value for value in values if 0 < value < math.inf] or [1.0]
    room = max(1.1, (max(shown) / min(shown)) ** 0.06)
    low, high = min(shown) / room, max(shown) * room
    if not ticks:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if high < 300 * low else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        ticks = inside if len(inside) > 1 else [float(f"{value:.3g}") for value in sorted({min(shown), max(shown)})]
    return Scale(low=low, high=high, ticks=[(tick, _tick_text(tick)) for tick in ticks], log=True, name=name)


def _tick_text(value: float) -> str:
    """A tick's number, of up to six digits, or whole: never 1e+06.

    >>> _tick_text(0.05), _tick_text(2_500.0), _tick_text(1_250_000.0)
    ('0.05', '2,500', '1,250,000')
    """
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:,.6g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` of the points, with every extreme among them, in their order."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = itertools.pairwise(round(n * len(points) / (MOST_POINTS // 2)) for n in range(MOST_POINTS // 2 + 1))
    numbers: set[int] = set()
    for start, end in stretches:
        heights = {number: points[number].y for number in range(start, end)}
        numbers |= {min(heights, key=heights.__getitem__), max(heights, key=heights.__getitem__)}
    return [points[number] for number in sorted(numbers)]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A panel on a page: where its parts lie, in pixels.

    Attributes:
        panel: the panel.
    """

    panel: Panel
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    top: int = TOP
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        """The distance of a value from the left edge."""
        return round(self.left + self.panel.x.place(value) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """The distance of a value from the upper edge."""
        return round(self.bottom - self.panel.y.place(value) * (self.bottom - self.top), 1)

    def beyond(self, point: Point) -> str:
        """An arrow for a point that lies beyond the axis, or an empty string."""
        return "▼" if point.y < self.panel.y.low else "▲" if point.y > self.panel.y.high else ""

    def path(self, line: Line) -> str:
        """The line through its points, or across at the height of the only one, as an SVG path."""
        if line.level:
            return f"M{self.left} {self.y(line.points[0].y)}H{self.right}"
        return "M" + "L".join(f"{self.x(point.x)} {self.y(point.y)}" for point in line.points)

    def labels(self) -> list[tuple[float, str]]:
        """The labels of the x axis that have room, the last one before others, and where they stand."""
        kept: list[tuple[float, str]] = []
        edge = float(self.width)
        for value, label in sorted(self.panel.x.ticks, reverse=True):
            half = CHARACTER * len(label) / 2
            at = min(self.x(value), self.width - half)
            if at + half <= edge:
                kept.append((at, label))
                edge = at - half - CHARACTER / 2
        return kept[::-1]
