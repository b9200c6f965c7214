"""Output folders of commands, and the seeds of their episodes."""

from __future__ import annotations

import errno
import itertools
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile

# Written to an output folder before long work, to find out whether that is possible.
TRIAL_BYTES = 2**16


def output_folder(output_dir: Path | None, command: str) -> Path:
    """Return the folder that a command writes to; it is created if needed.

    Args:
        output_dir: the user's choice, or None for a new folder named after the command and the time.
        command: name of the command: `train`, `rollout`, ...

    Returns:
        The folder.

    Raises:
        ValueError: the folder cannot be created, or nothing can be written there.
    """
    folder = output_dir or Path("outputs") / command / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    check_writable(folder)
    try:
        if output_dir is None:
            return _new_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make output_dir={folder} ({error}): choose another") from error
    return folder


def check_writable(folder: Path, setting: str = "output_dir") -> None:
    """Refuse a folder in which no files can be made; nothing is left there, and the folder itself is not made.

    Args:
        folder: it, or its nearest parent that exists, is written to.
        setting: the setting with which the user chooses it, for the message.

    Raises:
        ValueError: it is a file, no files can be made in it, or its disk is full.
    """
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with TemporaryFile(dir=there) as trial:  # without a name: nobody sees it, and a kill leaves nothing
            trial.write(bytes(TRIAL_BYTES))
            trial.flush()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise  # which commands say in a short sentence
        raise ValueError(
            f"cannot write to {setting}={folder} ({error.strerror}): choose another, or make room"
        ) from error


def _new_folder(folder: Path) -> Path:
    """Make a folder that is nobody else's, with a number behind its name if commands start at the same second."""
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue
    raise AssertionError


def episode_seeds(seed: int, episodes: int) -> range:
    """Return the seeds of `episodes` episodes, counting up from `seed`.

    Raises:
        ValueError: fewer than one episode, or a negative seed.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more; got {episodes}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}")
    return range(seed, seed + episodes)
