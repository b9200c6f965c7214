"""Trainings with their evaluation, by the real commands, side by side and resumable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.common.device import available_cores
from policy.common.progress import progress


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One training with its evaluation.

    Attributes:
        name: what tells it from the others.
        commands: in order; each goes on where it stopped, and ends at once where all is done.
        folder: where they write.
        tasks: where one policy plays several, by seed: each becomes a row.
    """

    name: str
    commands: Sequence[Sequence[str]]
    folder: Path
    tasks: Sequence[str] = ()


def train_and_sweep(
    folder: Path, training: Sequence[str], sweep: Sequence[str], ddim_steps: Sequence[int]
) -> list[list[str]]:
    """The commands that train a policy and roll it out at each of some `ddim_steps`.

    Args:
        folder: receives `checkpoint/` and `sweep/`.
        training: overrides of `scripts.train`.
        sweep: overrides of `scripts.sweep`.
        ddim_steps: cells of the sweep.
    """
    steps = ",".join(map(str, ddim_steps))
    return [
        ["scripts.train", *training, "train.rollout_every=0", "tracker=none", f"output_dir={folder}"],
        [
            "scripts.sweep",
            f"checkpoint={folder}/checkpoint",
            f"ddim_steps=[{steps}]",
            *sweep,
            "workers=1",
            "videos=0",
            f"output_dir={folder}/sweep",
        ],
    ]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a unit.

    Attributes:
        unit: it.
        train_s: seconds of its training, interruptions left out.
        swept: what its `sweep.json` holds.
    """

    unit: Unit
    train_s: float
    swept: Mapping[str, Any]


def run_units(units: Sequence[Unit], title: str, done: Callable[[Trained], None]) -> list[Trained]:
    """Run as many trainings side by side as there are cores, one thread each.

    Args:
        units: the trainings.
        title: of the progress bar.
        done: called as each comes to its end.

    Returns:
        What came of them, in their order. A command that fails ends the program with its log's name.
    """

    def run(unit: Unit) -> Trained:
        trained = _run(unit)
        done(trained)
        return trained

    with ThreadPoolExecutor(available_cores()) as threads:
        try:
            return list(progress(threads.map(run, units), total=len(units), desc=title, unit="training"))
        except subprocess.CalledProcessError as error:
            threads.shutdown(cancel_futures=True)
            sys.exit(f"{' '.join(error.cmd[2:])} ended with exit code {error.returncode}: see log.txt in its folder")


def _run(unit: Unit) -> Trained:
    """One training with its evaluation, in processes of one thread; what they print is in `log.txt`."""
    unit.folder.mkdir(parents=True, exist_ok=True)
    path = unit.folder / "log.txt"
    with path.open("a") as log:
        for command in unit.commands:
            subprocess.run(
                [sys.executable, "-m", *command],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    # What the training says at its end and where it is interrupted; only what ends in SIGKILL goes uncounted.
    train_s = sum(map(float, re.findall(r"^\d+ steps in ([\d.]+) s, ", path.read_text(), re.MULTILINE)))
    return Trained(unit=unit, train_s=train_s, swept=json.loads((unit.folder / "sweep/sweep.json").read_text()))


def file_name(overrides: Mapping[str, str]) -> list[str]:
    """Settings as names for files.

    >>> file_name({"denoiser": "unet", "env.id": "a/B-v0"})
    ['denoiser-unet', 'env.id-a-B-v0']
    """
    return [re.sub(r"[^\w.-]+", "-", f"{name}={value}") for name, value in overrides.items()]


def listed(text: str) -> list[str]:
    """The parts of `[a,b]`."""
    return [part.strip() for part in text.strip("[]").split(",")]
