"""The plots of a sweep: success against `ddim_steps`, and against the latency of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.common.drawing import drawing
from policy.common.terminal import printable
from policy.sweep.grid import Row, varying

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tick labels: the greatest number of lines, their spacing in font sizes, the least gap within a line in label heights.
LINES, SPACING, GAP = 6, 1.2, 0.4


def plot_rows(rows: Sequence[Row], files: Sequence[Path], title: str, paired: bool = True) -> None:
    """Draw both plots under a title and save them.

    Args:
        rows: the cells' rows.
        files: each receives the same figure, in the format of its suffix.
        title: says what was swept.
        paired: whether all cells ran the same episodes.
    """
    compared = "the same" if paired else "others"
    with drawing():
        figure = draw_rows(rows)
        figure.suptitle(printable(f"{title}: {rows[0]['episodes']} episodes per point, {compared} in each"))
        for file in files:
            figure.savefig(file, dpi=150)


def draw_rows(rows: Sequence[Row]) -> Figure:
    """Draw both plots side by side, with confidence intervals and without a title.

    Args:
        rows: the cells' rows.

    Returns:
        The figure.
    """
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    series = _series(rows)
    for axes, key, label in (
        (left, "ddim_steps", "ddim_steps"),
        (right, "latency_ms_median", "ms a chunk (batch 1, one thread), at each ddim_steps"),
    ):
        for name, members in series.items():
            _draw(axes, key, name, members, alone=len(series) == 1)
        axes.set_xscale("log", base=2 if key == "ddim_steps" else 10)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(x=0.1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    latencies = [row["latency_ms_median"] for row in rows]
    wide = max(latencies) > 300 * min(latencies)
    right.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    left.set_xticks(sorted({row["ddim_steps"] for row in rows}))
    left.set_ylim(-3, 103)
    left.set_ylabel("success (%), 95 % interval")
    left.legend(loc="lower right", fontsize="small" if len(series) > 1 else "medium")
    _stagger(left)
    return figure


def _stagger(axes: Any) -> None:
    """Move each tick label of the x axis that would touch another to a lower line, or hide it if no line has room."""
    axes.figure.draw_without_rendering()  # places the labels
    ends: list[float] = []  # where the last label of each line ends
    for tick in axes.xaxis.get_major_ticks():
        box = tick.label1.get_window_extent()
        line = next((number for number, end in enumerate(ends) if box.x0 > end), len(ends))
        if line == LINES:
            tick.label1.set_visible(False)
            continue
        ends[line : line + 1] = [box.x1 + GAP * box.height]
        tick.set_pad(tick.get_pad() + line * SPACING * tick.label1.get_size())


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows that differ in `ddim_steps` only, by the settings in which a group differs from the others."""
    axes = varying(rows)
    series: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["ddim_steps"]):
        series.setdefault(", ".join(f"{axis} {row[axis]}" for axis in axes), []).append(row)
    return series


def _draw(axes: Any, key: str, name: str, rows: Sequence[Row], *, alone: bool) -> None:
    """Draw one series over `key`; if it is the only one, there is room for its mean score and labels too."""
    success = [100 * row["success_rate"] for row in rows]
    below = [s - 100 * row["success_low"] for s, row in zip(success, rows, strict=True)]
    above = [100 * row["success_high"] - s for s, row in zip(success, rows, strict=True)]
    x = [row[key] for row in rows]
    axes.errorbar(x, success, yerr=[below, above], fmt="o-", capsize=4, label=printable(name) or "success")
    if alone:
        scores = [100 * row["score_mean"] for row in rows]
        axes.plot(x, scores, "s--", color="0.6", ms=4, lw=1, label="mean score x 100")
    if key == "latency_ms_median" and alone:
        for row, at, height in zip(rows, x, success, strict=True):
            axes.annotate(str(row["ddim_steps"]), (at, height), textcoords="offset points", xytext=(6, -12))
