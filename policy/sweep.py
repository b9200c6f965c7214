"""The instrument: success against `ddim_steps`, with intervals and latency."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from policy.diffusion_policy import DiffusionPolicy
from policy.evaluation import EpisodeResult, chunk_latency, summarize
from policy.sampler import Sampler
from policy.workers import RolloutPool

Row = dict[str, Any]

COLUMNS = {
    "ddim_steps": ("ddim_steps", "{:d}"),
    "success_rate": ("success", "{:.0%}"),
    "success_low": ("95 % from", "{:.0%}"),
    "success_high": ("to", "{:.0%}"),
    "score_mean": ("score", "{:.3f}"),
    "score_low": ("95 % from", "{:.3f}"),
    "score_high": ("to", "{:.3f}"),
    "return_mean": ("return", "{:.1f}"),
    "steps_mean": ("steps", "{:.0f}"),
    "latency_ms_median": ("ms a chunk", "{:.1f}"),
    "control_rate_hz": ("plans for Hz", "{:.0f}"),
}


def check_cells(ddim_steps: Sequence[int], num_steps: int) -> None:
    """Refuse a list of denoising steps that makes no sweep.

    Args:
        ddim_steps: the cells.
        num_steps: T of the checkpoint's schedule.

    Raises:
        ValueError: empty, repeated or out of range.
    """
    if not ddim_steps:
        raise ValueError("ddim_steps is empty: give one or more, such as ddim_steps=[1,2,4,8]")
    if len(set(ddim_steps)) != len(ddim_steps):
        raise ValueError(f"ddim_steps must not repeat a value; got {list(ddim_steps)}")
    for steps in ddim_steps:
        Sampler(ddim_steps=steps).check(num_steps)


def run_sweep(
    policy: DiffusionPolicy,
    pool: RolloutPool,
    *,
    ddim_steps: Sequence[int],
    seeds: Sequence[int],
    sampler: Sampler,
    execution_horizon: int,
    on_episode: Callable[[int, EpisodeResult], None],
) -> Iterator[Row]:
    """Roll out every cell on the same episodes with the same initial noise.

    Args:
        policy: for the latency of a chunk.
        pool: runs the episodes.
        ddim_steps: the cells.
        seeds: episode seeds of every cell.
        sampler: the other sampler settings.
        execution_horizon: actions executed before the next plan.
        on_episode: called with the cell's `ddim_steps` and each result.

    Yields:
        One row per cell, JSON data.
    """
    for steps in ddim_steps:
        cell = dataclasses.replace(sampler, ddim_steps=steps)
        results = pool.run(
            seeds,
            sampler=cell,
            execution_horizon=execution_horizon,
            on_episode=lambda result, steps=steps: on_episode(steps, result),  # type: ignore[misc]
        )
        latency = chunk_latency(policy, cell)
        yield {
            **dataclasses.asdict(cell),
            "execution_horizon": execution_horizon,
            **summarize(results),
            **latency,
            # Planning between two chunks leaves the robot waiting at any rate above this.
            "control_rate_hz": 1e3 * execution_horizon / latency["latency_ms_median"],
        }


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a plain text table; the same text is valid Markdown."""
    cells = [[form.format(row[key]) for key, (_, form) in COLUMNS.items()] for row in rows]
    heads = [head for head, _ in COLUMNS.values()]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in [heads, *cells]
    ]
    rule = "| " + " | ".join("-" * (w - 1) + ":" for w in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write `sweep.csv` and `sweep.json`, one row per cell.

    Args:
        rows: of `run_sweep`.
        folder: where to.
    """
    (folder / "sweep.json").write_text(json.dumps(list(rows), indent=2))
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot_rows(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw success with its intervals against `ddim_steps`, and against the latency of a chunk.

    Args:
        rows: of `run_sweep`.
        path: of the PNG.
        title: what was swept.
    """
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["ddim_steps"])
    success = [100 * row["success_rate"] for row in rows]
    below = [s - 100 * row["success_low"] for s, row in zip(success, rows, strict=True)]
    above = [100 * row["success_high"] - s for s, row in zip(success, rows, strict=True)]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, label in (
        (left, "ddim_steps", "ddim_steps"),
        (right, "latency_ms_median", "ms a chunk (batch 1, one thread), at each ddim_steps"),
    ):
        x = [row[key] for row in rows]
        axes.errorbar(x, success, yerr=[below, above], fmt="o-", capsize=4, label="success, 95 % Wilson interval")
        axes.plot(
            x, [100 * row["score_mean"] for row in rows], "s--", color="0.6", ms=4, lw=1, label="mean score x 100"
        )
        axes.set_xscale("log", base=2 if key == "ddim_steps" else 10)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        for row, at, height in zip(rows, x, success, strict=True):
            if axes is right:
                axes.annotate(str(row["ddim_steps"]), (at, height), textcoords="offset points", xytext=(6, -12))
    left.set_xticks([row["ddim_steps"] for row in rows], [str(row["ddim_steps"]) for row in rows])
    left.minorticks_off()
    left.set_ylim(-3, 103)
    left.set_ylabel("success (%)")
    left.legend(loc="lower right")
    figure.suptitle(f"{title}: {rows[0]['episodes']} episodes per point, the same in each")
    figure.savefig(path, dpi=150)
