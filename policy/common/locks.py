"""One process at a time: locks that the system lets go of, whatever ends the process that holds them."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def claim(file: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed or the process ends, also by SIGKILL.

    Args:
        file: open.

    Returns:
        Whether it is ours now; False where another process has it.

    Raises:
        OSError: its file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder; they are told who is there.

    The lock file stays: to remove it would let two processes lock two files of one name.

    Args:
        folder: of the run; receives `.train.lock`.

    Raises:
        ValueError: another process trains there, or the folder cannot be locked.
    """
    path = folder / ".train.lock"
    try:
        file = path.open("a+")
        ours = claim(file)
    except OSError as error:
        raise ValueError(f"cannot lock {path} ({error}): choose another output_dir=") from error
    with file:
        file.seek(0)
        holder = file.read()
        if not ours:
            raise ValueError(
                f"{folder} is in use by process {holder}: wait for it, stop it with Ctrl-C or SIGTERM (it saves), or"
                " choose another output_dir="
            )
        if holder:
            print(f"process {holder} was killed while it trained in {folder}: what it saved last counts")
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
            yield
        finally:
            file.truncate(0)
