"""Latency: whole steps of a controller, in turns, and whether the machine was quiet."""

from types import SimpleNamespace

import pytest
import torch

from policy import PolicyConfig, Sampler
from policy.inference.backends import compile_sampler
from policy.rollout import latency
from policy.rollout.cells import Cell
from policy.rollout.latency import measure_latency, timed_controller
from tests.inference.cases import shared_policy

CONFIG = PolicyConfig(observation_shapes={"state": (3,), "camera": (4, 4, 3)}, action_dim=2)


class Clocks:
    """The clocks of a machine that gives a thread its processor for a share of the time only."""

    def __init__(self):
        self.wall = self.cpu = 0.0
        self.share = 1.0

    def perf_counter(self):
        return self.wall

    def thread_time(self):
        return self.cpu

    def process_time(self):
        return 2 * self.cpu  # another thread helps

    def sleep(self, seconds):
        self.wall += seconds

    def work(self, seconds):
        self.wall += seconds / self.share
        self.cpu += seconds


class Robot:
    """A controller whose every fourth step plans, for some seconds; the others take a millisecond."""

    execution_horizon, program = 4, None
    policy = SimpleNamespace(config=CONFIG)

    def __init__(self, clocks, seconds, calls):
        self._clocks, self._seconds, self._calls = clocks, seconds, calls

    def reset(self, seed):
        self._step = 0

    def act(self, observation):
        assert {key: value.shape for key, value in observation.items()} == CONFIG.observation_shapes
        plans = self._step % 4 == 0
        self._clocks.work(self._seconds if plans else 0.001)
        self._calls += [self] * plans
        self._step += 1


@pytest.fixture
def clocks(monkeypatch):
    made = Clocks()
    monkeypatch.setattr(latency, "time", made)
    return made


def test_steps_that_plan_are_told_from_the_others(clocks):
    (found,) = measure_latency([Robot(clocks, 0.02, [])])
    assert (found.median_ms, found.p99_ms) == (pytest.approx(20), pytest.approx(20))
    assert found.cpu_ms == pytest.approx(40)
    assert found.step_p99_ms == pytest.approx(1)
    assert (found.quiet, found.busy) == (pytest.approx(1), False)


def test_plans_are_timed_after_a_pause_as_a_robot_makes_it(clocks):
    class Cold(Robot):
        rested_at = 0.0

        def act(self, observation):
            self._seconds = 0.03 if clocks.wall - self.rested_at > 0.005 else 0.02
            super().act(observation)
            self.rested_at = clocks.wall

    (found,) = measure_latency([Cold(clocks, 0.02, [])])
    assert found.median_ms == pytest.approx(30)


def test_controllers_are_measured_in_turns_and_fast_ones_not_for_long(clocks):
    calls = []
    robots = [Robot(clocks, seconds, calls) for seconds in (0.002, 0.5)]
    measure_latency(robots)
    turns = [robot for robot, before in zip(calls, [None, *calls], strict=False) if robot is not before]
    assert turns == robots * (len(turns) // 2)
    assert len(turns) // 2 >= latency.ROUNDS
    assert all(latency.ROUNDS <= calls.count(robot) <= latency.ROUNDS + 5 for robot in robots)


def test_where_the_machine_is_busy_it_is_measured_again_and_the_quietest_time_counts(clocks):
    calls = []

    class Shared(Robot):
        def act(self, observation):
            super().act(observation)
            # Busy from the start; nearly quiet in the second measurement; busier than before in the third.
            attempt = (len(calls) - warm) // latency.ROUNDS if len(calls) > warm else 0
            clocks.share = (0.5, 0.9, 0.25)[min(attempt, 2)]

    clocks.share, warm = 0.5, 2  # plans before the first measurement
    (found,) = measure_latency([Shared(clocks, 0.1, calls)])
    assert found.busy
    assert found.quiet == pytest.approx(0.9)
    assert len(calls) >= 3 * latency.ROUNDS
    assert found.row["busy"] is True
    assert found.row["latency_cpu_ms"] == pytest.approx(200)


def test_a_chunk_takes_longer_with_more_denoising_steps(monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 5)
    monkeypatch.setattr(latency, "ATTEMPTS", 1)
    policy, threads, used = shared_policy(), torch.get_num_threads(), []
    controllers = []
    for steps in (1, 32):
        sampler = Sampler(ddim_steps=steps, warm_start=0.5)
        program = compile_sampler(policy, sampler, backend="fused")
        monkeypatch.setattr(type(program), "use_threads", lambda self, count: used.append(count))
        controllers.append(timed_controller(policy, Cell(sampler=sampler, execution_horizon=2), program))
    one, many = measure_latency(controllers, threads=2)
    for found in (one, many):
        assert 0 < found.median_ms <= found.p99_ms
        assert found.threads == 2
    assert many.cpu_ms > 3 * one.cpu_ms
    assert used == [2, 2, 1, 1]
    assert torch.get_num_threads() == threads
