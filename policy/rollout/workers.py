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
from policy.common.machine import leave_children_alone, outside_current_folder
from policy.common.plugins import load_plugins, loaded_plugins
from policy.inference.backends import SamplerProgram
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.cells import Cell, Programs, Task, controllers_of, portable_programs
from policy.rollout.episodes import Env, MakeEnv, check_num_envs, run_episodes, run_in_process
from policy.statistics.results import EpisodeResult

MAX_ATTEMPTS = 3


@dataclass
class _Worker:
    """A process, as its parent sees it."""

    process: Any
    connection: Connection
    num_envs: int
    asking: int = 0  # environments that will still ask for a task
    assigned: set[Task] = field(default_factory=set)
    heard: float = field(default_factory=time.monotonic)

    def give(self, cells: Sequence[Cell], programs: Programs) -> None:
        """Start a run."""
        self.asking = self.num_envs
        self.heard = time.monotonic()
        self._send((cells, programs))

    def answer(self, task: Task | None) -> None:
        """Give a free environment its next task, or None if there are no more."""
        if task is None:
            self.asking -= 1
        else:
            self.assigned.add(task)
        self._send(task)

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # if the process has ended, the next read from it shows that
            self.connection.send(message)


class RolloutPool:
    """Runs episodes on all cores; the result of an episode does not depend on how many run at once.

    With one environment, on one core or on a GPU, everything runs in this process. Otherwise each core gets a spawned
    process with its share of the environments, and a free environment takes the next task. A process that crashes,
    raises or hangs is replaced. Its unfinished episodes are run again with the same seeds, after all others and each
    alone in a process, so that an episode that always fails does not hold up others and is identified by its seed.

    Args:
        policies: the policies that cells refer to.
        make_env: makes one environment; picklable.
        num_envs: number of environments in all processes together.
        workers: number of processes; by default one per core.
        patience: seconds without a message from a process after which it counts as hanging.

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
        # A GPU serves all environments in batches from one process; on the CPU, each core has its own process.
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
            cells: the cells that the tasks refer to.
            tasks: distinct tasks.

        Yields:
            Each task with its result, in the order in which the episodes end.

        Raises:
            ValueError: the environment does not keep to its contract.
            WorkerError: an episode failed three times, or processes failed repeatedly without finishing any episode.
        """
        if not self._workers:
            yield from run_in_process(self._policies, self._envs, cells, tasks)
            return
        self._programs |= portable_programs(self._policies, set(cells) - self._programs.keys())
        programs = {number: self._programs[cell] for number, cell in enumerate(cells) if cell in self._programs}
        fresh, suspects, unfinished = deque(tasks), deque[Task](), set(tasks)
        attempts, fruitless = Counter[Task](), 0
        for worker in list(self._workers):
            if worker.asking:  # an earlier run was abandoned before its end
                self._replace(worker, cells, programs)
            else:
                worker.give(cells, programs)
        # Goes on until every environment has been told that no task is left: all processes then wait for the next run.
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
                    case _Fault(refused=True) as fault:
                        raise ValueError(fault.reason)
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
        """The messages that have come from the processes; a process sends nothing more after a fault."""
        ready = wait([worker.connection for worker in self._workers], timeout=1.0)
        now = time.monotonic()  # read once, so that the caller's time between two messages is not counted as silence
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
        with outside_current_folder():
            process.start()
        theirs.close()  # so that the end of the process is noticed at once
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
    """The reason why a process cannot continue.

    Attributes:
        reason: in words.
        refused: whether another attempt would end in the same way, because something is wrong with the input.
    """

    reason: str
    refused: bool = False


def _serve(
    plugins: Sequence[str],
    policies: Sequence[DiffusionPolicy],
    make_env: MakeEnv,
    num_envs: int,
    connection: Connection,
) -> None:
    leave_children_alone()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # processes with several spinning threads each would slow each other down

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
    except ValueError as error:
        connection.send(_Fault(str(error), refused=True))
    except Exception as error:
        traceback.print_exc()
        connection.send(_Fault(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """End this process when its parent ends: a parent that was killed cannot stop its processes itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
