"""A watch on simulators: a call that never returns ends the work after `env_patience` seconds, not never."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import gymnasium

from policy.common.errors import WorkerError

# Seconds that a simulator's call may take. The first may load a scene or compile shaders.
ENV_PATIENCE = 600.0
# Seconds after a signal within which a simulator's call that holds it up must return; a command ends within ten.
SIGNAL_PATIENCE = 7.0

POLL_S = 0.25

Env = gymnasium.Env[Any, Any]
Returned = TypeVar("Returned")

# The calls of a simulator, by their number on the clock.
CALLS = ("making it", "reset()", "step()", "render()", "close()")
_MAKE, _RESET, _STEP, _RENDER, _CLOSE = range(len(CALLS))

# When the call that is going on began (0 for none), on the system's monotonic clock, and its number. Two numbers that a
# process may share with its parent.
Clock = MutableSequence[float]


class WatchedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose calls are noted.

    Args:
        make: makes the environment, which is a call too.
        clock: the calls are noted there.
    """

    def __init__(self, make: Callable[[], Env], clock: Clock) -> None:
        self._clock = clock
        super().__init__(self._timed(_MAKE, make))

    def _timed(self, call: int, function: Callable[..., Returned], *arguments: Any, **settings: Any) -> Returned:
        self._clock[1] = call
        self._clock[0] = time.monotonic()
        try:
            return function(*arguments, **settings)
        finally:
            self._clock[0] = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See `gymnasium.Env.reset`."""
        given = {} if options is None else {"options": options}
        return self._timed(_RESET, self.env.reset, seed=seed, **given)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See `gymnasium.Env.step`."""
        return self._timed(_STEP, self.env.step, action)

    def render(self) -> Any:
        """See `gymnasium.Env.render`."""
        return self._timed(_RENDER, self.env.render)

    def close(self) -> None:
        """See `gymnasium.Env.close`."""
        self._timed(_CLOSE, self.env.close)


class _Hanging(KeyboardInterrupt):
    """Raised inside a simulator's call that takes too long."""


def overdue(clock: Clock, patience: float) -> str:
    """Say which call has taken longer than `patience` seconds; empty if none has."""
    began, call = clock[0], clock[1]
    if not began or time.monotonic() - began <= patience:
        return ""
    return _hangs(int(call), patience)


def _hangs(call: int, patience: float) -> str:
    return (
        f"the simulator hangs: {CALLS[call]} took longer than env_patience={patience:g} seconds (default"
        f" {ENV_PATIENCE:g})"
    )


def check_patience(patience: float) -> None:
    """Reject a patience that is not a positive number.

    Raises:
        ValueError: it is 0, negative or not finite.
    """
    if not (patience > 0 and math.isfinite(patience)):
        raise ValueError(f"env_patience must be a number of seconds above 0; got {patience}")


@contextmanager
def watched(make_env: Callable[..., Env], patience: float) -> Iterator[Callable[..., Env]]:
    """Watch environments that run in this process.

    A call that takes longer than `patience` is interrupted, as by Ctrl-C. If that does not help, because the call does
    not return to Python, the process ends with exit code 1; also with 130, when a signal has been waiting for such a
    call for `SIGNAL_PATIENCE` seconds. A call that never lets other Python threads run cannot be ended from inside this
    process; with several processes (`num_envs` of 2 or more), the parent ends it.

    Args:
        make_env: makes an environment.
        patience: seconds that a call may take.

    Yields:
        The same with watched environments.

    Raises:
        WorkerError: a call took longer, and was interrupted.
    """
    clock = [0.0, 0.0]

    def make(**settings: Any) -> Env:
        with _signals_kept():
            return WatchedEnv(partial(make_env, **settings), clock)

    try:
        with _guard(clock, patience):
            yield make
    except _Hanging as error:
        raise WorkerError(str(error)) from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the handlers of Ctrl-C and SIGTERM back: some simulators install their own, and could not be stopped."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def helpers_ended() -> Iterator[None]:
    """Kill the processes that a simulator starts in this block and leaves behind; Linux only.

    For blocks in which nothing but a simulator starts processes.
    """
    before = _children()
    try:
        yield
    finally:
        for process in _children() - before:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _children() -> set[int]:
    """The processes that this one has started, without multiprocessing's own."""
    found = set[int]()
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended since it was listed
            found.update(map(int, file.read_text().split()))
    return found - {getattr(resource_tracker._resource_tracker, "_pid", None)}


@contextmanager
def _guard(clock: Clock, patience: float) -> Iterator[None]:
    """Run the thread that looks at the time; signals reach it through a pipe while the main thread is busy."""
    if threading.current_thread() is not threading.main_thread():  # which alone can be interrupted
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if clock[0]:  # the call may have returned meanwhile
            raise _Hanging(_hangs(int(clock[1]), patience))

    handler = signal.signal(signal.SIGURG, interrupt)  # a signal that nothing happens at otherwise
    stop = threading.Event()
    arguments = (clock, patience, read, stop)
    thread = threading.Thread(target=_look, args=arguments, name="simulator watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        with suppress(OSError):
            os.write(write, b"\0")
        thread.join()
        signal.signal(signal.SIGURG, handler)
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


def _look(clock: Clock, patience: float, read: int, stop: threading.Event) -> None:
    interrupted, signalled = 0.0, 0.0
    while not stop.is_set():
        try:
            arrived = set(os.read(read, 100)) if select.select([read], [], [], POLL_S)[0] else set()
        except (OSError, ValueError):  # the simulator has closed what is not its own
            return
        if arrived & {signal.SIGINT, signal.SIGTERM}:
            signalled = time.monotonic()
        now, began = time.monotonic(), clock[0]
        if not began or stop.is_set():
            continue
        if began <= signalled < now - SIGNAL_PATIENCE:
            _end_process("stopped in the middle of a simulator's call, which did not return", 130)
        if now - began > patience + (SIGNAL_PATIENCE if interrupted == began else 0.0):
            if interrupted == began:
                _end_process(overdue(clock, patience), 1)
            interrupted = began
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)


def _end_process(reason: str, code: int) -> None:
    """End this process although its main thread does not come back from a call."""
    sys.stdout.flush()
    os.write(2, f"\nerror: {reason}; finished work is on disk\n".encode())
    os._exit(code)
