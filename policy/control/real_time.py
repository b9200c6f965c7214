"""Real-time control: a thread plans the next chunk while the last one is executed."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from policy.common.observations import Observation
from policy.control.planning import History, PlanRequest, checked_observation, sample_plans
from policy.control.receding_horizon import clipped, program_for, request_of
from policy.control.timeline import EXECUTION_HORIZON, ControllerSettings, Timeline, cancelling
from policy.diffusion.sampler import Sampler
from policy.inference.backends import SamplerProgram
from policy.model.diffusion_policy import DiffusionPolicy, zero_observations


class Pace:
    """Waits for the start of each control period.

    Attributes:
        overruns: periods that had already started when they were waited for, because the work between two calls was too
            slow.

    Args:
        control_rate: periods per second.
    """

    def __init__(self, control_rate: float) -> None:
        self._period, self._next = 1 / control_rate, time.monotonic()
        self.overruns = 0

    def __call__(self) -> None:
        """Sleep until the next period starts."""
        now = time.monotonic()
        if now > self._next:
            self.overruns += 1
            self._next = now
        time.sleep(self._next - now)
        self._next += self._period


LOG = logging.getLogger(__name__)
# How many plans are timed before the first episode, and from how many recent plans the next one's time is estimated.
REHEARSALS, REMEMBERED = 5, 20


@dataclass
class Timing:
    """Timing of one episode in real time.

    Attributes:
        steps: control steps.
        missed_deadlines: control steps whose action took longer than a period; the first one, which waits for the first
            plan, is not counted.
        late_steps: control steps without a planned action, see `ControllerSettings.late`.
        plan_ms: duration of each plan, in milliseconds.
        act_ms: duration of each call of `act` but the first, in milliseconds.
    """

    steps: int = 0
    missed_deadlines: int = 0
    late_steps: int = 0
    plan_ms: list[float] = field(default_factory=list)
    act_ms: list[float] = field(default_factory=list)


def summarize_timing(timings: Sequence[Timing], control_rate: float, overruns: int) -> dict[str, float]:
    """Summarise the timing of episodes in real time.

    Args:
        timings: one per episode, at least one.
        control_rate: control steps per second.
        overruns: periods whose start the whole loop missed, including the time of the simulator.

    Returns:
        JSON data: `control_rate episodes steps missed_deadlines late_steps overruns plans plan_ms_median plan_ms_p99
        act_ms_median act_ms_p99`; durations are 0 where nothing was planned, because every episode broke off at once.
    """
    plans = [milliseconds for timing in timings for milliseconds in timing.plan_ms]
    acts = [milliseconds for timing in timings for milliseconds in timing.act_ms] or [0.0]
    plan_ms = plans or [0.0]
    return {
        "control_rate": control_rate,
        "episodes": len(timings),
        "steps": sum(timing.steps for timing in timings),
        "missed_deadlines": sum(timing.missed_deadlines for timing in timings),
        "late_steps": sum(timing.late_steps for timing in timings),
        "overruns": overruns,
        "plans": len(plans),
        "plan_ms_median": float(np.median(plan_ms)),
        "plan_ms_p99": float(np.percentile(plan_ms, 99)),
        "act_ms_median": float(np.median(acts)),
        "act_ms_p99": float(np.percentile(acts, 99)),
    }


def format_timing(summary: Mapping[str, float]) -> str:
    """The summary of `summarize_timing` in one line, for people."""
    return (
        f"{summary['steps']:.0f} control steps at {summary['control_rate']:g} Hz: {summary['missed_deadlines']:.0f}"
        f" missed deadlines, {summary['late_steps']:.0f} late steps, {summary['overruns']:.0f} periods that the whole"
        f" loop with the simulator overran; a plan {summary['plan_ms_median']:.1f} ms"
        f" (99 % {summary['plan_ms_p99']:.1f} ms), an action {summary['act_ms_median']:.2f} ms"
        f" (99 % {summary['act_ms_p99']:.2f} ms)"
    )


class RealTimeController:
    """Drives one robot at a fixed control rate.

    Call `act` once in every control period. In the modes `asynchronous` and `continuous` it does not wait for the
    network: a thread computes the plans. A plan is started early enough for its estimated duration, and executed from
    the action for the control step at which it arrives. Only an episode's first plan is waited for, because no control
    period has started yet.

    Plan n draws its noise from (episode seed, n), but the observation that it is computed from depends on the duration
    of plans. Unlike in simulated time, two runs therefore differ.

    Args:
        policy: samples the chunks.
        control_rate: control steps per second.
        sampler: sampling settings.
        execution_horizon: actions executed before the next plan is started.
        settings: the mode, and what to execute while a plan is late; `delay_steps` is measured here and must be 0.
        program: the policy's sampling, compiled for `sampler`; by default it is compiled with the default backend.
        action_space: actions are clipped to it; None leaves them unchanged.
        max_age: maximum age of an observation, in seconds; by default two periods.
        clock: returns the time in seconds, as `time.monotonic` does.

    Attributes:
        control_rate: as given.
        timing: timing of the current episode so far.

    Raises:
        ValueError: a setting out of range, a program of another sampler, or, in the modes that do not wait, plans that
            take as long as a chunk lasts or longer.

    Example:
        >>> import numpy as np
        >>> from policy import ControllerSettings, DiffusionPolicy, PolicyConfig, RealTimeController
        >>> policy = DiffusionPolicy(PolicyConfig(observation_shapes={"state": (5,)}, action_dim=2)).eval()
        >>> settings = ControllerSettings(mode="continuous")
        >>> with RealTimeController(policy, control_rate=5.0, settings=settings) as controller:
        ...     controller.reset(seed=0)
        ...     action = controller.act(np.zeros(5, np.float32))
        >>> action.shape, controller.timing.steps
        ((2,), 1)
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        control_rate: float,
        sampler: Sampler | None = None,
        execution_horizon: int = EXECUTION_HORIZON,
        settings: ControllerSettings | None = None,
        program: SamplerProgram | None = None,
        action_space: Box | None = None,
        max_age: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not (control_rate > 0 and math.isfinite(control_rate)):
            raise ValueError(f"control_rate must be above 0 control steps a second; got {control_rate}")
        if max_age is not None and not max_age > 0:
            raise ValueError(f"max_age must be above 0 seconds; got {max_age}")
        self._settings, self._config = settings or ControllerSettings(), policy.config
        self._settings.check(execution_horizon, policy.config.action_horizon)
        if self._settings.delay_steps:
            raise ValueError(
                f"controller.delay_steps simulates a delay, here it is measured: leave it at 0; got"
                f" {self._settings.delay_steps}"
            )
        self._sampler = sampler or Sampler()
        self._program = program_for(policy, self._sampler, program)
        self._execution_horizon, self._action_space, self._clock = execution_horizon, action_space, clock
        self.control_rate = control_rate
        self._period = 1 / control_rate
        self._max_age = 2 * self._period if max_age is None else max_age
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plans")
        self._coming: Future[NDArray[np.float32]] | None = None
        self._begun_at = 0
        self._seed: int | None = None
        self._plan_seconds: deque[float] = deque(maxlen=REMEMBERED)
        self.timing = Timing()
        self._rehearse()

    def reset(self, seed: int) -> None:
        """Start an episode; a plan of the last episode that is still being computed is waited for and discarded.

        Args:
            seed: the episode's seed, 0 or more.
        """
        if self._coming is not None:
            self._coming.exception()
            self._coming = None
        self._seed, self._history = seed, History(self._config)
        self._timeline = self._new_timeline()
        self.timing = Timing()

    def act(self, observation: Observation, observed_at: float | None = None) -> NDArray[np.float32]:
        """Return the action of the current control step.

        Args:
            observation: the newest observation: a vector, an image, or arrays by key.
            observed_at: time of the observation, by the controller's clock; None skips the check of its age.

        Returns:
            (action_dim,) action in the data's units.

        Raises:
            ValueError: `reset` was not called, or the observation does not fit the policy, is not finite or is too old.
                The controller is then unchanged. Or the actions of the plan that was due are not finite: the next call
                begins it again.
        """
        now = self._clock()
        if self._seed is None:
            raise ValueError("there is no episode: call reset(seed) first")
        if observed_at is not None and now - observed_at > self._max_age:
            raise ValueError(
                f"the observation is {1e3 * (now - observed_at):.0f} ms old, at most {1e3 * self._max_age:.0f} ms are"
                " allowed: it was not used, and the controller is as it was; raise max_age, or observe later"
            )
        self._history.add(checked_observation(self._config, observation))
        is_first = self._timeline.is_first
        self._take_plan()
        self._begin_plan()
        action = clipped(self._timeline.next_action(), self._action_space)
        self._note(self._clock() - now, is_first)
        return action

    def late_steps(self) -> int:
        """Control steps of the episode without a planned action."""
        return self.timing.late_steps

    def close(self) -> None:
        """Stop the planning thread after its current plan."""
        self._thread.shutdown()

    def __enter__(self) -> RealTimeController:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def delay_steps(self) -> int:
        """Control steps that the next plan is expected to take: as many as the slowest of the recent plans."""
        return math.ceil(max(self._plan_seconds) / self._period)

    def _take_plan(self) -> None:
        if self._coming is not None and self._coming.done():
            coming, self._coming = self._coming, None
            with cancelling(self._timeline):
                chunk = coming.result()
            self._timeline.deliver(chunk, self._timeline.step - self._begun_at)

    def _begin_plan(self) -> None:
        expected, timeline = self.delay_steps, self._timeline
        if self._coming is not None or not timeline.due(expected):
            return
        assert self._seed is not None
        wait = timeline.is_first or self._settings.mode == "synchronous"
        request = request_of(self._seed, self._history, timeline, self._sampler, expected)
        if wait:
            with cancelling(timeline):
                chunk = self._planned(request)
            timeline.deliver(chunk)
        else:
            self._begun_at, self._coming = timeline.step, self._thread.submit(self._planned, request)

    def _planned(self, request: PlanRequest) -> NDArray[np.float32]:
        begin = self._clock()
        (chunk,) = sample_plans(self._program, [request])
        seconds = self._clock() - begin
        self._plan_seconds.append(seconds)
        self.timing.plan_ms.append(1e3 * seconds)
        return chunk

    def _note(self, seconds: float, is_first: bool) -> None:
        timing, timeline = self.timing, self._timeline
        timing.steps = timeline.step
        if timeline.late_steps > timing.late_steps:
            timing.late_steps = timeline.late_steps
            LOG.warning("control step %d has no planned action: %s", timing.steps - 1, self._settings.late)
        if is_first:
            return
        timing.act_ms.append(1e3 * seconds)
        if seconds > self._period:
            timing.missed_deadlines += 1
            LOG.warning("control step %d took %.1f ms, longer than a period", timing.steps - 1, 1e3 * seconds)

    def _new_timeline(self) -> Timeline:
        config = self._config
        return Timeline(self._settings, self._execution_horizon, config.action_horizon, config.action_dim)

    def _rehearse(self) -> None:
        """Time a few plans before any robot moves, and reject plans that take as long as a chunk.

        They follow each other as in an episode. The first one, and the first that knows the plan before it, are not
        counted: either may be the first call of a program of its own, which takes longer.
        """
        config, history, timeline = self._config, History(self._config), self._new_timeline()
        history.add({key: value[0, 0].numpy() for key, value in zero_observations(config, rows=1).items()})
        for number in range(2 + REHEARSALS):
            if number == 2:
                self._plan_seconds.clear()
            while not timeline.due(delay_steps=1):
                timeline.next_action()
            request = request_of(0, history, timeline, self._sampler, delay_steps=1)
            timeline.deliver(self._planned(request), delay_steps=1)
        if self._settings.mode != "synchronous" and self.delay_steps >= config.action_horizon:
            raise ValueError(
                f"a plan takes {1e3 * max(self._plan_seconds):.0f} ms, {self.delay_steps} control steps of"
                f" {1e3 * self._period:.1f} ms: as long as the {config.action_horizon} actions of a chunk; lower"
                " sampler.ddim_steps or the control rate, or use backend=onnx"
            )
