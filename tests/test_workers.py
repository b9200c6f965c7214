"""Rollouts in processes: the same results, and nothing left running."""

import multiprocessing
import os
import signal
import time
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

import envs
from policy import DiffusionPolicy, PolicyConfig, Sampler, workers
from policy.workers import RolloutPool, available_cores

CONFIG = PolicyConfig(
    observation_shapes={"state": (4,)},
    action_dim=2,
    obs_size=16,
    encoder={"name": "state", "hidden_size": 16},
    denoiser={"name": "modulated_mlp", "hidden_size": 32, "num_layers": 1},
    schedule={"num_steps": 20, "beta_schedule": "squaredcos_cap_v2"},
)
SEEDS = [11, 3, 5, 8, 2, 9, 14, 1, 20]
PLANAR = partial(envs.make, "planar")


@pytest.fixture(scope="module")
def policy():
    generator = torch.Generator().manual_seed(0)
    policy = DiffusionPolicy(CONFIG).eval().requires_grad_(False)
    for parameter in policy.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def roll(pool, seeds=SEEDS, on_episode=lambda result: None, **sampler):
    sampler = Sampler(**{"ddim_steps": 2, "eta": 1.0, **sampler})
    return pool.run(seeds, sampler=sampler, execution_horizon=4, on_episode=on_episode)


def cores(monkeypatch, count):
    monkeypatch.setattr(workers, "available_cores", lambda: count)


@pytest.fixture(scope="module")
def alone(policy):
    patch = pytest.MonkeyPatch()
    cores(patch, 1)
    with RolloutPool(policy, PLANAR, 1) as pool:
        results = roll(pool), roll(pool, SEEDS[:4], ddim_steps=5)
    patch.undo()
    return results


def test_the_reference_runs_differ_from_each_other(alone):
    assert [result.seed for result in alone[0]] == SEEDS
    assert len({result.score for result in alone[0]}) > 5
    assert alone[0][:4] != alone[1]


@pytest.mark.parametrize("num_envs", [2, 5, 20])
def test_one_process_with_many_environments_gives_each_seed_its_own_result(policy, alone, monkeypatch, num_envs):
    cores(monkeypatch, 1)
    with RolloutPool(policy, PLANAR, num_envs) as pool:
        assert multiprocessing.active_children() == []
        assert roll(pool) == alone[0]


def test_worker_processes_give_the_same_results_run_after_run(policy, alone, monkeypatch):
    cores(monkeypatch, 2)
    seen = []
    with RolloutPool(policy, PLANAR, 4) as pool:
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        assert roll(pool, on_episode=seen.append) == alone[0]
        assert sorted(result.seed for result in seen) == sorted(SEEDS)
        for process in processes:  # Ctrl-C reaches every process of a terminal; it is the parent's to handle
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
        assert roll(pool, SEEDS[:4], ddim_steps=5) == alone[1]
        assert roll(pool, SEEDS[:1]) == alone[0][:1]  # fewer seeds than workers
    assert not any(process.is_alive() for process in processes)


def test_an_uneven_share_gives_the_same_results_and_an_interruption_leaves_no_process(policy, alone, monkeypatch):
    cores(monkeypatch, 2)

    def interrupt(result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RolloutPool(policy, PLANAR, 5) as pool:  # noqa: PT012
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        assert roll(pool) == alone[0]
        roll(pool, on_episode=interrupt)
    assert not any(process.is_alive() for process in processes)


class Failing(gymnasium.Env):
    """Raises, or dies, at the third step of seed 5."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, how):
        if how == "at once":
            raise OSError("no such simulator")
        self.how, self.seed_, self.steps = how, 0, 0

    def reset(self, *, seed=None, options=None):
        self.seed_, self.steps = seed, 0
        return np.zeros(4, np.float32), {"is_success": False, "score": 0.0}

    def step(self, action):
        self.steps += 1
        if self.seed_ == 5 and self.steps == 3:
            if self.how == "dies":
                os._exit(7)
            raise ZeroDivisionError("the simulator diverged")
        over = self.steps == 6
        return np.zeros(4, np.float32), 0.0, False, over, {"is_success": False, "score": 0.0}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"(?s)a rollout worker failed:.*in step.*ZeroDivisionError: the simulator diverged"),
        ("at once", r"(?s)a rollout worker failed:.*OSError: no such simulator"),
        ("dies", "a rollout worker ended with exit code 7"),
    ],
)
def test_a_failing_worker_is_an_error_with_its_traceback(policy, monkeypatch, how, message):
    cores(monkeypatch, 64)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message), RolloutPool(policy, partial(Failing, how), 2) as pool:  # noqa: PT012
        processes = multiprocessing.active_children()
        roll(pool)
    assert time.monotonic() - start < 60
    assert len(processes) == 2  # no more than environments
    assert not any(process.is_alive() for process in processes)


class Closing(gymnasium.Env):
    closed = 0

    def close(self):
        type(self).closed += 1


def test_environments_of_this_process_are_closed(policy, monkeypatch):
    cores(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt), RolloutPool(policy, Closing, 3):  # noqa: PT012
        assert Closing.closed == 0
        raise KeyboardInterrupt
    assert Closing.closed == 3


@pytest.mark.parametrize("num_envs", [0, -1])
def test_a_pool_needs_an_environment(policy, num_envs):
    with pytest.raises(ValueError, match=f"num_envs must be 1 or more; got {num_envs}"):
        RolloutPool(policy, PLANAR, num_envs)


def test_cores_are_those_this_process_may_use():
    assert 1 <= available_cores() <= os.cpu_count()
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
        os.sched_setaffinity(0, before)
