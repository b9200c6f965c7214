"""A lock that keeps a second process out of a folder; the system releases it however its process ends."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

from filelock import lock_descriptor

LOCK = ".train.lock"


def check_free(folder: Path) -> None:
    """Refuse a folder that another process works in, before work that may take long; nothing is locked.

    Raises:
        ValueError: another process works in the folder.
    """
    if os.path.isfile(path := folder / LOCK):
        file, ours = _locked(path, "r+")
        with file:
            if not ours:
                raise _in_use(folder, file.read())


def _locked(path: Path, mode: str) -> tuple[TextIO, bool]:
    """Open a lock file, and lock it unless another process has."""
    try:
        file = cast(TextIO, path.open(mode))
        return file, lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        raise ValueError(f"cannot lock {path} ({error}): choose another output_dir=") from error


def _in_use(folder: Path, holder: str) -> ValueError:
    return ValueError(
        f"{folder} is in use by process {holder}: wait for it, stop it with Ctrl-C or SIGTERM (it saves), or choose"
        " another output_dir="
    )


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; each of them is told which process works there.

    The lock file holds the process's name (its id and host) and is emptied at the end. A name found in a file that
    nobody has locked is that of a process that was killed. The file is never removed: if it were, two processes could
    each lock a different file of the same name.

    Args:
        folder: folder of the training run; `.train.lock` is written there.

    Raises:
        ValueError: another process works in the folder, or the folder cannot be locked.
    """
    file, ours = _locked(folder / LOCK, "a+")
    with file:
        file.seek(0)
        holder = file.read()
        if not ours:
            raise _in_use(folder, holder)
        if holder:
            print(f"process {holder} was killed while it worked in {folder}: what it saved counts")
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
            yield
        finally:
            file.truncate(0)
