"""The control rates that plans allow, against the controller that has to keep them."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policy import ControllerSettings, DiffusionPolicy, PolicyConfig, RealTimeController, Sampler
from policy.control.rates import planning_ahead_rate, waiting_rate
from policy.control.real_time import Pace
from policy.inference.backends import compile_sampler
from policy.rollout.cells import Cell
from policy.rollout.latency import Latency, measure_latency, timed_controller

STEPS, ALMOST = 150, 1 - 1e-9
OBSERVATION = np.zeros(3, np.float32)


class Clock:
    """A clock that stands still unless it is set."""

    now = 0.0

    def __call__(self):
        return self.now


class Program:
    """Plans of zeros that take the given seconds of a clock, one after the other."""

    sampler, action_scale = Sampler(), np.ones(2, np.float32)

    def __init__(self, clock, seconds, action_horizon):
        self._clock, self._seconds, self._action_horizon = clock, iter(seconds), action_horizon

    def sample_actions(self, observations, **_):
        self._clock.now += next(self._seconds)
        return torch.zeros(1, self._action_horizon, 2)


class Thread:
    """Runs a plan at once, and has it done when the clock has come so far."""

    def __init__(self, clock):
        self._clock = clock

    def submit(self, plan, request):
        begin = self._clock.now
        chunk, end, self._clock.now = plan(request), self._clock.now, begin
        return SimpleNamespace(done=lambda: self._clock.now >= end, result=lambda: chunk, exception=lambda: None)

    def shutdown(self):
        pass


def drive(mode, rate, seconds, execution_horizon, action_horizon):
    """Timing of an episode whose plans take the given seconds."""
    config = PolicyConfig(observation_shapes={"state": (3,)}, action_dim=2, action_horizon=action_horizon)
    clock = Clock()
    controller = RealTimeController(
        SimpleNamespace(config=config, settled=lambda sampler: sampler),
        control_rate=rate,
        execution_horizon=execution_horizon,
        settings=ControllerSettings(mode=mode),
        program=Program(clock, seconds, action_horizon),
        clock=clock,
    )
    controller.close()
    controller._thread = Thread(clock)
    controller.reset(seed=0)
    begin = clock.now
    for step in range(STEPS):
        clock.now = max(clock.now, begin + step / rate)
        controller.act(OBSERVATION)
        begin += clock.now - begin - step / rate if step == 0 else 0.0  # the first plan is waited for
    return controller.timing


HORIZONS = [(8, 8), (4, 8), (1, 8), (5, 7), (8, 16), (16, 16), (2, 3), (1, 2)]


@pytest.mark.parametrize(("execution_horizon", "action_horizon"), HORIZONS)
def test_a_robot_that_waits_keeps_its_deadlines_up_to_the_rate(execution_horizon, action_horizon):
    rate = waiting_rate(0.02)
    kept = drive("synchronous", ALMOST * rate, [0.02] * 200, execution_horizon, action_horizon)
    assert kept.missed_deadlines == kept.late_steps == 0
    missed = drive("synchronous", 1.01 * rate, [0.02] * 200, execution_horizon, action_horizon)
    assert missed.missed_deadlines == (STEPS - 1) // execution_horizon


@pytest.mark.parametrize(("execution_horizon", "action_horizon"), HORIZONS)
def test_a_robot_that_plans_ahead_has_no_late_step_up_to_the_rate(execution_horizon, action_horizon):
    horizons = {"execution_horizon": execution_horizon, "action_horizon": action_horizon}
    for typical in (0.02, 0.011, 0.006):
        rate = planning_ahead_rate(typical, 0.02, 0.0, **horizons)
        for first in (0, 3):  # slow plans after typical ones, until which the last slow one is forgotten
            seconds = [typical] * (6 + first) + [0.02, *[typical] * 25] * 8
            timing = drive("asynchronous", ALMOST * rate, seconds, **horizons)
            assert (timing.late_steps, timing.missed_deadlines) == (0, 0), (typical, first)
    above = 1.01 * planning_ahead_rate(0.02, 0.02, 0.0, **horizons)
    if action_horizon == 2:  # a plan takes as long as a chunk then, which is refused before the episode
        with pytest.raises(ValueError, match="as long as the 2 actions of a chunk"):
            drive("asynchronous", above, [0.02] * 200, **horizons)
    else:
        assert drive("asynchronous", above, [0.02] * 200, **horizons).late_steps > 10


def test_chunks_of_one_action_cannot_be_planned_ahead_and_other_steps_take_time_too():
    assert planning_ahead_rate(0.02, 0.02, 0.0, execution_horizon=1, action_horizon=1) == 0
    assert planning_ahead_rate(0.001, 0.001, 0.002, execution_horizon=8, action_horizon=8) == 500


@pytest.mark.slow
def test_the_measured_rates_are_kept_with_a_network_that_sleeps():
    """On the clock, and so only as good as the machine is quiet: a sleep needs next to no processor."""
    config = PolicyConfig(
        observation_shapes={"state": (3,)}, action_dim=2, denoiser={"name": "modulated_mlp", "hidden_size": 32}
    )
    policy = DiffusionPolicy(config).eval()
    sampler = Sampler(ddim_steps=1)
    program = compile_sampler(policy, sampler, backend="fused")

    class Sleeping:
        action_scale, use_threads = program.action_scale, program.use_threads

        def __init__(self):
            self.sampler = sampler

        def sample_actions(self, observations, **named):
            time.sleep(0.02)
            return program.sample_actions(observations, **named)

    cell = Cell(sampler=sampler, execution_horizon=8)
    (latency,) = measure_latency([timed_controller(policy, cell, Sleeping())])
    assert latency.median_ms == pytest.approx(20, abs=5)
    assert latency.busy  # the processor was elsewhere
    rates = latency.rates(execution_horizon=8, action_horizon=8).values()
    for mode, rate in zip(("synchronous", "asynchronous"), rates, strict=True):
        settings = ControllerSettings(mode=mode)
        with RealTimeController(
            policy, control_rate=rate, sampler=sampler, settings=settings, program=Sleeping()
        ) as robot:
            robot.reset(seed=0)
            pace = Pace(rate)
            for _ in range(STEPS):
                pace()
                robot.act(OBSERVATION)
            assert robot.timing.late_steps + robot.timing.missed_deadlines <= 1, (mode, rate)


def test_a_step_that_does_not_plan_limits_a_robot_that_waits_too():
    latency = Latency(median_ms=1, p99_ms=2, cpu_ms=1, step_p99_ms=4, quiet=1, threads=1)
    rates = latency.rates(execution_horizon=8, action_horizon=8)
    assert rates == {"waiting_rate_hz": 250, "planning_ahead_rate_hz": 250}
