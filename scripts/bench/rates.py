"""Check the control rates that a sweep prints: act at them, in real time, and count what comes too late.

The latency of each policy is measured as a sweep measures it. Then `RealTimeController` acts for EPISODES episodes of
150 control steps at the rate up to which a waiting robot keeps every deadline, and at the one up to which planning
ahead has no late step, both rounded down as the table shows them. At most one step of 150 may be late.

The figures are those of a robot only on a machine that does nothing else: `quiet` is the share of the time in which the
measured thread had its processor, and a row below 0.95 is marked as busy. A processor that is shared with other virtual
machines slows down without a sign of it: then the 99th percentile while acting is above the one that was measured.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from policy import ControllerSettings, DiffusionPolicy, PolicyConfig, RealTimeController, Sampler
from policy.common.machine import available_cores
from policy.common.progress import say
from policy.control.real_time import Pace
from policy.inference.backends import compile_sampler
from policy.rollout.cells import Cell
from policy.rollout.latency import measure_latency, running_on, timed_controller
from policy.sweep.table import rate_text
from scripts.bench.report import machine, write_report

POLICIES: dict[str, dict[str, Any]] = {
    "MLP": {"denoiser": {"name": "modulated_mlp"}},
    "transformer": {"denoiser": {"name": "transformer"}},
    "U-Net": {"denoiser": {"name": "unet", "widths": (256, 512)}},
}
DDIM_STEPS, EXECUTION_HORIZONS = 8, (4, 8)
STEPS, EPISODES = 150, 3
# How a robot acts, and the column with its rate.
MODES = {"synchronous": "waiting_rate_hz", "asynchronous": "planning_ahead_rate_hz"}


def main() -> None:
    """Run the benchmark on one thread, and on two where there are as many cores."""
    print(machine())
    rows = [
        row
        for name, threads in itertools.product(POLICIES, range(1, min(2, available_cores()) + 1))
        for row in measured(name, threads)
    ]
    write_report("rates", rows)


def measured(name: str, threads: int) -> list[dict[str, Any]]:
    """Measure one policy, and act at its rates."""
    config = PolicyConfig(observation_shapes={"state": (20,)}, action_dim=2, **POLICIES[name])
    policy, sampler = DiffusionPolicy(config).eval().requires_grad_(False), Sampler(ddim_steps=DDIM_STEPS)
    program = compile_sampler(policy, sampler, backend="fused")
    cells = [Cell(sampler=sampler, execution_horizon=horizon) for horizon in EXECUTION_HORIZONS]
    say(f"{name} on {threads} threads")
    rows = []
    latencies = measure_latency([timed_controller(policy, cell, program) for cell in cells], threads)
    for cell, latency in zip(cells, latencies, strict=True):
        rates = latency.rates(execution_horizon=cell.execution_horizon, action_horizon=config.action_horizon)
        for mode, column in MODES.items():
            rate = float(rate_text(rates[column]))
            try:
                with running_on(threads, [program]):
                    acted = [act_at(policy, program, cell, mode, rate, seed) for seed in range(EPISODES)]
            except ValueError as error:  # plans that take as long as a chunk: the machine has become busy since
                say(f"refused at {rate:g} Hz: {error}")
                acted = []
            rows.append(
                {
                    "policy": name,
                    "threads": threads,
                    "execution_horizon": cell.execution_horizon,
                    "median_ms": latency.median_ms,
                    "p99_ms": latency.p99_ms,
                    "quiet": latency.quiet,
                    "busy": latency.busy,
                    "mode": mode,
                    "rate_hz": rate,
                    "late_of_150": ", ".join(str(episode.late) for episode in acted) or "refused",
                    "quiet_while_acting": min((episode.quiet for episode in acted), default=None),
                    "p99_ms_while_acting": max((episode.p99_ms for episode in acted), default=None),
                }
            )
    return rows


class Acted(NamedTuple):
    """An episode in real time: steps too late or without a plan, how quiet the machine was, and how long plans took."""

    late: int
    quiet: float
    p99_ms: float


def act_at(policy: DiffusionPolicy, program: Any, cell: Cell, mode: Any, rate: float, seed: int) -> Acted:
    """Act for an episode.

    The robot sleeps between its steps, so that quietness is that of a thread that computes for a moment afterwards.
    """
    with RealTimeController(
        policy,
        control_rate=rate,
        sampler=cell.sampler,
        execution_horizon=cell.execution_horizon,
        settings=ControllerSettings(mode=mode),
        program=program,
    ) as robot:
        robot.reset(seed)
        pace, observation = Pace(rate), np.zeros(20, np.float32)
        for _ in range(STEPS):
            pace()
            robot.act(observation)
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.perf_counter() < wall + 0.1:
        torch.ones(1000).sum()
    quiet = (time.thread_time() - cpu) / (time.perf_counter() - wall)
    timing = robot.timing
    return Acted(timing.late_steps + timing.missed_deadlines, quiet, float(np.percentile(timing.plan_ms, 99)))


if __name__ == "__main__":
    main()
