"""Rollouts in processes: the same results whatever runs beside them and whatever fails, and nothing left running."""

import copy
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

from envs.planar import PlanarEnv
from policy import DiffusionPolicy, Sampler
from policy.checkpoint import load_checkpoint
from policy.common.errors import WorkerError
from policy.control.planning import PlanRequest, sample_plans
from policy.inference.backends import BACKENDS
from policy.inference.runners import Eager
from policy.rollout import central, process, workers
from policy.rollout.cells import PLAN_BATCH, Cell, controllers_of, program_of
from policy.rollout.central import CentralPlanner, PlansDue, without_weights
from policy.rollout.episodes import run_in_process
from policy.rollout.handover import ALIGNMENT
from policy.rollout.process import Fault
from policy.rollout.workers import RolloutPool
from tests.conftest import ENVIRONMENT, PLANAR_CONFIG, ROOT
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
    policies = copy.deepcopy(policies)  # sending the stand-ins moves their weights to shared memory
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


def check_worker_processes(policies, alone, num_envs, **how):
    with RolloutPool(policies, PLANAR, num_envs, **how) as pool:
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
        maps = Path("/proc") / str(processes[0].pid) / "maps"
        assert not maps.exists() or "/dev/shm/torch" not in maps.read_text()  # 64 MB in a container
    assert not any(process.is_alive() for process in processes)


def test_worker_processes_give_the_same_results_run_after_run(policies, alone, cores):
    cores(2)
    check_worker_processes(policies, alone, 3)  # an uneven share


@pytest.mark.usefixtures("quick_start")
def test_worker_processes_with_several_environments_each_give_the_same_results(policies, alone):
    check_worker_processes(policies, alone, 8)


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("num_envs", [2, 3, 8])
def test_plans_that_are_sampled_in_the_parent_give_the_same_results(policies, alone, num_envs, monkeypatch):
    """This is how a GPU serves simulators in processes of their own."""
    monkeypatch.setattr(workers, "portable_programs", None)  # nothing is compiled for the processes
    check_worker_processes(policies, alone, num_envs, plans_here=True)


def test_processes_that_sample_nothing_themselves_get_no_weights(policies):
    for copied, policy in zip(without_weights(policies), policies, strict=True):
        assert {weight.device.type for weight in copied.state_dict().values()} == {"meta"}
        assert copied.config == policy.config
        assert policy.device.type == "cpu"


def test_plans_of_several_processes_share_the_network_calls(policies, monkeypatch):
    calls = []

    def sampled(program, requests, plan_batch):
        calls.append((program.sampler, len(requests)))
        return sample_plans(program, requests, plan_batch)

    monkeypatch.setattr(central, "sample_plans", sampled)
    rng = np.random.default_rng(0)

    def requests(*numbers):
        seen = {"state": rng.normal(size=(PLANAR_CONFIG.obs_horizon, *PLANAR_CONFIG.observation_shapes["state"]))}
        return [
            PlanRequest(seed=n, number=0, observations={k: v.astype(np.float32) for k, v in seen.items()})
            for n in numbers
        ]

    due = [PlansDue(1, requests(1, 2)), PlansDue(0, requests(3)), PlansDue(1, requests(4, 5, 6))]
    answers = CentralPlanner(policies, CELLS).answer(due)
    assert calls == [(CELLS[1].sampler, 5), (CELLS[0].sampler, 1)]
    for one, chunks in zip(due, answers, strict=True):
        alone = sample_plans(program_of(policies[CELLS[one.cell].policy], CELLS[one.cell]), one.requests, PLAN_BATCH)
        np.testing.assert_array_equal(chunks, alone)


@pytest.mark.usefixtures("quick_start")
def test_weights_that_are_mapped_from_a_checkpoint_give_the_same_results_everywhere(planar_run):
    """They begin anywhere in its file, where a fused matrix product can round differently."""
    policy = load_checkpoint(planar_run / "checkpoint", "cpu").policy
    assert any(weight.data_ptr() % ALIGNMENT for weight in policy.parameters())
    cells = [Cell(sampler=Sampler(ddim_steps=steps), execution_horizon=8, backend="fused") for steps in (1, 2)]
    tasks = list(itertools.product(range(2), range(100_000, 100_040)))
    results = []
    for count in (1, 2):
        with RolloutPool([policy], PLANAR, 3, workers=count) as pool:
            results.append(roll(pool, tasks, cells))
    assert results[0] == results[1]


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
@pytest.mark.parametrize(("num_envs", "plans_here"), [(2, False), (6, False), (6, True)])
def test_episodes_of_a_process_that_fails_are_run_again_with_the_same_result(
    policies, alone, tmp_path, num_envs, plans_here
):
    faults = {5: "exit", 9: "kill", 1: "raise", 20: "leave"}
    with RolloutPool(policies, partial(ShortFaulty, tmp_path, faults), num_envs, plans_here=plans_here) as pool:
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
def test_a_hanging_process_is_replaced(policies, alone, tmp_path):
    with RolloutPool(policies, partial(ShortFaulty, tmp_path, {5: "hang"}), 2, patience=1.0) as pool:
        results = roll(pool)
    assert undisturbed(results) == alone
    assert attempts(results) == {(0, 5): 2}


@pytest.mark.usefixtures("quick_start")
def test_neither_a_slow_caller_nor_a_slow_program_is_taken_for_a_hanging_simulator(policies, alone, monkeypatch):
    def slowly(*arguments):
        time.sleep(0.6)
        return controllers_of(*arguments)

    monkeypatch.setattr(process, "controllers_of", slowly)
    results = {}
    with RolloutPool(policies, PLANAR, 2, patience=0.3) as pool:
        for task, result in pool.run(CELLS, TASKS):
            results[task] = result
            if len(results) == 3:
                time.sleep(0.6)
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
        assert capfd.readouterr().err == ""  # no traceback
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
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", r"ZeroDivisionError: the simulator diverged \(test_workers.py, line \d+\)"),
        ("exit", "its process ended with exit code 7"),
        ("hang", r"the simulator hangs: making it took longer than env_patience=0.3 seconds \(default 600\)"),
    ],
)
def test_environments_that_cannot_be_made_are_an_error_at_once(policies, how, reason, capfd):
    with (
        pytest.raises(WorkerError, match=f"^a rollout process could not start: {reason}$"),
        RolloutPool(policies, partial(Broken, how), 2, patience=0.3) as pool,
    ):
        roll(pool)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("quick_start")
def test_processes_that_have_ended_before_they_are_given_work_are_an_error_at_once(policies):
    with RolloutPool(policies, partial(Broken, "exit"), 2) as pool:
        for process in multiprocessing.active_children():
            process.join()
        with pytest.raises(WorkerError, match="could not start: its process ended with exit code 7"):
            roll(pool)


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


class Helped(ShortPlanar):
    """Starts a process of its own, which holds every pipe of its parent and outlives it; notes what happens."""

    def __init__(self, folder, closing=None):
        super().__init__()
        self.folder, self.closing = folder, closing
        if helper := os.fork():
            (folder / f"helper_{helper}").touch()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
            os._exit(0)

    def close(self):
        (self.folder / f"closed_{os.getpid()}").touch()
        time.sleep(self.closing or 0)


def helpers(folder):
    return [int(file.name.partition("_")[2]) for file in folder.glob("helper_*")]


def all_end(processes):
    deadline = time.monotonic() + 5
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, processes))


reads_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@reads_proc
@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("closing", [0, 600])
def test_simulators_are_closed_and_their_helpers_end(policies, alone, tmp_path, closing):
    with (
        warnings.catch_warnings(record=True) as given,
        RolloutPool(policies, partial(Helped, tmp_path, closing), 2, patience=0.3) as pool,
    ):
        warnings.simplefilter("always")
        processes = multiprocessing.active_children()
        assert roll(pool) == alone
        assert len(helpers(tmp_path)) == 2
        assert all(map(is_running, helpers(tmp_path)))
    assert {file.name for file in tmp_path.glob("closed_*")} == {f"closed_{process.pid}" for process in processes}
    assert all_end(helpers(tmp_path))
    said = [str(warning.message) for warning in given]
    hangs = "the simulator hangs: close() took longer than env_patience=0.3 seconds (default 600)"
    assert said == ([hangs] * 2 if closing else [])


@reads_proc
@pytest.mark.usefixtures("quick_start")
def test_a_killed_process_whose_helper_holds_the_pipe_is_replaced(policies, alone, tmp_path):
    with RolloutPool(policies, partial(Helped, tmp_path), 2) as pool:
        run = pool.run(CELLS, TASKS)
        results = dict([next(run)])
        while len(before := helpers(tmp_path)) < 2:  # the other process may still be making its environment
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        results |= dict(run)
        assert undisturbed(results) == alone
        assert len(set(map(is_running, before))) == 2  # the helper of the one that was killed has ended
    assert all_end(helpers(tmp_path))


def test_the_last_words_of_a_process_that_ended_meanwhile_are_heard(monkeypatch):
    """It sends them and ends while the caller deals with the message of another one."""
    last, context = Fault("the simulator's words", refused=True), multiprocessing.get_context("fork")

    def started(target):
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs,), daemon=True)
        process.start()
        return SimpleNamespace(connection=ours, process=process, late=lambda patience: "")

    first = started(lambda connection: (connection.send("first"), time.sleep(60)))
    second = started(lambda connection: None)
    second.process.join()
    sender, second.connection = context.Pipe()
    pool = SimpleNamespace(_workers=[first, second], _patience=60.0)
    monkeypatch.setattr(workers, "wait", lambda connections, timeout: connections[:1])
    messages = RolloutPool._messages(pool)
    assert next(messages)[1] == "first"
    sender.send(last)
    assert next(messages)[1] == last
    first.process.kill()
    first.process.join()


@reads_proc
@pytest.mark.usefixtures("quick_start")
def test_processes_and_their_helpers_end_with_a_parent_that_is_killed(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            with RolloutPool(policies, partial(Helped, tmp_path), 4) as pool:
                tasks = itertools.product(range(len(CELLS)), range(10_000))
                for number, _ in enumerate(pool.run(CELLS, list(tasks))):
                    if number == 10:
                        children = [str(process.pid) for process in multiprocessing.active_children()]
                        os.write(write, " ".join(children).encode())
        finally:
            os._exit(1)
    try:
        children = [int(pid) for pid in os.read(read, 1000).split()]
        while len(started := helpers(tmp_path)) < 4:  # the other process may still be making its environments
            time.sleep(0.01)
        children += started
        assert len(children) == 2 + 4
        assert all(is_running(pid) for pid in children)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        os.close(read)
        os.close(write)
    assert all_end(children)
    assert [file.name for file in tmp_path.iterdir() if "_" not in file.name] == []  # nor any file


@pytest.mark.usefixtures("quick_start")
def test_a_temporary_folder_that_cannot_be_written_is_one_sentence(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(WorkerError, match=r"the policies cannot be written .*: name a folder with room in TMPDIR"):
        RolloutPool(policies, PLANAR, 2)


SCRIPT = """
import torch

from policy import DiffusionPolicy, Sampler
from policy.common.errors import WorkerError
from policy.rollout.cells import Cell
from policy.rollout.handover import ALIGNMENT
from policy.rollout.workers import RolloutPool
from tests.conftest import ENVIRONMENT, PLANAR_CONFIG, ROOT
from tests.rollout.short import ShortPlanar


def main():
    policies = [DiffusionPolicy(PLANAR_CONFIG).eval().requires_grad_(False) for _ in range(COUNT)]
    cells = [Cell(policy=n, sampler=Sampler(ddim_steps=1), execution_horizon=8) for n in range(COUNT)]
    with RolloutPool(policies, ShortPlanar, 2, workers=2) as pool:
        print(len(list(pool.run(cells, [(n, 1) for n in range(COUNT)]))), "episodes")

"""


def run_alone(folder, script, *before):
    (folder / "script.py").write_text(script)
    command = [*before, sys.executable, str(folder / "script.py")]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow  # starts three processes
def test_a_script_without_the_main_guard_is_one_sentence(tmp_path):
    call = "try:\n    main()\nexcept WorkerError as error:\n    print('said:', error)\n"
    done = run_alone(tmp_path, SCRIPT.replace("COUNT", "1") + call)
    said = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert len(said) == 1
    assert "script.py, which starts rollouts itself; put what the script does under `if __name__ == " in said[0]
    assert done.stderr == ""


@pytest.mark.slow  # starts three processes
def test_the_shared_memory_of_a_container_is_enough_for_many_checkpoints(tmp_path):
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" "$@"']
    if shutil.which("unshare") is None or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a small /dev/shm")
    done = run_alone(tmp_path, SCRIPT.replace("COUNT", "12") + 'if __name__ == "__main__":\n    main()\n', *mounted)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12 episodes\n", "")


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


class LosesTheFirstSignal(PlanarEnv):
    """Its process swallows one SIGTERM, as code in which no exception can be raised does."""

    def __init__(self):
        super().__init__()
        leave = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, leave))


@pytest.mark.usefixtures("quick_start")
def test_a_process_that_lost_the_signal_to_end_is_asked_again(policies, monkeypatch):
    monkeypatch.setattr(workers, "ASK_AGAIN", 0.1)
    with RolloutPool(policies, LosesTheFirstSignal, 2) as pool:
        roll(pool)
        started = time.monotonic()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("num_envs", [0, -1])
def test_a_pool_needs_an_environment(policies, num_envs):
    with pytest.raises(ValueError, match=f"num_envs must be 1 or more; got {num_envs}"):
        RolloutPool(policies, PLANAR, num_envs)
