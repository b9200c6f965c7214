"""A benchmark's commands run in processes of their own, and end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from policy.common.machine import available_cores

ROOT = Path(__file__).parents[2]

SLEEPER = """
import signal, sys, time
from pathlib import Path

def end(number, frame):
    Path("saved").touch()
    sys.exit(130)

signal.signal(signal.SIGTERM, end)
Path("began").touch()
time.sleep(100)
"""

BENCHMARK = """
from pathlib import Path
from scripts.bench.trainings import Unit, run_units

units = [Unit(name=name, commands=[["sleeper"]], folder=Path(name)) for name in "abcd"]
run_units(units, "a title", print)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_benchmark_that_is_stopped_stops_its_commands_and_starts_no_others(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    benchmark = subprocess.Popen(
        [sys.executable, "-c", BENCHMARK], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        benchmark.send_signal(signal.SIGTERM)
        _, told = benchmark.communicate(timeout=60)
    finally:
        benchmark.kill()
    assert (benchmark.returncode, told.splitlines()[-1]) == (1, "stopped: the same command goes on")
    assert (tmp_path / "saved").exists()
    assert sum((tmp_path / name).exists() for name in "abcd") == min(4, available_cores())
