"""Rollouts in processes: the same results whatever runs beside them and whatever fails, and nothing left running."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import torch

from envs.planar import PlanarEnv
from policy import DiffusionPolicy, Sampler
from policy.common.device import available_cores
from policy.common.errors import WorkerError
from policy.inference.backends import BACKENDS, Eager
from policy.rollout import workers
from policy.rollout.cells import Cell
from policy.rollout.episodes import run_in_process
from policy.rollout.workers import RolloutPool
from tests.conftest import PLANAR_CONFIG
from tests.rollout.short import ShortPlanar

SEEDS = [11, 3, 5, 8, 2, 9, 14, 1, 20]
PLANAR = partial(ShortPlanar)
CELLS = [
    Cell(policy=0, sampler=Sampler(ddim_steps=2, eta=0.0), execution_horizon=4),
    Cell(policy=1, sampler=Sampler(ddim_steps=5, eta=1.0), execution_horizon=8),
    Cell(policy=0, sampler=Sampler(ddim_steps=2, eta=1.0), execution_horizon=3),
]
TASKS = list(itertools.product(range(len(CELLS)), SEEDS))


def make_policy(seed):
    generator = torch.Generator().manual_seed(seed)
    policy = DiffusionPolicy(PLANAR_CONFIG).eval().requires_grad_(False)
    for parameter in policy.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def policies():
    return [make_policy(0), make_policy(1)]


@pytest.fixture(scope="module")
def alone(policies):
    """Each episode on its own: no other cell, policy, environment or process."""
    results = {}
    for number, seed in TASKS:
        cell = replace(CELLS[number], policy=0)
        ((_, result),) = run_in_process([policies[CELLS[number].policy]], [PLANAR()], [cell], [(0, seed)])
        results[number, seed] = result
    return results


def roll(pool, tasks=TASKS, cells=CELLS):
    results = list(pool.run(cells, tasks))
    assert sorted(task for task, _ in results) == sorted(tasks)  # each exactly once
    return dict(results)


def some_of(alone, tasks):
    return {task: alone[task] for task in tasks}


def orders():
    return [TASKS[::-1], random.Random(0).sample(TASKS, len(TASKS))]


@pytest.fixture
def cores(monkeypatch):
    return lambda count: monkeypatch.setattr(workers, "available_cores", lambda: count)


@pytest.fixture(autouse=True)
def _no_process_is_left():
    assert multiprocessing.active_children() == []
    yield
    assert multiprocessing.active_children() == []


# --- independence ------------------------------------------------------------------------------------------------


def test_the_reference_episodes_differ_from_each_other(alone):
    assert [result.seed for result in alone.values()] == [seed for _, seed in TASKS]
    assert len({(result.score, result.steps) for result in alone.values()}) > 20
    for one, other in itertools.combinations(range(len(CELLS)), 2):
        assert sum(alone[one, seed] != alone[other, seed] for seed in SEEDS) > 5


@pytest.mark.parametrize("num_envs", [1, 3, 8, 20])
def test_one_process_with_many_environments_gives_each_task_its_own_result(policies, alone, cores, num_envs):
    cores(1)
    with RolloutPool(policies, PLANAR, num_envs) as pool:
        assert multiprocessing.active_children() == []
        for tasks in orders():
            assert roll(pool, tasks) == alone
        tasks = [(1, seed) for seed in SEEDS]  # one cell of the three
        assert roll(pool, tasks) == some_of(alone, tasks)


class Compiled(Eager):
    """Stands in for a back end that takes seconds to compile and can be sent to other processes."""

    def __init__(self, policy, sampler, course, weights, *, made):
        super().__init__(policy, sampler, course, weights)
        made.append(os.getpid())
        assert os.getpid() == made[0], "a rollout process compiled a program itself"


@pytest.mark.usefixtures("quick_start")
def test_processes_run_the_very_programs_that_were_compiled_for_them(policies, monkeypatch):
    """Each is compiled once, for all processes and runs."""
    made = [os.getpid()]
    monkeypatch.setitem(BACKENDS, "onnx", partial(Compiled, made=made))
    cells = [replace(cell, backend="onnx") for cell in CELLS]
    tasks = [(number, seed) for number in range(len(cells)) for seed in SEEDS[:4]]
    expected = dict(run_in_process(policies, [PLANAR()], cells, tasks))
    made[1:] = []
    with RolloutPool(policies, PLANAR, 4) as pool:
        for _ in range(2):
            assert roll(pool, tasks, cells) == expected
            assert len(made) == 1 + len(cells)


@pytest.mark.slow  # exports three programs
def test_spawned_processes_run_onnx_programs(policies, cores):
    cores(2)
    pytest.importorskip("onnxruntime")
    cells = [replace(cell, backend="onnx") for cell in CELLS]
    tasks = [(number, seed) for number in range(len(cells)) for seed in SEEDS[:4]]
    expected = dict(run_in_process(policies, [PLANAR()], cells, tasks))
    with RolloutPool(policies, PLANAR, 4) as pool:
        assert roll(pool, tasks, cells) == expected


def check_worker_processes(policies, alone, num_envs):
    with RolloutPool(policies, PLANAR, num_envs) as pool:
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        for tasks in orders():
            assert roll(pool, tasks) == alone
        for process in processes:  # Ctrl-C reaches every process of a terminal; it is the parent's to handle
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
        assert roll(pool, TASKS[:1]) == some_of(alone, TASKS[:1])  # fewer tasks than processes
        assert roll(pool, []) == {}
        assert roll(pool, [(0, 3)], [replace(CELLS[1], policy=1)]) == {(0, 3): alone[1, 3]}  # other cells
        assert multiprocessing.active_children() == processes
    assert not any(process.is_alive() for process in processes)


def test_worker_processes_give_the_same_results_run_after_run(policies, alone, cores):
    cores(2)
    check_worker_processes(policies, alone, 3)  # an uneven share


@pytest.mark.usefixtures("quick_start")
def test_worker_processes_with_several_environments_each_give_the_same_results(policies, alone):
    check_worker_processes(policies, alone, 8)


# --- faults ------------------------------------------------------------------------------------------------------


class Faults:
    """Mixed into an environment: at step 3 of certain seeds something goes wrong, this many times."""

    def __init__(self, folder, faults, times=1):
        super().__init__()
        self.folder, self.faults, self.times = Path(folder), faults, times
        self.seed_ = self.steps = 0

    def reset(self, *, seed=None, options=None):
        self.seed_, self.steps = seed, 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        fault = self.faults.get(self.seed_)
        if fault and self.steps == 3:
            marker = self.folder / str(self.seed_)
            failures = marker.stat().st_size if marker.exists() else 0
            if failures < self.times:
                with marker.open("ab") as opened:
                    opened.write(b".")
                go_wrong(fault)
        return super().step(action)


class Faulty(Faults, PlanarEnv):
    """Used by the tests of the sweep command, too."""


class ShortFaulty(Faults, ShortPlanar):
    pass


def go_wrong(fault):
    match fault:
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise ZeroDivisionError("the simulator diverged")
        case "leave":
            raise SystemExit(3)
        case "hang":
            time.sleep(3600)


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def quick_start(request, monkeypatch, cores):
    """A spawned process needs seconds to import torch; what is to be seen here does not depend on how it started."""
    cores(2)
    context = multiprocessing.get_context(request.param)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: context)


def undisturbed(results):
    return {task: replace(result, attempts=1) for task, result in results.items()}


def attempts(results):
    return {task: result.attempts for task, result in results.items() if result.attempts > 1}


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("num_envs", [2, 6])
def test_episodes_of_a_process_that_fails_are_run_again_with_the_same_result(policies, alone, tmp_path, num_envs):
    faults = {5: "exit", 9: "kill", 1: "raise", 20: "leave"}
    with RolloutPool(policies, partial(ShortFaulty, tmp_path, faults), num_envs) as pool:
        before = {process.pid for process in multiprocessing.active_children()}
        results = roll(pool)
        after = {process.pid for process in multiprocessing.active_children()}
        assert len(after) == 2
        assert after != before
        assert undisturbed(results) == alone
        if num_envs == 2:  # one at a time: the episode that failed and no other
            assert attempts(results) == {(0, seed): 2 for seed in faults}
        else:  # together with what ran beside it, once: the second time it is alone
            assert {(0, seed) for seed in faults} <= attempts(results).keys()
            assert set(attempts(results).values()) == {2}
        assert roll(pool) == alone  # the next run begins anew


@pytest.mark.usefixtures("quick_start")
def test_a_process_that_is_killed_from_outside_is_replaced(policies, alone):
    with RolloutPool(policies, PLANAR, 3) as pool:
        run = pool.run(CELLS, TASKS)
        results = dict([next(run)])
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid, signal.SIGKILL)
        results |= dict(run)
        assert undisturbed(results) == alone
        assert len(multiprocessing.active_children()) == 2  # another one in its place


@pytest.mark.usefixtures("quick_start")
def test_a_process_that_is_killed_between_two_runs_is_replaced(policies, alone):
    with RolloutPool(policies, PLANAR, 3) as pool:
        roll(pool)
        for _ in range(3):
            idle = multiprocessing.active_children()[0]
            os.kill(idle.pid, signal.SIGKILL)
            idle.join()
            assert roll(pool) == alone


@pytest.mark.usefixtures("quick_start")
def test_a_hanging_process_is_replaced(policies, alone, tmp_path, monkeypatch):
    def clock():
        # As if an hour had passed, once the others had the time to finish.
        marker = tmp_path / "5"
        hour = 3600 if marker.exists() and time.time() - marker.stat().st_mtime > 1.5 else 0
        return time.monotonic() + hour

    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=clock))
    with RolloutPool(policies, partial(ShortFaulty, tmp_path, {5: "hang"}), 2, patience=600) as pool:
        results = roll(pool)
    assert undisturbed(results) == alone
    assert attempts(results) == {(0, 5): 2}


@pytest.mark.slow
def test_patience_is_counted_in_seconds_of_silence(policies, alone, cores, tmp_path):
    cores(2)
    start = time.monotonic()
    with RolloutPool(policies, partial(ShortFaulty, tmp_path, {5: "hang"}), 2, patience=15) as pool:
        results = roll(pool)
    assert 15 < time.monotonic() - start < 60
    assert undisturbed(results) == alone
    assert attempts(results) == {(0, 5): 2}


@pytest.mark.usefixtures("quick_start")
def test_a_slow_caller_is_not_taken_for_a_hanging_process(policies, alone, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    results = {}
    with RolloutPool(policies, PLANAR, 2, patience=600) as pool:
        for task, result in pool.run(CELLS, TASKS):
            results[task] = result
            if len(results) == 3:
                now[0] += 3600
                time.sleep(1.0)  # the other has something to say by now
    assert results == alone


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("num_envs", [2, 6])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", r"ZeroDivisionError: the simulator diverged \(test_workers.py, line \d+\)"),
        ("exit", "its process ended with exit code 7"),
    ],
)
def test_an_episode_that_always_fails_is_an_error_that_names_its_seed_after_all_others(
    policies, alone, tmp_path, fault, reason, num_envs, capfd
):
    good = [task for task in TASKS if task[1] != 3]
    results = {}

    def collect(run):
        for task, result in run:
            results[task] = result

    with RolloutPool(policies, partial(ShortFaulty, tmp_path, {3: fault}, times=99), num_envs) as pool:
        with pytest.raises(WorkerError, match=f"^the episode with seed 3 failed 3 times: {reason}$"):
            collect(pool.run(CELLS, [*good[:3], (1, 3), *good[3:]]))
        assert (tmp_path / "3").read_bytes() == b"..."  # three attempts, no more
        assert len(results) >= len(good) - num_envs  # what shared its process may come after it
        assert undisturbed(results) == some_of(alone, results)
        assert "Traceback" not in capfd.readouterr().err
        assert roll(pool, good) == some_of(alone, good)  # the pool can still be used


@pytest.mark.usefixtures("quick_start")
def test_episodes_that_all_fail_are_an_error_soon(policies, tmp_path):
    faults = dict.fromkeys(range(1000), "exit")
    with RolloutPool(policies, partial(ShortFaulty, tmp_path, faults), 2) as pool:
        with pytest.raises(WorkerError, match=r"failed 6 times in a row: .*exit code 7"):
            roll(pool, [(0, seed) for seed in range(1000)])
        assert 6 <= len(list(tmp_path.iterdir())) <= 8  # another may have begun when the last one failed


class Broken(gymnasium.Env):
    def __init__(self, how):
        go_wrong(how)


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize(("how", "reason"), [("raise", "ZeroDivisionError"), ("exit", "exit code 7")])
@pytest.mark.parametrize("late", [False, True])
def test_environments_that_cannot_be_made_are_an_error_at_once(policies, how, reason, late, capfd):
    with RolloutPool(policies, partial(Broken, how), 2) as pool:
        if late:  # all have ended by the time they are given work
            for process in multiprocessing.active_children():
                process.join()
        with pytest.raises(WorkerError, match=rf"^a rollout process could not start: .*{reason}"):
            roll(pool)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("taken", [0, 1, 20])
def test_a_run_may_be_left_early(policies, alone, taken):
    with RolloutPool(policies, PLANAR, 5) as pool:
        run = pool.run(CELLS, TASKS)
        assert len(list(itertools.islice(run, taken))) == taken
        run.close()
        assert roll(pool, TASKS[::-1]) == alone
        run = pool.run(CELLS, TASKS)
        assert next(run)[0] in TASKS


@pytest.mark.usefixtures("quick_start")
def test_an_interruption_leaves_no_process(policies):
    with pytest.raises(KeyboardInterrupt), RolloutPool(policies, PLANAR, 5) as pool:  # noqa: PT012
        processes = multiprocessing.active_children()
        next(pool.run(CELLS, TASKS))
        raise KeyboardInterrupt
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"  # one that ended may wait to be collected
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("quick_start")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_processes_end_with_a_parent_that_is_killed(policies):
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            with RolloutPool(policies, PLANAR, 4) as pool:
                tasks = itertools.product(range(len(CELLS)), range(10_000))
                for number, _ in enumerate(pool.run(CELLS, list(tasks))):
                    if number == 10:
                        children = [str(process.pid) for process in multiprocessing.active_children()]
                        os.write(write, " ".join(children).encode())
        finally:
            os._exit(1)
    try:
        children = [int(pid) for pid in os.read(read, 1000).split()]
        assert len(children) == 2
        assert all(is_running(pid) for pid in children)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.close(read)
        os.close(write)
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in children)


# --- the rest ----------------------------------------------------------------------------------------------------


class Closing(gymnasium.Env):
    closed = 0

    def close(self):
        type(self).closed += 1


def test_environments_of_this_process_are_closed(policies, cores):
    cores(1)
    with pytest.raises(KeyboardInterrupt), RolloutPool(policies, Closing, 3):  # noqa: PT012
        assert Closing.closed == 0
        raise KeyboardInterrupt
    assert Closing.closed == 3


@pytest.mark.usefixtures("quick_start")
def test_there_are_no_more_processes_than_environments(policies, cores):
    cores(64)
    with RolloutPool(policies, PLANAR, 3):
        assert len(multiprocessing.active_children()) == 3


@pytest.mark.parametrize("num_envs", [0, -1])
def test_a_pool_needs_an_environment(policies, num_envs):
    with pytest.raises(ValueError, match=f"num_envs must be 1 or more; got {num_envs}"):
        RolloutPool(policies, PLANAR, num_envs)


def test_cores_are_those_this_process_may_use():
    assert 1 <= available_cores() <= os.cpu_count()
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
        os.sched_setaffinity(0, before)
