"""A watch on simulators: a call that never returns ends the work after `env_patience` seconds, not never."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Protocol

import gymnasium

from policy.common.errors import WorkerError

# Seconds that a simulator's call may take. The first may load a scene or compile shaders.
ENV_PATIENCE = 600.0
# Seconds after a signal within which a simulator's call that holds it up must return; a command ends within ten.
SIGNAL_PATIENCE = 7.0

Env = gymnasium.Env[Any, Any]


class Seconds(Protocol):
    """A number that a process may share with its parent."""

    value: float


class Calls:
    """Notes when the simulator's call that is going on began, on the system's monotonic clock; 0 between calls."""

    def __init__(self, began: Seconds) -> None:
        self._began = began

    def __enter__(self) -> None:
        self._began.value = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._began.value = 0.0


class WatchedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose calls are noted.

    Args:
        make: makes the environment, which is a call too.
        calls: notes them.
    """

    def __init__(self, make: Callable[[], Env], calls: Calls) -> None:
        with calls:
            super().__init__(make())
        self._calls = calls

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See `gymnasium.Env.reset`."""
        with self._calls:
            return self.env.reset(seed=seed, **({} if options is None else {"options": options}))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See `gymnasium.Env.step`."""
        with self._calls:
            return self.env.step(action)

    def render(self) -> Any:
        """See `gymnasium.Env.render`."""
        with self._calls:
            return self.env.render()

    def close(self) -> None:
        """See `gymnasium.Env.close`."""
        with self._calls:
            self.env.close()


class _Hanging(KeyboardInterrupt):
    """Raised inside a simulator's call that takes too long."""


def hanging(patience: float) -> str:
    """Say that a simulator's call did not return."""
    return (
        f"a call of the simulator did not return within {patience:g} s: mend the simulator, or allow more with"
        " env_patience=SECONDS"
    )


def check_patience(patience: float) -> None:
    """Reject a patience that is not a positive number.

    Raises:
        ValueError: it is 0, negative or NaN.
    """
    if not patience > 0:
        raise ValueError(f"env_patience is a number of seconds above 0; got {patience}")


@contextmanager
def watched(make_env: Callable[..., Env], patience: float) -> Iterator[Callable[..., Env]]:
    """Watch environments that run in this process.

    A call that takes longer than `patience` is interrupted, as by Ctrl-C. If that does not help, because the call does
    not return to Python, the process ends with exit code 1; also with 130, when a signal has been waiting for such a
    call for `SIGNAL_PATIENCE` seconds. A call that never lets other Python threads run cannot be ended from inside this
    process; several processes (`num_envs` of 2 or more) can end each other.

    Args:
        make_env: makes an environment.
        patience: seconds that a call may take.

    Yields:
        The same with watched environments.

    Raises:
        WorkerError: a call took longer, and was interrupted.
    """
    began = ctypes.c_double(0.0)
    calls = Calls(began)

    def make(**settings: Any) -> Env:
        return WatchedEnv(partial(make_env, **settings), calls)

    try:
        with _guard(began, patience):
            yield make
    except _Hanging as error:
        raise WorkerError(hanging(patience)) from error


@contextmanager
def _guard(began: Seconds, patience: float) -> Iterator[None]:
    """Run the thread that looks at the time; signals reach it through a pipe while the main thread is busy."""
    if threading.current_thread() is not threading.main_thread():  # which alone can be interrupted
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGURG, _interrupt)  # a signal that nothing happens at otherwise
    stop = threading.Event()
    thread = threading.Thread(target=_look, args=(began, patience, read, stop), daemon=True)
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Hanging


def _look(began: Seconds, patience: float, read: int, stop: threading.Event) -> None:
    interrupted, signalled = 0.0, 0.0
    while not stop.is_set():
        if select.select([read], [], [], min(1.0, patience / 4))[0]:
            arrived = {signal.SIGINT, signal.SIGTERM} & set(os.read(read, 100))
            signalled = time.monotonic() if arrived else signalled
        now, call = time.monotonic(), began.value
        if not call or stop.is_set():
            continue
        if call <= signalled < now - SIGNAL_PATIENCE:
            _end("stopped in the middle of a simulator's call", 130)
        if now - call > patience and interrupted != call:
            interrupted = call
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
        elif now - call > patience + SIGNAL_PATIENCE:
            _end(f"error: {hanging(patience)}; finished work is on disk", 1)


def _end(sentence: str, code: int) -> None:
    print(f"\n{sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
