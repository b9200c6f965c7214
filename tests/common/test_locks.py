"""One training a folder: the lock goes away with its process, and says whose it is until then."""

import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from policy.common import locks
from policy.common.locks import check_free, only_process
from tests.conftest import ENVIRONMENT, ROOT

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from policy.common.locks import only_process

with only_process(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder):
    """Another process that trains in the folder and has a child of its own; gives the process and the child's id."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def test_a_process_keeps_others_out_until_it_is_killed(tmp_path, capsys):
    with holder(tmp_path) as (process, child):
        name = f"process {process.pid} on {platform.node()}"
        for _ in range(2):  # an attempt changes nothing
            with pytest.raises(ValueError) as error, only_process(tmp_path):
                pass
            with pytest.raises(ValueError, match=re.escape(str(error.value))):
                check_free(tmp_path)
            assert str(error.value) == (
                f"{tmp_path} is in use by {name}: wait for it, stop it with Ctrl-C or SIGTERM (it saves), or choose"
                " another output_dir="
            )
        process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL
        check_free(tmp_path)
        os.kill(child, 0)  # its child is still there, and holds nothing
        with only_process(tmp_path):
            assert f"{name} was killed while it worked in {tmp_path}" in capsys.readouterr().out
    assert (tmp_path / ".train.lock").read_text() == ""


def test_an_error_releases_the_lock_and_leaves_no_name(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="no step"), only_process(tmp_path):
        raise RuntimeError("no step")
    assert (tmp_path / ".train.lock").read_text() == ""
    with only_process(tmp_path):
        assert (tmp_path / ".train.lock").read_text() == f"{os.getpid()} on {platform.node()}"
    assert capsys.readouterr().out == ""


def test_the_lock_is_the_systems_own(tmp_path):
    """A training begun with an earlier version, which called flock itself, is noticed; so is ours by that version."""
    path = tmp_path / ".train.lock"
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write("7 on old")
        file.flush()
        with pytest.raises(ValueError, match="in use by process 7 on old"), only_process(tmp_path):
            pass
        assert path.read_text() == "7 on old"
        file.truncate(0)
    with only_process(tmp_path), path.open("a+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    def refuse(descriptor, *, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    refusal = rf"cannot lock {tmp_path}/\.train\.lock \(.*No locks.*choose another output_dir="
    with pytest.raises(ValueError, match=refusal), only_process(tmp_path):
        pass
    with pytest.raises(ValueError, match=refusal):
        check_free(tmp_path)


def test_a_refusal_comes_at_once(tmp_path):
    with only_process(tmp_path):
        begin = time.perf_counter()
        with pytest.raises(ValueError), only_process(tmp_path):
            pass
        assert time.perf_counter() - begin < 1
