"""The panels of a sweep, as data: success against steps, differences to the best, success against latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from policy.common.panel import STYLES, Line, Panel, Point, Scale, linear_scale, log_scale
from policy.sweep.rows import Row, has_recipes, is_control, stopped_early, varying

# Where the axis of success may begin and end, in percent: at the nearest ones around all intervals.
BOTTOMS, TOPS = (95, 90, 80, 70, 60, 50, 0), (5, 10, 20, 30, 40, 50, 100)
# The axis of differences reaches at most this many margins below the best cell and one above it, because cells further
# down are out of the question.
MARGINS_BELOW = 4
# Of series over the same steps, each is this share of the axis beside the one before.
APART = 0.012
SUCCESS = ("success_rate", "success_low", "success_high")
DIFFERENCE = ("difference", "difference_low", "difference_high")
LATENCY = "latency_ms_median"
# The rows of each series by the series' name.
Series = dict[str, list[Row]]


@dataclass(frozen=True, kw_only=True)
class Facet:
    """Series that are drawn together.

    Attributes:
        name: the settings that they share and others do not; empty if there is one facet only.
        panels: from left to right; all have the same series.
    """

    name: str
    panels: Sequence[Panel]

    @property
    def legend(self) -> Sequence[Line]:
        """The series that need names: none if there is one only."""
        lines = self.panels[0].lines
        return lines if len(lines) > 1 else ()


def facets_of(rows: Sequence[Row], *, margin: float | None, chosen: int | None = None) -> list[Facet]:
    """Lay out the rows as panels; more than eight series are spread over several facets with the same axes.

    Args:
        rows: the cells' rows. Without latencies, their panel is left out.
        margin: the difference of success rates from which a cell counts as worse; without one, the panel of the
            differences to the best cell is left out, which the rows may then lack.
        chosen: index of the recommended row, which gets a ring; or None.

    Returns:
        The facets, one or more.
    """
    recommended = None if chosen is None else rows[chosen]
    empty = _empty_panels(rows, margin)
    early = {id(row) for row, is_early in zip(rows, stopped_early(rows), strict=True) if is_early}
    return [
        Facet(
            name=name,
            panels=[
                replace(panel, lines=_lines(panel, series, x_key, keys, early, recommended))
                for panel, x_key, keys in empty
            ],
        )
        for name, series in _facets(rows).items()
    ]


def marks_of(rows: Sequence[Row], chosen: int | None) -> str:
    """What the marks of the pictures mean, in sentences; empty if there are none."""
    ring = "The ring is around the recommended cell." if chosen is not None else ""
    early = any(stopped_early(rows))
    hollow = "Hollow: stopped at an earlier look, after the number of episodes beside it." if early else ""
    level = "A line across: a policy that takes a fixed number of calls, one for regression and two for mip."
    return " ".join(filter(None, (ring, hollow, level if any(map(is_control, rows)) else "")))


def _series(rows: Sequence[Row], axes: Sequence[str]) -> Series:
    """Group rows by their settings on these axes."""
    series: Series = {}
    for row in rows:
        series.setdefault(", ".join(f"{axis} {row.get(axis)}" for axis in axes), []).append(row)
    return series


def _facets(rows: Sequence[Row]) -> dict[str, Series]:
    """Spread the series over facets of eight or fewer: by their first axes if that is enough, else in their order."""
    axes = varying(rows)
    for count in range(len(axes)):
        facets = {name: _series(members, axes[count:]) for name, members in _series(rows, axes[:count]).items()}
        if all(len(series) <= STYLES for series in facets.values()):
            return facets
    series = [*_series(rows, axes).items()]
    if not axes:
        return {"": dict(series)}
    starts = range(0, len(series), STYLES)
    return {f"series {n + 1} to {min(n + STYLES, len(series))}": dict(series[n : n + STYLES]) for n in starts}


def _lines(
    panel: Panel, series: Series, x_key: str, keys: Sequence[str], early: set[int], recommended: Row | None
) -> list[Line]:
    lines = []
    for style, (name, rows) in enumerate(series.items()):
        apart = APART * (style - (len(series) - 1) / 2) if x_key == "ddim_steps" else 0.0
        factor = (panel.x.high / panel.x.low) ** apart
        points = []
        for row in sorted(rows, key=lambda row: row[x_key]):
            y, low, high = (100 * row[key] for key in keys)
            stop = f"{row['stopped']:,}" if id(row) in early else ""
            note = stop if panel.y.low <= y <= panel.y.high else f"{y:+.0f}"
            points.append(
                Point(
                    x=row[x_key] * factor,
                    y=y,
                    low=low,
                    high=high,
                    note=note,
                    hollow=bool(stop),
                    ringed=row is recommended,
                )
            )
        level = x_key == "ddim_steps" and all(map(is_control, rows))
        lines.append(Line(name=name or "success", points=points, style=style, level=level))
    return lines


def _empty_panels(rows: Sequence[Row], margin: float | None) -> list[tuple[Panel, str, Sequence[str]]]:
    """The panels without their lines, each with the columns of its x and of its y with the interval."""
    steps = sorted({row["ddim_steps"] for row in rows})
    by_steps = log_scale(steps, ticks=steps, name="ddim_steps")
    rate = _success_scale(rows)
    note = f"95 % {'' if has_recipes(rows) else 'Wilson '}intervals; {_extent(rate)}"
    panels: list[tuple[Panel, str, Sequence[str]]] = [
        (Panel(title="Success (%) against ddim_steps", note=note, x=by_steps, y=rate), "ddim_steps", SUCCESS)
    ]
    if margin is not None:
        panels.append((_difference_panel(rows, by_steps, margin), "ddim_steps", DIFFERENCE))
    if all(LATENCY in row for row in rows):
        threads = sorted({row.get("latency_threads") or 1 for row in rows})
        counted = "one thread" if threads == [1] else f"threads: {', '.join(map(str, threads))}"
        by_latency = log_scale([row[LATENCY] for row in rows], name=f"ms a chunk (batch 1, {counted})")
        panels.append((Panel(title="Success (%) against latency", note=note, x=by_latency, y=rate), LATENCY, SUCCESS))
    return panels


def _difference_panel(rows: Sequence[Row], by_steps: Scale, margin: float) -> Panel:
    points = 100 * margin
    lows, highs = ([100 * row[key] for row in rows] for key in DIFFERENCE[1:])
    low = max(-MARGINS_BELOW * points, min(-1.2 * points, *lows))
    scale = linear_scale(math.floor(low), math.ceil(min(MARGINS_BELOW * points, max(0.4 * points, *highs))))
    beyond = "; ▼ lies below it" if any(100 * row["difference"] < scale.low for row in rows) else ""
    return Panel(
        title="Difference to the best (points of success)",
        note=f"{'' if has_recipes(rows) else 'simultaneous '}95 % intervals; {_extent(scale)}{beyond}",
        x=by_steps,
        y=scale,
        levels=[(0, "the best"), (-points, f"worse by {points:g}")],
    )


def _success_scale(rows: Sequence[Row]) -> Scale:
    """Success in percent, over the range in which all intervals lie."""
    low, high = 100 * min(row["success_low"] for row in rows), 100 * max(row["success_high"] for row in rows)
    bottom = next(end for end in BOTTOMS if end <= low)
    top = 100 if bottom else next(end for end in TOPS if end >= high)
    return linear_scale(bottom, top)


def _extent(scale: Scale) -> str:
    return f"axis from {scale.low:.3g} to {scale.high:.3g}"
