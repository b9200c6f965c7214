"""Rollouts in several processes: each has its own environments, its own copy of the policies, and one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch

from policy.common.device import available_cores
from policy.common.errors import WorkerError
from policy.common.plugins import load_plugins, loaded_plugins
from policy.inference.backends import SamplerProgram
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.cells import Cell, Programs, Task, controllers_of, portable_programs
from policy.rollout.episodes import Env, MakeEnv, check_num_envs, run_episodes, run_in_process
from policy.statistics.results import EpisodeResult

MAX_ATTEMPTS = 3


@dataclass
class _Worker:
    """The parent's side of a process."""

    process: Any
    connection: Connection
    num_envs: int
    asking: int = 0  # environments that will still ask for a task
    assigned: set[Task] = field(default_factory=set)
    heard: float = field(default_factory=time.monotonic)

    def give(self, cells: Sequence[Cell], programs: Programs) -> None:
        """Begin a run."""
        self.asking = self.num_envs
        self.heard = time.monotonic()
        self._send((cells, programs))

    def answer(self, task: Task | None) -> None:
        """Give a free environment its next task, or none."""
        if task is None:
            self.asking -= 1
        else:
            self.assigned.add(task)
        self._send(task)

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # a process that has ended is noticed when it is next read from
            self.connection.send(message)


class RolloutPool:
    """Runs episodes on all cores and gives each its seed's own result, however many run at once.

    With one environment, or on one core, everything runs in this process. Otherwise each core gets a spawned process
    with its share of the environments; a free environment takes the next task. A process that crashes, raises or hangs
    is replaced. Its unfinished episodes are run again with the same seeds, last and each alone in a process: one that
    always fails holds up no other, and is known by its seed.

    Args:
        policies: what acts.
        make_env: makes one environment; picklable.
        num_envs: environments in all.
        workers: processes; by default one a core.
        patience: seconds without a word from a process after which it counts as hanging.

    Raises:
        ValueError: `num_envs` below 1.
    """

    def __init__(
        self,
        policies: Sequence[DiffusionPolicy],
        make_env: MakeEnv,
        num_envs: int,
        *,
        workers: int | None = None,
        patience: float = 600.0,
    ) -> None:
        check_num_envs(num_envs)
        self._policies = policies
        self._make_env = make_env
        self._patience = patience
        self._cleanup = ExitStack()
        self._workers: list[_Worker] = []
        self._envs: list[Env] = []
        self._programs: dict[Cell, SamplerProgram] = {}
        # A GPU is shared by batching in one process, cores by processes.
        count = min(num_envs, workers or available_cores()) if policies[0].device.type == "cpu" else 1
        if count == 1:
            self._envs = [make_env() for _ in range(num_envs)]
            for env in self._envs:
                self._cleanup.callback(env.close)
            return
        self._cleanup.callback(self._stop)
        for index in range(count):
            self._workers.append(self._started(num_envs // count + (index < num_envs % count)))

    def run(self, cells: Sequence[Cell], tasks: Sequence[Task]) -> Iterator[tuple[Task, EpisodeResult]]:
        """Run one episode per task.

        Args:
            cells: what the tasks refer to.
            tasks: distinct ones.

        Yields:
            Each task with its result, as they come, in any order.

        Raises:
            WorkerError: an episode failed three times, or processes fail again and again before they finish any.
        """
        if not self._workers:
            yield from run_in_process(self._policies, self._envs, cells, tasks)
            return
        self._programs |= portable_programs(self._policies, set(cells) - self._programs.keys())
        programs = {number: self._programs[cell] for number, cell in enumerate(cells) if cell in self._programs}
        fresh, suspects, unfinished = deque(tasks), deque[Task](), set(tasks)
        attempts, fruitless = Counter[Task](), 0
        for worker in list(self._workers):
            if worker.asking:  # an earlier run was left before its end
                self._replace(worker, cells, programs)
            else:
                worker.give(cells, programs)
        # Also until every environment has been told that there is no more: then all processes wait for the next run.
        while unfinished or any(worker.asking for worker in self._workers):
            for worker, message in self._messages():
                match message:
                    case "next":
                        queue = fresh or (deque() if worker.assigned else suspects)
                        worker.answer(queue.popleft() if queue else None)
                    case (task, EpisodeResult() as result):
                        worker.assigned.discard(task)
                        unfinished.discard(task)
                        fruitless = 0
                        yield task, replace(result, attempts=1 + attempts[task])
                    case _Fault() as fault:
                        attempts.update(worker.assigned)
                        fruitless += 1
                        hopeless = [seed for cell, seed in worker.assigned if attempts[cell, seed] == MAX_ATTEMPTS]
                        if hopeless:
                            reason = f"failed {MAX_ATTEMPTS} times: {fault.reason}"
                            raise WorkerError(f"the episode with seed {hopeless[0]} {reason}")
                        if fruitless == MAX_ATTEMPTS * len(self._workers):
                            raise WorkerError(f"rollout processes failed {fruitless} times in a row: {fault.reason}")
                        suspects.extend(sorted(worker.assigned))
                        self._replace(worker, cells, programs)

    def _messages(self) -> Iterator[tuple[_Worker, Any]]:
        """Whatever the processes have to say by now; a fault is the last that is heard of one."""
        ready = wait([worker.connection for worker in self._workers], timeout=1.0)
        now = time.monotonic()  # what the caller does between two messages is no silence of the others
        for worker in list(self._workers):
            if worker.connection in ready:
                worker.heard = time.monotonic()
                try:
                    yield worker, worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join(1)
                    yield worker, _Fault(f"its process ended with exit code {worker.process.exitcode}")
            elif worker.asking and now - worker.heard > self._patience:
                yield worker, _Fault(f"its process said nothing for {self._patience:.0f} s")

    def _started(self, num_envs: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        arguments = (loaded_plugins(), self._policies, self._make_env, num_envs, theirs)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the process's end is seen at once
        return _Worker(process, connection, num_envs)

    def _replace(self, worker: _Worker, cells: Sequence[Cell], programs: Programs) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        fresh = self._started(worker.num_envs)
        self._workers[self._workers.index(worker)] = fresh
        fresh.give(cells, programs)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()


@dataclass(frozen=True)
class _Fault:
    """Why a process can do no more."""

    reason: str


def _serve(
    plugins: Sequence[str],
    policies: Sequence[DiffusionPolicy],
    make_env: MakeEnv,
    num_envs: int,
    connection: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # two processes with two spinning threads each would crawl

    def next_task() -> Task | None:
        connection.send("next")
        task: Task | None = connection.recv()
        return task

    try:
        load_plugins(plugins)
        envs = [make_env() for _ in range(num_envs)]
        while True:
            cells, programs = connection.recv()
            controllers = controllers_of(policies, cells, envs[0].action_space, programs)
            for result in run_episodes(controllers, envs, next_task):
                connection.send(result)
    except Exception as error:
        traceback.print_exc()
        connection.send(_Fault(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its processes: they must not run on without it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
