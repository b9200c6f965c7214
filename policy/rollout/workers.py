"""Rollouts in several processes: each has environments of its own and one thread, and all share the policies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from policy.common.errors import WorkerError
from policy.common.machine import available_cores, outside_current_folder
from policy.common.plugins import loaded_plugins
from policy.inference.backends import SamplerProgram
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout import handover
from policy.rollout.cells import Cell, Programs, Task, portable_programs
from policy.rollout.central import CentralPlanner, PlansDue, without_weights
from policy.rollout.episodes import Env, MakeEnv, check_num_envs, run_in_process
from policy.rollout.handover import standard_error_into
from policy.rollout.probe import Trajectory, difference, unrepeatable, warning
from policy.rollout.process import Fault, serve
from policy.rollout.watch import ENV_PATIENCE, Clock, check_patience, overdue, watched
from policy.statistics.results import EpisodeResult

MAX_ATTEMPTS = 3
# Seconds that a process may take to import everything, on a busy machine with a slow disk.
START_PATIENCE = 600.0
# Seconds in which simulators may close when a run was interrupted; a command ends within ten.
CLOSE_PATIENCE = 5.0
# Seconds within which a process begins to close its simulators; each has its patience from then on.
CLOSE_BEGINS = 1.0
# Seconds after which a process that is still there is asked again to end.
ASK_AGAIN = 1.0


@dataclass
class _Worker:
    """A process, as its parent sees it."""

    process: Any
    connection: Connection
    num_envs: int
    clock: Clock
    log: IO[bytes]
    started: float = field(default_factory=time.monotonic)
    ready: bool = False
    asking: int = 0  # environments that will still ask for a task
    assigned: set[Task] = field(default_factory=set)

    def send(self, message: Any) -> None:
        with suppress(OSError):  # if the process has ended, the next read from it shows that
            self.connection.send(message)

    def answer(self, task: Task | None) -> None:
        """Give a free environment its next task, or None if there are no more."""
        if task is None:
            self.asking -= 1
        else:
            self.assigned.add(task)
        self.send(task)

    def late(self, patience: float) -> str:
        """Why the process counts as hanging; empty if it does not."""
        if not (self.ready or self.clock[0]) and time.monotonic() - self.started > START_PATIENCE:
            return f"its process did not start within {START_PATIENCE:.0f} s"
        return overdue(self.clock, patience)

    def was_killed(self) -> bool:
        """Whether somebody else ended the process, which says nothing of the next one."""
        return (self.process.exitcode or 0) < 0

    def kill(self) -> None:
        """End the process, and all processes that its simulators have started."""
        # Before `join`: as long as the process is there, its number means no other group.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.log.close()


class RolloutPool:
    """Runs episodes on all cores; the result of an episode does not depend on how many run at once.

    With one environment or on one core, everything runs in this process. Otherwise each core gets a spawned process
    with its share of the environments, and a free environment takes the next task. On a CPU each process samples its
    own plans; a GPU samples those of all processes from this one. A process that crashes,
    raises or hangs is replaced. Its unfinished episodes are run again with the same seeds, after all others and each
    alone in a process, so that an episode that always fails does not hold up others and is identified by its seed. A
    process that fails before its environments are made ends the run, because the next one would fail as well.

    Each process leads a process group. It closes its environments when the pool is closed; then the group is killed, so
    that nothing remains of what simulators have started.

    Args:
        policies: the policies that cells refer to.
        make_env: makes one environment; picklable.
        num_envs: number of environments in all processes together.
        workers: number of processes; by default one per core.
        patience: seconds that one call of a simulator may take before it counts as hanging.
        plans_here: sample all plans in this process; by default if the policies are on a GPU.

    Raises:
        ValueError: `num_envs` below 1, or a patience that is not above 0.
        WorkerError: the policies cannot be handed to the processes, because the disk is full.
    """

    def __init__(
        self,
        policies: Sequence[DiffusionPolicy],
        make_env: MakeEnv,
        num_envs: int,
        *,
        workers: int | None = None,
        patience: float = ENV_PATIENCE,
        plans_here: bool | None = None,
    ) -> None:
        check_num_envs(num_envs)
        check_patience(patience)
        _check_main_guard()
        self._policies = policies
        self._make_env = make_env
        self._patience = patience
        self._cleanup = ExitStack()
        self._workers: list[_Worker] = []
        self._envs: list[Env] = []
        self._programs: dict[Cell, SamplerProgram] = {}
        self._sent: Programs | None = None  # the programs of the processes, None if they sample nothing themselves
        self._plans_here = policies[0].device.type != "cpu" if plans_here is None else plans_here
        count = min(num_envs, workers or available_cores())
        if count == 1 or self._plans_here:
            handover.align(policies)
        with ExitStack() as undo:  # if this fails half-way
            undo.push(self._cleanup.__exit__)
            if count == 1:
                make = self._cleanup.enter_context(watched(make_env, patience))
                for _ in range(num_envs):
                    self._envs.append(make())
                    self._cleanup.callback(self._envs[-1].close)
            else:
                self._parcel = self._cleanup.enter_context(handover.parcel(self._in_processes()))
                self._cleanup.push(self._stop)
                for index in range(count):
                    self._workers.append(self._started(num_envs // count + (index < num_envs % count)))
            undo.pop_all()

    def run(self, cells: Sequence[Cell], tasks: Sequence[Task]) -> Iterator[tuple[Task, EpisodeResult]]:
        """Run one episode per task.

        Args:
            cells: the cells that the tasks refer to.
            tasks: distinct tasks.

        Yields:
            Each task with its result, in the order in which the episodes end.

        Raises:
            ValueError: the environment does not keep to its contract.
            WorkerError: an episode failed three times, processes failed repeatedly without finishing any episode, or
                one failed before its environments were made.
        """
        if not self._workers:
            yield from run_in_process(self._policies, self._envs, cells, tasks)
            return
        planner = self._begin(cells)
        fresh, suspects, unfinished = deque(tasks), deque[Task](), set(tasks)
        attempts, fruitless = Counter[Task](), 0
        # Goes on until every environment has been told that no task is left: all processes then wait for the next run.
        while unfinished or any(worker.asking for worker in self._workers):
            due: list[tuple[_Worker, PlansDue]] = []
            for worker, message in self._messages():
                match message:
                    case "ready":
                        worker.ready = True
                        worker.send((cells, self._sent))
                    case PlansDue():
                        due.append((worker, message))
                    case "next":
                        queue = fresh or (deque() if worker.assigned else suspects)
                        worker.answer(queue.popleft() if queue else None)
                    case (task, EpisodeResult() as result):
                        worker.assigned.discard(task)
                        unfinished.discard(task)
                        fruitless = 0
                        yield task, replace(result, attempts=1 + attempts[task])
                    case Fault(refused=True) as fault:
                        raise ValueError(fault.reason)
                    case Fault() as fault:
                        if not worker.ready and not worker.was_killed():
                            raise _no_start(fault)
                        attempts.update(worker.assigned)
                        fruitless += 1
                        hopeless = [seed for cell, seed in worker.assigned if attempts[cell, seed] == MAX_ATTEMPTS]
                        if hopeless:
                            reason = f"failed {MAX_ATTEMPTS} times: {fault.reason}"
                            raise WorkerError(f"the episode with seed {hopeless[0]} {reason}")
                        if fruitless == MAX_ATTEMPTS * len(self._workers):
                            raise WorkerError(f"rollout processes failed {fruitless} times in a row: {fault.reason}")
                        suspects.extend(sorted(worker.assigned))
                        self._replace(worker).asking = worker.num_envs
            if planner:
                for (worker, _), chunks in zip(due, planner.answer([plans for _, plans in due]), strict=True):
                    worker.send(chunks)

    def _in_processes(self) -> Sequence[DiffusionPolicy]:
        """The policies as the processes get them."""
        return without_weights(self._policies) if self._plans_here else self._policies

    def _begin(self, cells: Sequence[Cell]) -> CentralPlanner | None:
        """Let all processes begin to run cells; return what samples their plans, if that is not each of them."""
        if self._plans_here:
            planner, self._sent = CentralPlanner(self._policies, cells), None
        else:
            fresh = set(cells) - self._programs.keys()
            self._programs |= portable_programs(self._policies, fresh, self._parcel.folder)
            compiled = {number: self._programs[cell] for number, cell in enumerate(cells) if cell in self._programs}
            planner, self._sent = None, compiled
        for worker in list(self._workers):
            if worker.asking:  # an earlier run was abandoned before its end
                worker = self._replace(worker)
            worker.asking = worker.num_envs
            if worker.ready:
                worker.send((cells, self._sent))
        return planner

    def probe(self, seed: int) -> str:
        """Find out whether a seed fixes the episode, also in two processes where there are two.

        Args:
            seed: the first seed of the run.

        Returns:
            A warning, or an empty text if it does, or if the simulator crashed; the run itself shows that.

        Raises:
            ValueError: the environment does not keep to its contract.
            WorkerError: a process failed before its environments were made.
        """
        if not self._workers:
            return unrepeatable(self._envs[0], seed)[1]
        asked = self._workers[:2]
        found: dict[int, tuple[Trajectory, str]] = {}
        for worker in asked:
            worker.asking = 1
        while any(worker.asking for worker in asked):
            for worker, message in self._messages():
                match message:
                    case "ready":
                        worker.ready = True
                        if worker.asking:
                            worker.send(seed)
                    case (list(), str()):
                        worker.asking = 0
                        found[worker.process.pid] = message
                    case Fault(refused=True) as fault:
                        raise ValueError(fault.reason)
                    case Fault() as fault:
                        if not worker.ready and not worker.was_killed():
                            raise _no_start(fault)
                        self._replace(worker)
                        worker.asking = 0
        said = next((text for _, text in found.values() if text), "")
        if said or len(found) < 2:
            return said
        where = difference(*(path for path, _ in found.values()))
        return "" if where is None else warning(seed, f"ran in another process, {where}")

    def _messages(self) -> Iterator[tuple[_Worker, Any]]:
        """The messages that have come from the processes; a process sends nothing more after a fault."""
        ready = wait([worker.connection for worker in self._workers], timeout=1.0)
        for worker in list(self._workers):
            is_alive = worker.process.is_alive()
            # The last words of a process that ended while the messages before were dealt with.
            if worker.connection in ready or (not is_alive and worker.connection.poll()):
                try:
                    yield worker, worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join(1)
                    yield worker, Fault(_end_of(worker))
            elif not is_alive:  # what its simulator started may hold the connection open
                yield worker, Fault(_end_of(worker))
            elif reason := worker.late(self._patience):
                yield worker, Fault(reason)

    def _started(self, num_envs: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        clock = context.RawArray("d", 2)
        log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        with standard_error_into(log) as standard_error, outside_current_folder():
            arguments = (standard_error, loaded_plugins(), self._parcel, self._make_env, num_envs, theirs, clock)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
        theirs.close()  # so that the end of the process is noticed at once
        return _Worker(process, connection, num_envs, clock, log)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.kill()
        fresh = self._started(worker.num_envs)
        self._workers[self._workers.index(worker)] = fresh
        return fresh

    def _stop(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let the processes close their environments, and kill what is left."""
        patience = self._patience if error is None else min(self._patience, CLOSE_PATIENCE)
        try:
            for worker in self._workers:
                worker.connection.close()  # which ends an idle one even if its simulator took the signal for itself
            deadline, ask = time.monotonic() + patience + (CLOSE_BEGINS if error is None else 0.0), 0.0
            # Not `join`, which waits for the end of a pipe that what a simulator has started may hold open.
            while (now := time.monotonic()) < deadline and any(
                worker.process.is_alive() and not overdue(worker.clock, patience) for worker in self._workers
            ):
                if now >= ask:  # once more from time to time: a process that is just starting may lose the first one
                    ask = now + ASK_AGAIN
                    for worker in self._workers:
                        worker.process.terminate()
                time.sleep(0.01)
            for worker in self._workers:
                if error is None and worker.process.is_alive() and (late := overdue(worker.clock, patience)):
                    warnings.warn(late, stacklevel=2)
        finally:
            for worker in self._workers:
                worker.kill()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.__exit__(kind, error, trace)


def _end_of(worker: _Worker) -> str:
    """Say why a process ended: if it was before its environments were made, in the last line of what it said."""
    ended = f"its process ended with exit code {worker.process.exitcode}"
    if worker.ready:
        return ended
    worker.log.seek(0)
    said = worker.log.read().decode(errors="replace").strip().splitlines()
    main = getattr(sys.modules["__main__"], "__file__", None)
    if main and not (Path(main).is_file() and "__main__" in Path(main).read_text(errors="replace")):
        return (
            f"it imports {main}, which starts rollouts itself; put what the script does under"
            " `if __name__ == '__main__':`, or use num_envs=1"
        )
    return said[-1] if said else ended


def _no_start(fault: Fault) -> WorkerError:
    return WorkerError(f"a rollout process could not start: {fault.reason}")


def _check_main_guard() -> None:
    """End a process that imports a script which starts rollouts again; its parent says what to do."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(1)
