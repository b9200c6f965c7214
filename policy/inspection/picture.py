"""A few episodes of a dataset as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from policy.common.drawing import drawing
from policy.common.observations import is_image
from policy.common.terminal import printable
from policy.data.demonstrations import Demonstrations
from policy.inspection.figures import Inspection, KeyFigures, arrays_of, spread
from policy.inspection.text import seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LINES = 12
MAX_POINTS = 1000
FRAMES = 5


def plot_episodes(demonstrations: Demonstrations, inspection: Inspection, numbers: Sequence[int], path: Path) -> None:
    """Draw episodes side by side: frames of images, vectors over time, and the paths of two-dimensional vectors.

    Args:
        demonstrations: the episodes.
        inspection: the figures of these demonstrations.
        numbers: numbers of the episodes to draw.
        path: the PNG file to write.
    """
    with drawing():
        _figure(demonstrations, inspection, numbers).savefig(path, dpi=100)


def _figure(demonstrations: Demonstrations, inspection: Inspection, numbers: Sequence[int]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arrays = arrays_of(demonstrations)
    rows = [(draw, figures) for figures in inspection.keys for draw in _drawings(figures)]
    heights = [{_draw_frames: 0.9, _draw_lines: 1.7, _draw_path: 2.7}[draw] for draw, _ in rows]
    figure = Figure(figsize=(max(6.0, 1 + 3.4 * len(numbers)), 1.2 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(numbers), squeeze=False, gridspec_kw={"height_ratios": heights})
    for (draw, figures), line in zip(rows, grid, strict=True):
        for axes, number in zip(line, numbers, strict=True):
            start, end = demonstrations.episode_starts[number], demonstrations.episode_ends[number]
            draw(axes, figures, arrays[figures.key][start:end], inspection.rate_hz)
        if draw is not _draw_path:
            cut = f"\n(first {MAX_LINES} of {len(figures.dimensions)})" if len(figures.dimensions) > MAX_LINES else ""
            line[0].set_ylabel(printable(figures.key) + cut)
        if draw is _draw_lines and len(figures.dimensions) > 1:
            line[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), fontsize="x-small", handlelength=1)
    for axes, number in zip(grid[0], numbers, strict=True):
        length = demonstrations.episode_lengths[number]
        name = printable(demonstrations.episode_names[number])
        axes.set_title(f"episode {name} ({length} transitions)", fontsize="medium")
    figure.suptitle(
        f"{printable(demonstrations.name)}: {len(numbers)} of {inspection.episodes.count} episodes"
        "\nover time, each dimension is scaled by its range to [-1, 1], as a policy sees it",
        fontsize="medium",
    )
    return figure


def _drawings(figures: KeyFigures) -> list[Any]:
    if is_image(figures.shape):
        return [_draw_frames]
    return [_draw_lines, _draw_path] if len(figures.dimensions) == 2 else [_draw_lines]


def _draw_frames(axes: Axes, figures: KeyFigures, values: NDArray[Any], rate_hz: float | None) -> None:
    times = spread(len(values), FRAMES)
    strip = np.concatenate([values[time] for time in times], axis=1)
    axes.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=255)
    width = figures.shape[1]
    labels = [seconds(time / rate_hz) if rate_hz else str(time) for time in times]
    axes.set_xticks([(n + 0.5) * width for n in range(len(times))], labels, fontsize="small")
    axes.set_yticks([])


def _draw_lines(axes: Axes, figures: KeyFigures, values: NDArray[Any], rate_hz: float | None) -> None:
    times = np.arange(0, len(values), -(-len(values) // MAX_POINTS))
    for number, limits in enumerate(figures.dimensions[:MAX_LINES]):
        half_range = (limits.max - limits.min) / 2
        moves = number not in (*figures.constant, *figures.nearly_constant)
        scaled = (values[times, number] - (limits.max + limits.min) / 2) / half_range if moves else np.zeros(len(times))
        axes.plot(
            times / rate_hz if rate_hz else times,
            scaled,
            lw=1,
            label=str(number),
            color=f"C{number % 10}",
            ls="-" if number < 10 else "--",
        )
    axes.set_ylim(-1.1, 1.1)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize="small")
    axes.set_xlabel("seconds" if rate_hz else "control steps", fontsize="small")


def _draw_path(axes: Axes, figures: KeyFigures, values: NDArray[Any], rate_hz: float | None) -> None:
    times = np.arange(0, len(values), -(-len(values) // MAX_POINTS))
    x, y = values[times].T
    axes.plot(x, y, color="0.8", lw=1, zorder=1)
    axes.scatter(x, y, c=times, s=6, cmap="viridis")
    axes.plot(x[0], y[0], "o", mfc="none", mec="k", ms=8)
    extents = [limits.max - limits.min or 1.0 for limits in figures.dimensions]
    across, along = (
        (limits.min - 0.05 * extent, limits.max + 0.05 * extent)
        for limits, extent in zip(figures.dimensions, extents, strict=True)
    )
    axes.set(xlim=across, ylim=along)
    if max(extents) < 4 * min(extents):  # otherwise they are different quantities, and the path would be a thin line
        axes.set_aspect("equal")
    axes.tick_params(labelsize="small")
    axes.set_xlabel(f"{printable(figures.key)}[0], from the circle on", fontsize="small")
    axes.set_ylabel(f"{printable(figures.key)}[1]", fontsize="small")
