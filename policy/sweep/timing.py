"""The latency of a sweep's cells, and the cells that are too slow to be recommended."""

from __future__ import annotations

from collections.abc import Sequence

from policy.common.progress import progress
from policy.rollout.cells import program_of
from policy.rollout.latency import chunk_latency
from policy.sweep.conclusion import label_of
from policy.sweep.grid import Row, SweepCell


def latencies_of(cells: Sequence[SweepCell]) -> list[Row]:
    """Measure the latency of each cell.

    Args:
        cells: the cells.

    Returns:
        The columns of each cell's row that are measured.
    """
    timed = progress(cells, total=len(cells), desc="latency", unit="cell")  # some backends compile for seconds
    return [_latency(one) for one in timed]


def _latency(one: SweepCell) -> Row:
    latency = chunk_latency(program_of(one.checkpoint.policy, one.cell), one.cell.controller.candidates)
    # The highest control rate at which a plan takes no longer than the execution of its actions.
    return {**latency, "control_rate_hz": 1e3 * one.cell.execution_horizon / latency["latency_ms_median"]}


def within(cells: Sequence[SweepCell], latencies: Sequence[Row], max_ms: float | None) -> tuple[list[int], str]:
    """Find the cells whose plans are fast enough. The others are left out of the sweep before its first episode.

    Leaving them out does not depend on any result, so that what the sweep says of the other cells is as sure as
    without them.

    Args:
        cells: the cells.
        latencies: see `latencies_of`.
        max_ms: milliseconds that the median plan of a cell may take; None for no limit.

    Returns:
        The indices of the cells that stay, and a sentence about those left out, which is empty without any.

    Raises:
        ValueError: no cell is fast enough.
    """
    times = [row["latency_ms_median"] for row in latencies]
    slow = [] if max_ms is None else [number for number, time in enumerate(times) if time > max_ms]
    axes = [one.axes for one in cells]
    named = {number: f"{label_of(axes, axes[number])} ({times[number]:.1f} ms)" for number in range(len(cells))}
    if len(slow) == len(cells):
        fastest = min(named, key=times.__getitem__)
        raise ValueError(f"no cell plans within max_ms={max_ms:g}: the fastest is {named[fastest]}; raise max_ms")
    sentence = f"Left out, as slower than max_ms={max_ms:g}: {'; '.join(named[n] for n in slow)}." if slow else ""
    return [number for number in named if number not in slow], sentence


def check_max_ms(max_ms: float | None, *, merges: bool) -> None:
    """Reject a limit of the latency that no cell can meet, and one of cells that have run.

    Raises:
        ValueError: it is not a number above 0, or the sweep merges others.
    """
    if max_ms is None:
        return
    if merges:
        raise ValueError("max_ms leaves cells out before they run: give it to the sweeps that merge= combines")
    if not max_ms > 0:
        raise ValueError(f"max_ms must be above 0 milliseconds; got {max_ms}")
