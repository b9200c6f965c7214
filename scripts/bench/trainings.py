"""Trainings and their evaluations, run side by side with the real commands, and resumable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from policy.common.interrupt import StopRequest, stop_on_signal
from policy.common.machine import available_cores
from policy.common.progress import progress
from policy.statistics.results import EpisodeResult

Item = TypeVar("Item")
Result = TypeVar("Result")
# Seconds between two looks at whether the benchmark is asked to stop.
LOOKS = 0.2


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One training and its evaluation.

    Attributes:
        name: distinguishes it from the others.
        commands: the commands in order; each resumes where it stopped, and ends at once if nothing is left to do.
        folder: the folder that the commands write to.
        tasks: the tasks of a policy that plays several, chosen by the episode's seed; each becomes a row.
        data: the demonstrations, where the benchmark itself collects them.
    """

    name: str
    commands: Sequence[Sequence[str]]
    folder: Path
    tasks: Sequence[str] = ()
    data: Path | None = None


def train_and_sweep(
    folder: Path, training: Sequence[str], sweep: Sequence[str], ddim_steps: Sequence[int]
) -> list[list[str]]:
    """The commands that train a policy and roll it out with several values of `ddim_steps`, all on all episodes.

    Args:
        folder: receives `checkpoint/` and `sweep/`.
        training: overrides of `scripts.train`, which rolls out during training only if they say so.
        sweep: overrides of `scripts.sweep`.
        ddim_steps: cells of the sweep.

    Returns:
        The arguments of each command.
    """
    return [train_command(folder, training), sweep_command(folder, "sweep", sweep, ddim_steps)]


def train_command(folder: Path, training: Sequence[str]) -> list[str]:
    """The command that trains a policy; see `train_and_sweep`."""
    return ["scripts.train", "train.rollout_every=0", "videos=0", *training, "tracker=none", f"output_dir={folder}"]


def sweep_command(folder: Path, name: str, sweep: Sequence[str], ddim_steps: Sequence[int]) -> list[str]:
    """The command that rolls the policy of a folder out, into its subfolder of this name; see `train_and_sweep`."""
    return [
        "scripts.sweep",
        f"checkpoint={folder}/checkpoint",
        f"ddim_steps=[{','.join(map(str, ddim_steps))}]",
        *sweep,
        "adaptive=false",
        "workers=1",
        "videos=0",
        f"output_dir={folder}/{name}",
    ]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The results of a unit.

    Attributes:
        unit: the unit.
        train_s: seconds of its training, without interruptions.
        swept: content of its `sweep.json`.
    """

    unit: Unit
    train_s: float
    swept: Mapping[str, Any]

    def results(self, ddim_steps: int) -> list[EpisodeResult]:
        """The episodes of the cell with these steps."""
        (cell,) = [cell for cell in self.swept["cells"] if cell["ddim_steps"] == ddim_steps]
        return self.results_of(cell)

    def results_of(self, cell: Mapping[str, Any]) -> list[EpisodeResult]:
        """The episodes of one of the cells in `swept`."""
        return [EpisodeResult.from_row(row) for row in self.swept["episodes"] if row["cell"] == cell["cell"]]


def run_units(units: Sequence[Unit], title: str, done: Callable[[Trained], None]) -> list[Trained]:
    """Run as many trainings side by side as there are cores, one thread each.

    Args:
        units: the trainings.
        title: title of the progress bar.
        done: called when a unit ends.

    Returns:
        The results, in the order of the units. If a command fails, the program exits with a message that names its log.
    """

    def run(unit: Unit, stop: StopRequest) -> Trained:
        trained = _run(unit, stop)
        done(trained)
        return trained

    return side_by_side(run, units, title, "training")


def side_by_side(
    work: Callable[[Item, StopRequest], Result], items: Sequence[Item], title: str, unit: str
) -> list[Result]:
    """Work on as many items at a time as there are cores.

    Args:
        work: called with each item, in a thread, and with what says whether to stop.
        items: the items.
        title: title of the progress bar.
        unit: the word for an item there.

    Returns:
        The results, in the order of the items. If a command fails, the program exits with a message that names its log;
        so it does when it is asked to stop, by Ctrl-C or SIGTERM, once the commands have saved what they did.
    """
    with stop_on_signal() as stop, ThreadPoolExecutor(available_cores()) as threads:
        try:
            done = threads.map(work, items, repeat(stop))
            return list(progress(done, total=len(items), desc=title, unit=unit))
        except _Stopped:
            sys.exit("stopped: the same command goes on")
        except subprocess.CalledProcessError as error:
            threads.shutdown(cancel_futures=True)
            sys.exit(f"{' '.join(error.cmd[2:])} ended with exit code {error.returncode}: see log.txt in its folder")


class _Stopped(Exception):
    """The benchmark was asked to stop."""


def collect_missing(commands: Mapping[Path, Sequence[str]]) -> None:
    """Collect the demonstrations that are not there, side by side.

    Args:
        commands: the command that writes each dataset, by the dataset's path.
    """

    def one(dataset: Path, stop: StopRequest) -> None:
        run_commands(dataset.parent / "logs" / dataset.name, [commands[dataset]], stop)

    side_by_side(one, [dataset for dataset in commands if not dataset.exists()], "collect", "dataset")


def _run(unit: Unit, stop: StopRequest) -> Trained:
    """Run one training and its evaluation."""
    log = run_commands(unit.folder, unit.commands, stop)
    # The training prints this at its end and when it is interrupted; only time before a SIGKILL is not counted.
    train_s = sum(map(float, re.findall(r"^\d+ steps in ([\d.]+) s, ", log.read_text(), re.MULTILINE)))
    return Trained(unit=unit, train_s=train_s, swept=json.loads((unit.folder / "sweep/sweep.json").read_text()))


def run_commands(folder: Path, commands: Sequence[Sequence[str]], stop: StopRequest) -> Path:
    """Run commands one after the other, each in a process of one thread.

    Args:
        folder: receives their output as `log.txt`.
        commands: the module and the arguments of each.
        stop: says whether to stop; a command is then told so by SIGTERM, which reached this process alone.

    Returns:
        The log.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    if stop():
        raise _Stopped
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "log.txt"
    with path.open("a") as log:
        for command in commands:
            arguments = [sys.executable, "-m", *command]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
                while process.poll() is None and not stop():
                    sleep(LOOKS)
                process.terminate()  # nothing happens to a process that has ended
            if stop():
                raise _Stopped
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, arguments)
    return path


def file_name(overrides: Mapping[str, str]) -> list[str]:
    """Turn settings into names of files.

    >>> file_name({"denoiser": "unet", "env.id": "a/B-v0"})
    ['denoiser-unet', 'env.id-a-B-v0']
    """
    return [re.sub(r"[^\w.-]+", "-", f"{name}={value}") for name, value in overrides.items()]
