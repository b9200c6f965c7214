"""The latency of a plan: how long one robot waits for it, in wall time and in CPU time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from policy.common.device import torch_threads
from policy.common.progress import progress
from policy.control.rates import planning_ahead_rate, waiting_rate
from policy.control.receding_horizon import RecedingHorizonController
from policy.inference.backends import SamplerProgram
from policy.model.diffusion_policy import DiffusionPolicy, zero_observations
from policy.rollout.cells import Cell

# Contenders are measured in turns, with one plan of each in each round.
ROUNDS = 30
# Seconds of sleep before each plan. A robot sleeps between its steps, and its processor does other work or slows down
# meanwhile: a plan of the default MLP takes 1.3 times as long after such a pause as right after the last step.
PAUSE = 0.02
# Untimed seconds of each contender before: caches, allocator and the processor's clock settle.
WARM_UP = 0.1
# A machine is quiet if the thread that acts has the processor for at least this share of the time. Where it is not,
# everything is measured again, up to this many times in all.
QUIET, ATTEMPTS = 0.95, 3


class Timed(NamedTuple):
    """Seconds of one call: by the clock, of the processor on all threads, and of the processor on the calling one."""

    wall: float
    cpu: float
    own: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The latency of a controller's steps, in milliseconds.

    Attributes:
        median_ms: of a step that plans, from the observation to the clipped action.
        p99_ms: of a step that plans, which 99 % of them do not exceed.
        cpu_ms: median of the processor's time for a step that plans, on all threads.
        step_p99_ms: of a step that does not plan.
        quiet: share of the time in which the thread that acts had the processor.
        threads: threads of PyTorch or ONNX Runtime.
    """

    median_ms: float
    p99_ms: float
    cpu_ms: float
    step_p99_ms: float
    quiet: float
    threads: int

    @property
    def busy(self) -> bool:
        """Whether other work had the processor for so long that the times are not those of a robot."""
        return self.quiet < QUIET

    def rates(self, *, execution_horizon: int, action_horizon: int) -> dict[str, float]:
        """The highest control rates for a robot that waits for its plans, and for one that plans ahead."""
        typical, step = self.median_ms / 1e3, self.step_p99_ms / 1e3
        slow = max(self.p99_ms / 1e3, step)  # a step that plans does all that another one does
        return {
            "waiting_rate_hz": waiting_rate(slow),
            "planning_ahead_rate_hz": planning_ahead_rate(
                typical, slow, step, execution_horizon=execution_horizon, action_horizon=action_horizon
            ),
        }

    @property
    def row(self) -> dict[str, float | bool]:
        """The columns of a table."""
        return {
            "latency_ms_median": self.median_ms,
            "latency_ms_p99": self.p99_ms,
            "latency_cpu_ms": self.cpu_ms,
            "latency_quiet": self.quiet,
            "latency_threads": self.threads,
            "busy": self.busy,
        }


@dataclass
class _Contender:
    """A controller, and the times of its steps."""

    controller: RecedingHorizonController
    plans: list[Timed] = field(default_factory=list)
    steps: list[Timed] = field(default_factory=list)

    def __post_init__(self) -> None:
        seen = zero_observations(self.controller.policy.config, rows=1)
        self._observation = {key: value[0, -1].numpy() for key, value in seen.items()}
        self.controller.reset(seed=0)
        self.controller.act(self._observation)  # the first plan has none before it

    def warm_up(self) -> None:
        """Act for some time."""
        end = time.perf_counter() + WARM_UP
        while time.perf_counter() < end:
            self.act()

    def act(self) -> None:
        """Act up to the next plan."""
        self.steps += [self._timed() for _ in range(self.controller.execution_horizon - 1)]
        time.sleep(PAUSE)
        self.plans.append(self._timed())

    def forget(self) -> None:
        """Discard the times."""
        self.plans, self.steps = [], []

    def latency(self, threads: int) -> Latency:
        """Summarise the times."""
        wall, cpu, own = np.transpose(self.plans)
        median, p99 = _milliseconds(wall, 50, 99)
        (step,) = _milliseconds([timed.wall for timed in self.steps or self.plans], 99)
        (cpu_ms,) = _milliseconds(cpu, 50)
        quiet = min(1.0, float(own.sum() / wall.sum()))
        return Latency(median_ms=median, p99_ms=p99, cpu_ms=cpu_ms, step_p99_ms=step, quiet=quiet, threads=threads)

    def _timed(self) -> Timed:
        before = time.thread_time(), time.process_time(), time.perf_counter()
        self.controller.act(self._observation)
        wall, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
        return Timed(wall=wall - before[2], cpu=cpu - before[1], own=own - before[0])


def measure_latency(controllers: Sequence[RecedingHorizonController], threads: int = 1) -> list[Latency]:
    """Measure how long the steps of controllers take, as a robot calls them, one robot each.

    A step of `act` is the whole of it: the check of the observation, the history, normalisation, pictures, sampling and
    clipping. Before a step that plans there is a pause, as between the steps of a robot, which makes the plan slower.
    All controllers act in turns, again and again, so that they meet the same load. Where other work kept the
    machine busy, they are measured again, and the quietest measurement is taken.

    Args:
        controllers: one or more; their episode in slot 0 is used.
        threads: threads of PyTorch and of ONNX Runtime.

    Returns:
        The latency of each.
    """
    quietest: list[Latency] = []
    with running_on(threads, [controller.program for controller in controllers if controller.program]):
        contenders = [_Contender(controller) for controller in controllers]
        for contender in contenders:
            contender.warm_up()
        for _ in range(ATTEMPTS):
            for contender in contenders:
                contender.forget()
            for _ in progress(range(ROUNDS), total=ROUNDS, desc="latency", unit="round"):
                for contender in contenders:
                    contender.act()
            found = [contender.latency(threads) for contender in contenders]
            quietest = max(filter(None, (quietest, found)), key=lambda latencies: sum(one.quiet for one in latencies))
            if not any(latency.busy for latency in quietest):
                break
    return quietest


def timed_controller(policy: DiffusionPolicy, cell: Cell, program: SamplerProgram) -> RecedingHorizonController:
    """A controller of one robot with a cell's settings, whose latency can be measured.

    Plans arrive without delay in it, so that every `execution_horizon`-th step plans in every mode.
    """
    shape = (policy.config.action_dim,)
    return RecedingHorizonController(
        policy=policy,
        sampler=cell.sampler,
        execution_horizon=cell.execution_horizon,
        settings=replace(cell.controller, delay_steps=0),
        program=program,
        action_space=Box(-np.inf, np.inf, shape),
    )


@contextmanager
def running_on(threads: int, programs: Sequence[SamplerProgram]) -> Iterator[None]:
    """Run programs on some threads in this block, and on one afterwards, on which results are repeatable."""
    with torch_threads(threads):  # which restores PyTorch's
        for program in programs:
            program.use_threads(threads)
        try:
            yield
        finally:
            for program in programs:
                program.use_threads(1)


def _milliseconds(seconds: Sequence[float] | NDArray[np.float64], *percentiles: float) -> list[float]:
    return [1e3 * float(value) for value in np.percentile(seconds, percentiles)]
