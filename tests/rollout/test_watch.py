"""Simulators that hang in this process, and signals that come while one does not return."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import gymnasium
import pytest

from policy.common.errors import WorkerError
from policy.rollout import watch
from policy.rollout.watch import check_patience, watched


class Slow(gymnasium.Env):
    """Waits in one of its calls until it may go on, as a simulator that hangs in C."""

    def __init__(self, where="", until=None):
        self.where, self.until = where, until
        self._wait("make")

    def _wait(self, call):
        while call == self.where and not (self.until and self.until.is_set()):
            try:
                time.sleep(10)
            except KeyboardInterrupt:
                if self.until is None:
                    raise

    def reset(self, *, seed=None, options=None):
        self._wait("reset")
        return 0, {}

    def step(self, action):
        self._wait("step")
        return 0, 0.0, False, False, {}

    def render(self):
        self._wait("render")

    def close(self):
        self._wait("close")


def live(make):
    env = make()
    env.reset(seed=1)
    env.step(0)
    env.render()
    env.close()


@pytest.fixture
def ended(monkeypatch):
    """What the process would have ended with; the simulator then goes on."""
    until, said = threading.Event(), []

    def end(reason, code):
        if not said:
            said.append((reason, code))
        until.set()
        os.kill(os.getpid(), signal.SIGURG)  # wakes it up

    monkeypatch.setattr(watch, "_end_process", end)
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    monkeypatch.setattr(watch, "SIGNAL_PATIENCE", 0.05)
    return said, until


@pytest.mark.parametrize(
    ("where", "what"),
    [("make", "making it"), ("reset", "reset()"), ("step", "step()"), ("render", "render()"), ("close", "close()")],
)
def test_a_call_that_does_not_return_is_interrupted_or_else_the_process_ends(ended, where, what):
    sentence = f"the simulator hangs: {what} took longer than env_patience=0.15 seconds (default 600)"
    with pytest.raises(WorkerError, match=re.escape(sentence)), watched(lambda: Slow(where), 0.15) as make:
        live(make)
    said, until = ended
    assert said == []
    with watched(lambda: Slow(where, until), 0.15) as make:  # it takes no interruption
        live(make)
    assert said == [(sentence, 1)]


def test_calls_that_return_and_time_between_them_end_nothing(ended):
    with watched(Slow, 0.15) as make:
        live(make)
        time.sleep(0.25)
        live(make)
    assert ended[0] == []


def test_a_signal_ends_the_process_when_the_simulator_does_not_return(ended, monkeypatch):
    said, until = ended
    noted = []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append("asked"))
    try:
        with watched(lambda: Slow("step", until), 100) as make:
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
            live(make)
    finally:
        signal.signal(signal.SIGINT, before)
    assert noted == ["asked"]
    assert [code for _, code in said] == [130]


def test_the_watch_ends_though_a_process_of_the_simulator_lives_on():
    with watched(Slow, 100) as make:
        make()
        if (helper := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
    os.kill(helper, signal.SIGKILL)
    os.waitpid(helper, 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "simulator watchdog"]


def test_a_thread_that_ends_while_children_are_listed_is_no_error(monkeypatch):
    listed = Path("/proc/self/task/1/children")  # of a thread that is gone
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [listed, *folder.rglob("children")])
    assert isinstance(watch._children(), set)


def test_a_simulator_that_fails_to_start_leaves_no_handler_of_its_own():
    def broken():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise OSError("no licence")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="no licence"), watched(broken, 100) as make:
        make()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_watch_restores_who_is_told_of_signals():
    with watched(Slow, 100):
        pass
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_patience_is_a_positive_number(seconds):
    with pytest.raises(ValueError, match="env_patience must be a number of seconds above 0"):
        check_patience(seconds)
