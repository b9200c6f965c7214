"""Training steps a second of several processes beside one, on the CPU, one thread each, as `torchrun` starts them.

    python -m scripts.bench.train [processes=2]

In each turn the first process trains alone while the others sleep, and then all of them train together, with the same
batches. The floor is perfect division: the time of one process divided by the number of processes. Processor seconds
are those of all processes together: what they exceed one process's by is work that is done in each of them (the
optimiser, the average of the weights) or that sharing adds. They tell something on a busy machine too, where the
efficiency is only a lower bound: the load is printed with the figures.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from policy import PolicyConfig, TrainSettings
from policy.common.torchrun import ALONE, World, process_group
from policy.data.demonstrations import Demonstrations
from policy.tracking.tracker import NoTracker
from policy.training.loop import train
from policy.training.preparation import Run, prepare_run
from scripts.bench.arguments import given_settings
from scripts.bench.kept_rows import KeptRows, Row

TRANSITIONS, EPISODE, OBSERVATION, ACTION = 20_000, 200, 39, 4
# By name, the settings of a policy, the windows in a step, and how many steps are timed at once.
NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "denoiser=unet": ({"denoiser": {"name": "unet"}}, 256, 40),
    "the defaults": ({}, 256, 80),
}
TURNS = 5


def main() -> None:
    """Run the benchmark; the same command goes on where it was stopped."""
    size = int(given_settings(sys.argv[1:], "train").get("processes", 2))
    with KeptRows("train", measurements=len(NETWORKS)) as rows:
        for name in NETWORKS:
            rows.measure({"network": name, "processes": size}, lambda name=name: _rows(name, size))  # type: ignore[misc]
    rows.report()


def _rows(name: str, size: int) -> Iterator[Row]:
    """One row, of all turns."""
    load = os.getloadavg()[0]
    turns = _turns(name, size)
    steps = NETWORKS[name][2]
    one, all_ = ([turn[kind] for turn in turns] for kind in ("alone", "together"))
    ratios = [size * together["wall"] / alone["wall"] for alone, together in zip(one, all_, strict=True)]
    yield {
        "network": name,
        "parameters": turns[0]["parameters"],
        "processes": size,
        "one_ms": 1e3 * median(turn["wall"] for turn in one) / steps,
        "all_ms": 1e3 * median(turn["wall"] for turn in all_) / steps,
        "ratio_to_floor": median(ratios),
        "from": min(ratios),
        "to": max(ratios),
        "efficiency": 1 / median(ratios),
        "one_cpu_ms": 1e3 * median(turn["cpu"] for turn in one) / steps,
        "all_cpu_ms": 1e3 * median(turn["cpu"] for turn in all_) / steps,
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }


def _turns(name: str, size: int) -> list[dict[str, Any]]:
    """Start the processes and return what each turn took: wall seconds, and processor seconds of all processes."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [spawn.Pipe(duplex=False) for _ in range(size)]
        workers = [
            spawn.Process(target=_work, args=(name, rank, size, Path(folder) / "store", pipes[rank][1]), daemon=True)
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        found = [receiver.recv() for receiver, _ in pipes]
        for worker in workers:
            worker.join()
    first = found[0]
    for number, turn in enumerate(first):
        turn["together"]["cpu"] = sum(each[number]["together"]["cpu"] for each in found)
    return first


def _work(name: str, rank: int, size: int, store: Path, result: Connection) -> None:
    torch.set_num_threads(1)
    world = World(rank=rank, size=size, local_rank=rank)
    overrides, batch_size, steps = NETWORKS[name]
    settings = TrainSettings(steps=10**6, batch_size=batch_size, log_every=10**6, val_fraction=0.0)
    alone, shared = (prepared(overrides, settings) for _ in range(2))
    turns = []
    with process_group(world, f"file://{store}"), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        for _ in range(1 + TURNS):
            world.wait()
            by_itself = timed(alone, settings, steps, ALONE) if world.first else None
            world.wait()
            together = timed(shared, settings, steps, world)
            turns.append({"alone": by_itself, "together": together, "parameters": _parameters(shared)})
        result.send(turns[1:])  # the first one was to get warm


def prepared(overrides: dict[str, Any], settings: TrainSettings) -> Run:
    """Prepare a training on random demonstrations."""
    generator = np.random.default_rng(0)
    data = Demonstrations(
        observations={"state": generator.standard_normal((TRANSITIONS, OBSERVATION), dtype=np.float32)},
        actions=generator.standard_normal((TRANSITIONS, ACTION), dtype=np.float32),
        episode_ends=np.arange(EPISODE, TRANSITIONS + 1, EPISODE),
    )
    config = PolicyConfig(observation_shapes={"state": (OBSERVATION,)}, action_dim=ACTION, **overrides)
    return prepare_run(config, data, settings, seed=0, device="cpu")


def _parameters(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.state.policy.parameters())


def timed(run: Run, settings: TrainSettings, steps: int, world: World = ALONE) -> dict[str, float]:
    """Take some steps, and return their seconds: `wall`, and `cpu` of this process."""
    began, cpu = time.perf_counter(), time.process_time()
    until = run.state.step + steps
    train(run, settings, seed=0, tracker=NoTracker(), save=lambda state: None, until=until, world=world)
    return {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    main()
