"""The pictures of a sweep as files: its panels, drawn by Matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.common.drawing import drawing
from policy.common.panel import DASHES, LIGHT, MARKERS, Line, Panel
from policy.common.terminal import printable
from policy.sweep.panels import facets_of, marks_of
from policy.sweep.rows import Row, count_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tick labels: the greatest number of lines, their spacing in font sizes, the least gap within a line in label heights.
LINES, SPACING, GAP = 6, 1.2, 0.4
# The size of a panel in inches, and characters in a line of its head and of the legend.
PANEL, HEAD, LEGEND = (4.4, 3.7), 52, 60


def plot_rows(
    rows: Sequence[Row],
    files: Sequence[Path],
    *,
    title: str,
    paired: bool = True,
    margin: float | None,
    chosen: int | None = None,
) -> None:
    """Draw the panels under a title and save them.

    Args:
        rows: the cells' rows.
        files: each receives the same figure, in the format of its suffix.
        title: says what was swept.
        paired: whether all cells ran the same episodes.
        margin: see `facets_of`.
        chosen: index of the recommended row, or None.
    """
    compared = "the same" if paired else "others"
    with drawing():
        figure = draw_rows(rows, margin=margin, chosen=chosen)
        head = f"{title}: {count_of(rows)} episodes per point, {compared} in each. {marks_of(rows, chosen)}"
        figure.suptitle(printable(head.strip()), fontsize="medium")
        for file in files:
            figure.savefig(file, dpi=150)


def draw_rows(rows: Sequence[Row], *, margin: float | None, chosen: int | None = None) -> Figure:
    """Draw the panels side by side, and facets below each other, without a title.

    Args:
        rows: the cells' rows.
        margin: see `facets_of`.
        chosen: index of the recommended row, or None.

    Returns:
        The figure.
    """
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    facets = facets_of(rows, margin=margin, chosen=chosen)
    columns = len(facets[0].panels)
    width, height = PANEL
    figure = Figure(figsize=(width * columns, height * len(facets)), layout="constrained")
    FigureCanvasAgg(figure)
    for facet, line in zip(facets, figure.subplots(len(facets), columns, squeeze=False), strict=True):
        for axes, panel in zip(line, facet.panels, strict=True):
            _draw(axes, panel)
        if facet.name:
            line[0].set_ylabel(_wrapped(facet.name, HEAD))
        if facet.legend:
            line[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", handlelength=3)
    figure.draw_without_rendering()  # places the labels
    for axes in figure.axes:
        _stagger(axes)
        _part_notes(axes)
    return figure


def _draw(axes: Any, panel: Panel) -> None:
    for at, name in panel.levels:
        axes.axhline(at, color="0.5", ls=":", lw=1)
        axes.annotate(name, (0, at), (3, 3), xycoords=("axes fraction", "data"), **_SMALL)
    for line in panel.lines:
        _draw_line(axes, panel, line)
    axes.set_xscale("log")
    axes.minorticks_off()
    for axis, scale in ((axes.xaxis, panel.x), (axes.yaxis, panel.y)):
        axis.set_ticks(*zip(*scale.ticks, strict=True))
    axes.set_xlim(panel.x.low, panel.x.high)
    room = 0.03 * (panel.y.high - panel.y.low)
    axes.set_ylim(panel.y.low - room, panel.y.high + room)
    axes.set_xlabel(panel.x.name)
    axes.set_title(f"{panel.title}\n{_wrapped(panel.note, HEAD)}", fontsize="small")
    axes.grid(alpha=0.3)


_SMALL = {"textcoords": "offset points", "fontsize": "x-small", "color": "0.35"}


def _draw_line(axes: Any, panel: Panel, line: Line) -> None:
    colour, marker = LIGHT[line.style], [*MARKERS][line.style]
    heights = [min(max(point.y, panel.y.low), panel.y.high) for point in line.points]
    along = [panel.x.low, panel.x.high] if line.level else [point.x for point in line.points]
    axes.plot(
        along,
        heights * 2 if line.level else heights,
        color=colour,
        dashes=DASHES[line.style],
        marker=marker,
        ms=0,
        lw=1.5,
    )
    within = [point for point, height in zip(line.points, heights, strict=True) if point.y == height]
    ends = [[point.y - point.low for point in within], [point.high - point.y for point in within]]
    axes.errorbar([p.x for p in within], [p.y for p in within], yerr=ends, color=colour, capsize=3, lw=1, ls="")
    for point, height in zip(line.points, heights, strict=True):
        shape = marker if point.y == height else "$▼$" if point.y < height else "$▲$"
        face = "white" if point.hollow else colour
        axes.plot([point.x], [height], color=colour, marker=shape, mfc=face, ms=6, zorder=3)
        if point.ringed:
            axes.plot([point.x], [height], color="black", marker="o", mfc="none", ms=13, ls="", zorder=4)
        if point.note:
            side = 1 if panel.x.place(point.x) < 0.8 else -1
            place = (6 * side, -11 if point.y == height else 6)
            axes.annotate(point.note, (point.x, height), place, ha="left" if side > 0 else "right", **_SMALL)
    axes.plot([], [], color=colour, dashes=DASHES[line.style], marker=marker, label=_wrapped(line.name, LEGEND))


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(printable(text), width)


def _stagger(axes: Any) -> None:
    """Move each tick label of the x axis that would touch another to a lower line, or hide it if no line has room."""
    ends: list[float] = []  # where the last label of each line ends
    for tick in axes.xaxis.get_major_ticks():
        box = tick.label1.get_window_extent()
        line = next((number for number, end in enumerate(ends) if box.x0 > end), len(ends))
        if line == LINES:
            tick.label1.set_visible(False)
            continue
        ends[line : line + 1] = [box.x1 + GAP * box.height]
        tick.set_pad(tick.get_pad() + line * SPACING * tick.label1.get_size())


def _part_notes(axes: Any) -> None:
    """Move each note up until it touches none before it, as those of several points below the axis would."""
    placed: list[Any] = []
    for note in axes.texts:
        box = note.get_window_extent()
        while any(box.overlaps(other) for other in placed):
            x, y = note.xyann
            note.xyann = (x, y + note.get_size())
            box = note.get_window_extent()
        placed.append(box)
