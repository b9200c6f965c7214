"""The latency of a sweep's cells, the control rates that it allows, and the cells that are too slow."""

from __future__ import annotations

from collections.abc import Sequence

from policy.common.machine import available_cores
from policy.rollout.cells import program_of
from policy.rollout.latency import measure_latency, timed_controller
from policy.sweep.grid import SweepCell
from policy.sweep.rows import Row, label_of


def latencies_of(cells: Sequence[SweepCell], threads: int = 1) -> list[Row]:
    """Measure the latency of all cells, in turns.

    Args:
        cells: the cells.
        threads: threads of each plan.

    Returns:
        The columns of each cell's row that are measured, or follow from what is measured.
    """
    controllers = [
        timed_controller(one.checkpoint.policy, one.cell, program_of(one.checkpoint.policy, one.cell)) for one in cells
    ]
    horizons = [
        {"execution_horizon": one.execution_horizon, "action_horizon": one.policy.config.action_horizon}
        for one in controllers
    ]
    found = zip(measure_latency(controllers, threads), horizons, strict=True)
    return [{**latency.row, **latency.rates(**chunks)} for latency, chunks in found]


def within(axes: Sequence[Row], latencies: Sequence[Row], max_ms: float) -> tuple[list[int], str]:
    """Find the cells whose plans are fast enough. The others are left out of the sweep before its first episode.

    Leaving them out does not depend on any result, so that what the sweep says of the other cells is as sure as
    without them.

    Args:
        axes: the settings of each cell.
        latencies: see `latencies_of`.
        max_ms: milliseconds that the median plan of a cell may take.

    Returns:
        The indices of the cells that stay, and a sentence about those left out, which is empty without any.

    Raises:
        ValueError: no cell is fast enough.
    """
    times = [row["latency_ms_median"] for row in latencies]
    slow = [number for number, time in enumerate(times) if time > max_ms]
    named = {
        number: f"{label_of(axes, axes[number])} ({times[number]:.1f} ms{', on a busy machine' * row['busy']})"
        for number, row in enumerate(latencies)
    }
    if len(slow) == len(axes):
        fastest = min(named, key=times.__getitem__)
        raise ValueError(f"no cell plans within max_ms={max_ms:g}: the fastest is {named[fastest]}; raise max_ms")
    sentence = f"Left out, as slower than max_ms={max_ms:g}: {'; '.join(named[n] for n in slow)}." if slow else ""
    return [number for number in named if number not in slow], sentence


def check_max_ms(max_ms: float | None) -> None:
    """Reject a limit of the latency that no cell can meet.

    Raises:
        ValueError: it is not a number above 0.
    """
    if max_ms is not None and not max_ms > 0:
        raise ValueError(f"max_ms must be above 0 milliseconds; got {max_ms}")


def check_threads(threads: int) -> None:
    """Reject a number of threads for which this process has no cores: such a plan is slower than on fewer.

    Raises:
        ValueError: fewer than one, or more than the cores.
    """
    cores = available_cores()
    if not 1 <= threads <= cores:
        raise ValueError(f"threads must be within 1..{cores}, the cores that this process may use; got {threads}")
