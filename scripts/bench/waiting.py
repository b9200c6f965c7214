"""Training steps of one process with two threads, by how the threads wait for each other, on a busy machine and alone.

    python -m scripts.bench.waiting

libgomp's threads wait for each other in a loop, and fall asleep after a number of rounds (`GOMP_SPINCOUNT`). Where
other processes use their cores, a thread that waits keeps the one that it waits for from running. In each turn, every
way of waiting takes the same steps, alone and beside another process that computes on the same two cores; the ratio is
that of the two.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from policy import TrainSettings
from policy.common.machine import available_cores
from scripts.bench.kept_rows import KeptRows, Row
from scripts.bench.train import prepared, timed

# What the commands set is in scripts/__init__.py.
WAYS = {
    "300,000 rounds, libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "1,000 rounds, as commands set it": {"GOMP_SPINCOUNT": "1000"},
    "4,000 rounds": {"GOMP_SPINCOUNT": "4000"},
    "16,000 rounds": {"GOMP_SPINCOUNT": "16000"},
    "asleep at once": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BATCH_SIZE, STEPS, TURNS = 64, 30, 5


def main() -> None:
    """Run the benchmark, or, as its child, take the steps and print the milliseconds of one."""
    if sys.argv[1:] == ["steps"]:
        print(_step_ms())
        return
    if not sys.platform.startswith("linux") or available_cores() < 2:
        sys.exit("This benchmark needs Linux and two cores that this process may use.")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # the processes that it starts inherit them
    with KeptRows("waiting", measurements=1) as rows:
        rows.measure({"batch_size": BATCH_SIZE, "steps": STEPS, "turns": TURNS}, _rows)
    rows.report()


def _rows() -> Iterator[Row]:
    turns = [
        {(way, busy): _measured(WAYS[way], busy=busy) for way in WAYS for busy in (False, True)} for _ in range(TURNS)
    ]
    for way in WAYS:
        ratios = [turn[way, True] / turn[way, False] for turn in turns]
        yield {
            "threads wait": way,
            "alone_ms": median(turn[way, False] for turn in turns),
            "busy_ms": median(turn[way, True] for turn in turns),
            "ratio": median(ratios),
            "from": min(ratios),
            "to": max(ratios),
        }


def _measured(way: dict[str, str], *, busy: bool) -> float:
    """Milliseconds of a step in a process of its own, which reads how to wait when it starts."""
    others = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_", "KMP_"))
    }
    command = [sys.executable, "-m", "scripts.bench.waiting", "steps"]
    with _computing() if busy else contextlib.nullcontext():
        child = subprocess.run(command, env={**others, **way}, stdout=subprocess.PIPE, text=True, check=True)
    return float(child.stdout)


@contextlib.contextmanager
def _computing() -> Iterator[None]:
    """Have another process compute on one of the cores."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def _step_ms() -> float:
    settings = TrainSettings(steps=10**6, batch_size=BATCH_SIZE, log_every=10**6, val_fraction=0.0)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        run = prepared({}, settings)
        timed(run, settings, 3)
        return 1e3 * timed(run, settings, STEPS)["wall"] / STEPS


if __name__ == "__main__":
    main()
