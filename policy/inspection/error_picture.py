"""The errors of a policy's chunks against the distance to its training observations: in words, and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policy.common.drawing import drawing

# The windows are drawn in so many groups by distance.
GROUPS = 6

Array = NDArray[np.float64]


def describe_by_distance(distances: Array, errors: Array) -> str:
    """Compare the held-out windows that are nearest to training observations with those that are farthest, in words.

    Args:
        distances: (N,) of each window to the nearest training observation.
        errors: (N,) root mean square error of its averaged chunk.

    Returns:
        One sentence.
    """
    order = np.argsort(distances, kind="stable")
    near, _, far = (_root_mean_square(errors[part]) for part in np.array_split(order, 3))
    return (
        f"by distance to the nearest training observation: the nearest third of the held-out windows is {near:.2g}"
        f" standard deviations off, the farthest third {far:.2g}"
    )


def plot_errors(distances: Array, errors: Array, training_error: float, title: str, path: Path) -> None:
    """Draw the error of each held-out window against its distance to the nearest training observation.

    Args:
        distances: (N,) root mean square differences of the normalised observations.
        errors: (N,) root mean square error of each window's averaged chunk.
        training_error: the same over windows of training episodes, drawn as a line.
        title: what is shown.
        path: the PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = np.argsort(distances, kind="stable")
    with drawing():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.scatter(distances, errors, s=12, alpha=0.5, label="held-out windows")
        parts = [part for part in np.array_split(order, GROUPS) if len(part)]
        axes.plot(
            [np.median(distances[part]) for part in parts],
            [_root_mean_square(errors[part]) for part in parts],
            "o-",
            color="C1",
            label=f"their root mean square, by {GROUPS} groups of equal size",
        )
        axes.axhline(training_error, color="C2", ls="--", label="training windows, root mean square")
        axes.set(
            title=title,
            xlabel="distance to the nearest training observation (half ranges, root mean square)",
            ylabel="error of the averaged chunk (standard deviations)",
            xlim=(0, None),
            ylim=(0, None),
        )
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=100)


def _root_mean_square(errors: Array) -> float:
    return float(np.sqrt(np.square(errors).mean()))
