"""Thousands of rollouts, hundreds of checkpoints: memory and file descriptors stay where they were."""

import gc
import itertools
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import envs
from policy import DiffusionPolicy, Sampler, TrainSettings, load_checkpoint, save_checkpoint
from policy.checkpoint import keep_checkpoint, resume_training
from policy.data.demonstrations import Demonstrations
from policy.rollout.cells import Cell
from policy.rollout.workers import RolloutPool
from policy.training.preparation import prepare_run
from tests.conftest import PLANAR_CONFIG, randomize, small_config

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")

CELLS = [
    Cell(sampler=Sampler(ddim_steps=2), execution_horizon=8, backend="fused"),
    Cell(sampler=Sampler(ddim_steps=4, eta=1.0), execution_horizon=4, policy=1),
]
PLANAR = partial(envs.make, "planar")


@dataclass
class Watch:
    """Resident memory and open file descriptors of some processes together, mark by mark."""

    what: str
    memory: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def mark(self, processes: Sequence[int] = ()) -> None:
        """Look at these processes, or at this one."""
        gc.collect()
        folders = [Path("/proc") / str(process) for process in processes or [os.getpid()]]
        pages = sum(int((folder / "statm").read_text().split()[1]) for folder in folders)
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.descriptors.append(sum(len(list((folder / "fd").iterdir())) for folder in folders))

    def check(self, most: float, warm_up: float = 0.2) -> None:
        """Neither has grown since the warm-up, but for so many megabytes."""
        start = round(warm_up * len(self.memory))
        places = {"start": 0, "warm": start, "middle": len(self.memory) // 2, "end": -1}
        said = ", ".join(f"{name} {self.memory[at]:.1f} MB {self.descriptors[at]} fds" for name, at in places.items())
        print(f"{self.what}: {said}")
        # The last quarter's lowest: what comes and goes is not what stays.
        grown = min(self.memory[-max(1, len(self.memory) // 4) :]) - self.memory[start]
        assert grown < most, f"{self.what}: memory grew by {grown:.1f} MB"
        assert self.descriptors[-1] <= self.descriptors[start], f"{self.what}: {self.descriptors}"


def repeat(watch: Watch, times: int, work: Callable[[int], object]) -> None:
    for number in range(times):
        work(number)
        watch.mark()


def fresh_megabyte() -> mmap.mmap:
    """Memory from the system: an array may find room in what earlier tests of the process gave back."""
    mapped = mmap.mmap(-1, 1_000_000)
    mapped.write(b"\1" * len(mapped))
    return mapped


@pytest.fixture(autouse=True)
def what_was_there_before():
    """Leave objects of other tests alone: looking through all of them at each mark would take most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("leak", "reason"),
    [
        (lambda _: fresh_megabyte(), "memory grew"),
        (lambda _: open("/dev/null"), "soak: "),  # noqa: SIM115
    ],
)
def test_a_leak_is_found(leak, reason):
    """A megabyte, or a file, a round."""
    kept, watch = [], Watch("soak")
    repeat(watch, 40, lambda number: kept.append(leak(number)))
    with pytest.raises(AssertionError, match=reason):
        watch.check(most=16)
    for left in kept:
        getattr(left, "close", bool)()


def test_what_comes_and_goes_is_no_leak():
    watch = Watch("soak")
    repeat(watch, 40, lambda _: np.ones(100_000))
    watch.check(most=16)


@pytest.fixture(scope="module")
def policies() -> list[DiffusionPolicy]:
    pair = [DiffusionPolicy(PLANAR_CONFIG).eval().requires_grad_(False) for _ in range(2)]
    for policy in pair:
        randomize(policy)
    return pair


def roll(pool: RolloutPool, first: int, count: int) -> None:
    """So many episodes, half of them for each cell."""
    tasks = list(itertools.product(range(len(CELLS)), range(first, first + count // len(CELLS))))
    results = list(pool.run(CELLS, tasks))
    assert sorted(task for task, _ in results) == sorted(tasks)
    assert {result.attempts for _, result in results} == {1}


@pytest.mark.reliability
def test_two_thousand_rollouts_leave_memory_and_descriptors_as_they_were(policies):
    began = time.perf_counter()
    alone = Watch("1,000 rollouts in this process, a pool for every 50")
    for number in range(20):
        with RolloutPool(policies, PLANAR, 8, workers=1) as pool:
            roll(pool, 100 * number, 50)
        alone.mark()
    alone.check(most=16)

    parent, workers = Watch("their parent"), Watch("600 rollouts in two processes, a run for every 30")
    with RolloutPool(policies, PLANAR, 8, workers=2) as pool:
        for number in range(20):
            roll(pool, 100 * number, 30)
            processes = [process.pid for process in multiprocessing.active_children()]
            assert len(processes) == 2
            workers.mark(processes)
            parent.mark()
    workers.check(most=16)
    parent.check(most=16)

    again = Watch("400 rollouts in processes, a pool for every 50")
    for number in range(8):
        with RolloutPool(policies, PLANAR, 8, workers=2) as pool:
            roll(pool, 100 * number, 50)
        again.mark()
    again.check(most=16)
    print(f"2,000 rollouts in {time.perf_counter() - began:.0f} s")


@pytest.mark.reliability
def test_two_hundred_checkpoint_cycles_leave_memory_and_descriptors_as_they_were(tmp_path):
    config = small_config(obs_size=64, hidden_size=256)
    states = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    data = Demonstrations(
        observations={"state": states}, actions=-states[:, :2], episode_ends=np.array([8, 20], dtype=np.int64)
    )
    settings, checkpoint = {"seed": 0}, tmp_path / "checkpoint"

    def fresh():
        return prepare_run(config, data, TrainSettings(val_fraction=0.0), seed=0, device="cpu").state

    state = fresh()
    sum(p.square().sum() for p in state.policy.parameters()).backward()
    state.optimizer.step()

    began, watch = time.perf_counter(), Watch("200 checkpoint cycles: save, keep, load, resume")
    for number in range(1, 201):
        state.step = number
        state.history = [*state.history[-20:], {"step": number, "val/loss": 1 / number}]
        save_checkpoint(checkpoint, state, env=None, execution_horizon=8, training=settings)
        keep_checkpoint(checkpoint, state, keep_last=3)
        loaded = load_checkpoint(checkpoint)
        assert loaded.training["step"] == number
        state = fresh()
        resume_training(checkpoint, state, settings)
        assert state.step == number
        watch.mark()
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    print(f"a checkpoint of {size / 1e6:.1f} MB, {time.perf_counter() - began:.0f} s")
    watch.check(most=16)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best",
        *(f"step_{number:07d}" for number in (198, 199, 200)),
    ]
