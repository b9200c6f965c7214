"""Control against the clock: plans in a thread, deadlines, late plans, and observations that are too old."""

import json
import threading
import time

import numpy as np
import pytest
from gymnasium.spaces import Box

from policy import (
    ControllerSettings,
    DiffusionPolicy,
    PolicyConfig,
    RealTimeController,
    RecedingHorizonController,
)
from policy.control import real_time
from policy.control.real_time import Pace, Timing, format_timing, summarize_timing
from policy.diffusion.sampler import Sampler
from policy.inference.backends import compile_sampler
from tests.conftest import randomize

ROOM = 0.25  # seconds of a control period: a busy machine must not decide what a test finds


@pytest.fixture(scope="module")
def policy():
    policy = DiffusionPolicy(
        PolicyConfig(
            observation_shapes={"state": (3,)}, action_dim=2, denoiser={"name": "modulated_mlp", "hidden_size": 32}
        )
    )
    randomize(policy)
    return policy.eval().requires_grad_(False)


class SlowProgram:
    """The policy's own sampling, which takes as long as it is told to, or until it is let go."""

    def __init__(self, policy, sampler=None):
        self._program = compile_sampler(policy, sampler or Sampler(ddim_steps=2))
        self.sampler, self.seconds, self.seen, self.threads = self._program.sampler, 0.0, [], []
        self.action_scale, self.go = self._program.action_scale, threading.Event()
        self.go.set()

    def sample_actions(self, observations, **named):
        self.go.wait(10)
        time.sleep(self.seconds)
        self.seen.append((observations["state"][0, -1, 0].item(), named.get("previous"), named.get("keep")))
        self.threads.append(threading.current_thread().name)
        return self._program.sample_actions(observations, **named)


def controller_of(policy, mode="asynchronous", program=None, late="hold", **changes):
    program = program or SlowProgram(policy)
    settings = {"control_rate": 1 / ROOM, "sampler": program.sampler, "program": program, **changes}
    return RealTimeController(policy, settings=ControllerSettings(mode=mode, late=late), **settings)


def vector(value):
    return np.full(3, value, np.float32)


def settle(controller):
    """What a control period is for: the plan in the making comes to its end."""
    if controller._coming is not None:
        controller._coming.exception(timeout=10)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous", "continuous"])
def test_with_plans_of_one_control_step_it_acts_as_in_simulated_time(policy, mode):
    simulated = RecedingHorizonController(
        policy=policy,
        sampler=Sampler(ddim_steps=2),
        execution_horizon=4,
        settings=ControllerSettings(mode=mode, delay_steps=0 if mode == "synchronous" else 1),
    )
    with controller_of(policy, mode, execution_horizon=4) as controller:
        for seed in (3, 4):
            simulated.reset(seed)
            controller.reset(seed)
            for step in range(20):
                assert np.array_equal(controller.act(vector(step)), simulated.act(vector(step))), step
                settle(controller)
            assert controller.timing.steps == 20
            assert controller.timing.late_steps == controller.timing.missed_deadlines == 0
            assert len(controller.timing.plan_ms) == 5


def test_plans_are_made_in_their_own_thread_but_for_the_first(policy):
    program = SlowProgram(policy)
    with controller_of(policy, program=program, execution_horizon=4) as controller:
        program.threads.clear()
        controller.reset(0)
        for step in range(9):
            controller.act(vector(step))
            settle(controller)
    assert program.threads[0] == threading.current_thread().name
    assert len(program.threads) == 3
    assert all(name.startswith("plans") for name in program.threads[1:])


@pytest.mark.parametrize(
    ("mode", "sampler", "knows_the_last"),
    [
        ("synchronous", Sampler(ddim_steps=2), False),
        ("synchronous", Sampler(ddim_steps=2, warm_start=0.5), True),
        ("asynchronous", Sampler(ddim_steps=2), False),
        ("continuous", Sampler(ddim_steps=2), True),
    ],
)
def test_plans_are_rehearsed_as_an_episode_makes_them(policy, mode, sampler, knows_the_last):
    """Knowing the plan before may be a program of its own, which compiles with its first call."""
    program = SlowProgram(policy, sampler)
    with controller_of(policy, mode, program=program):
        known = [previous is not None for _, previous, _ in program.seen]
    assert known == [False, *[knows_the_last] * (1 + real_time.REHEARSALS)]


@pytest.mark.parametrize("late", ["hold", "zero"])
def test_a_late_plan_is_answered_counted_and_then_executed_at_its_control_step(policy, late):
    program = SlowProgram(policy)
    with controller_of(policy, program=program, execution_horizon=4, late=late) as controller:
        controller.reset(0)
        taken = [controller.act(vector(step)) for step in range(4)]
        program.go.clear()  # the plan begun at step 4 hangs
        begin = time.monotonic()
        taken += [controller.act(vector(step)) for step in range(4, 10)]
        assert time.monotonic() - begin < ROOM  # nobody waited for it
        assert controller.timing.late_steps == controller.late_steps() == 2  # the chunk's eight actions are used up
        answer = taken[7] if late == "hold" else np.zeros(2)
        assert np.array_equal(taken[8], answer)
        assert np.array_equal(taken[9], answer)
        program.go.set()
        settle(controller)
        action = controller.act(vector(10))
        assert controller.timing.late_steps == 2
    # The plan saw step 4, so its seventh action is the one for step 10.
    simulated = RecedingHorizonController(
        policy=policy,
        sampler=Sampler(ddim_steps=2),
        execution_horizon=4,
        settings=ControllerSettings(mode="asynchronous", delay_steps=4),
    )
    simulated.reset(0)
    expected = [simulated.act(vector(step)) for step in range(11)]
    assert np.array_equal(action, expected[10])


def test_measured_latency_decides_when_a_plan_is_begun_and_what_it_keeps(policy):
    program = SlowProgram(policy)
    program.seconds = 2.4 * ROOM
    with controller_of(policy, "continuous", program=program) as controller:
        assert controller.delay_steps == 3
        program.seconds = 0
        program.seen.clear()
        controller.reset(0)
        for step in range(7):
            controller.act(vector(step))
            settle(controller)
    (first, none, _), (begun, previous, keep) = program.seen
    assert (first, none) == (0, None)
    assert begun == 5  # so as to be there at 8, when the first chunk is used up
    assert keep.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert previous.shape == (1, 8, 2)


def test_a_synchronous_plan_that_is_too_slow_misses_its_deadline_and_is_counted(policy, monkeypatch):
    logged = []  # not by way of the handlers, which Hydra's commands take away in other tests
    monkeypatch.setattr(real_time.LOG, "warning", lambda text, *values: logged.append(text % values))
    program = SlowProgram(policy)
    with controller_of(policy, "synchronous", program=program, execution_horizon=2) as controller:
        controller.reset(0)
        program.seconds = 1.2 * ROOM
        for step in range(3):
            controller.act(vector(step))
        assert controller.timing.missed_deadlines == 1  # at step 2; the first plan is not counted
        assert controller.timing.late_steps == 0
    assert len(logged) == 1
    assert logged[0].startswith("control step 2 took")


def test_an_observation_that_is_too_old_is_refused_and_leaves_no_trace(policy):
    now = [100.0]
    with controller_of(policy, "synchronous", clock=lambda: now[0], max_age=0.1) as controller:
        controller.reset(0)
        first = controller.act(vector(0), observed_at=99.95)
        with pytest.raises(ValueError, match="the observation is 150 ms old, at most 100 ms are allowed"):
            controller.act(vector(1), observed_at=99.85)
        with pytest.raises(ValueError, match=r"finite numbers; got nan at \[0\]"):
            controller.act(vector(np.nan))
        second = controller.act(vector(1), observed_at=100.0)
        controller.reset(0)
        assert np.array_equal(controller.act(vector(0)), first)
        assert np.array_equal(controller.act(vector(1)), second)


def test_an_error_in_the_thread_comes_out_at_the_next_action_and_the_plan_is_begun_again(policy):
    program = SlowProgram(policy)
    with controller_of(policy, program=program, execution_horizon=1) as controller:
        controller.reset(0)
        controller.act(vector(0))
        sound, program.sample_actions = program.sample_actions, lambda *given, **named: 1 / 0
        controller.act(vector(1))
        settle(controller)
        with pytest.raises(ZeroDivisionError):
            controller.act(vector(2))
        program.sample_actions = sound
        controller.act(vector(3))
        settle(controller)
        controller.act(vector(4))
        assert len(controller.timing.plan_ms) == 2


def test_a_synchronous_plan_that_failed_is_made_again(policy):
    program = SlowProgram(policy)
    with controller_of(policy, "synchronous", program) as controller:
        controller.reset(0)
        sound, program.sample_actions = program.sample_actions, lambda *given, **named: 1 / 0
        with pytest.raises(ZeroDivisionError):
            controller.act(vector(0))
        program.sample_actions = sound
        controller.act(vector(1))
        assert (len(controller.timing.plan_ms), controller.late_steps()) == (1, 0)


def test_actions_are_clipped(policy):
    space = Box(-0.01, 0.01, (2,), np.float32)
    with controller_of(policy, action_space=space) as controller:
        controller.reset(0)
        assert np.abs(controller.act(vector(0))).max() <= 0.01


def test_settings_that_cannot_work_are_refused(policy):
    with pytest.raises(ValueError, match="control_rate must be above 0 control steps a second; got 0"):
        controller_of(policy, control_rate=0)
    with pytest.raises(ValueError, match="max_age must be above 0 seconds; got -1"):
        controller_of(policy, max_age=-1)
    with pytest.raises(ValueError, match="simulates a delay, here it is measured: leave it at 0; got 2"):
        RealTimeController(policy, control_rate=10, settings=ControllerSettings(delay_steps=2))
    with pytest.raises(ValueError, match=r"execution_horizon must be within 1\.\.8; got 9"):
        controller_of(policy, execution_horizon=9)
    with controller_of(policy) as controller, pytest.raises(ValueError, match="there is no episode: call reset"):
        controller.act(vector(0))
    program = SlowProgram(policy)
    program.seconds = 0.02
    with pytest.raises(ValueError, match=r"a plan takes \d+ ms, \d+ control steps of 2.0 ms: as long as the 8 actions"):
        controller_of(policy, program=program, control_rate=500)


def test_pace_keeps_the_rate_and_counts_what_comes_too_late():
    pace, begin = Pace(50), time.monotonic()
    pace()
    for _ in range(10):
        pace()
    assert time.monotonic() - begin >= 10 / 50 - 1e-3
    before = pace.overruns
    time.sleep(0.05)
    pace()
    assert pace.overruns == before + 1


def test_timings_are_summed_up():
    episodes = [
        Timing(steps=3, missed_deadlines=1, late_steps=0, plan_ms=[1.0, 3.0], act_ms=[0.5, 0.5]),
        Timing(steps=2, missed_deadlines=0, late_steps=2, plan_ms=[2.0], act_ms=[9.0]),
    ]
    summary = summarize_timing(episodes, 10, overruns=4)
    assert json.loads(json.dumps(summary)) == summary
    counts = ("steps", "missed_deadlines", "late_steps", "overruns", "episodes", "plans")
    assert [summary[name] for name in counts] == [5, 1, 2, 4, 2, 3]
    assert (summary["plan_ms_median"], summary["act_ms_median"]) == (2.0, 0.5)
    assert "5 control steps at 10 Hz: 1 missed deadlines, 2 late steps" in format_timing(summary)


def test_episodes_that_broke_off_at_once_planned_nothing():
    summary = summarize_timing([Timing(), Timing()], 10, overruns=0)
    assert summary["plans"] == summary["plan_ms_median"] == summary["plan_ms_p99"] == 0


def test_the_rollout_command_runs_against_the_clock(planar_run, run_command, tmp_path):
    done = run_command(
        "rollout",
        f"checkpoint={planar_run}/checkpoint",
        "episodes=2",
        "control_rate=50",
        "controller.mode=continuous",
        "sampler.ddim_steps=2",
        f"output_dir={tmp_path}",
    )
    timing = json.loads((tmp_path / "real_time.json").read_text())
    episodes = json.loads((tmp_path / "episodes.json").read_text())
    assert timing["steps"] == sum(episode["steps"] for episode in episodes)
    assert timing["late_steps"] == sum(episode["late_steps"] for episode in episodes)
    assert f"{timing['steps']} control steps at 50 Hz" in done.stdout
    again = run_command("rollout", f"checkpoint={planar_run}/checkpoint", "control_rate=-1", check=2)
    assert "control_rate must be above 0" in again.stderr
