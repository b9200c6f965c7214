"""Folders in which something is built, and which no killed process leaves behind for long."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

BUILDING = ".building-"


@contextmanager
def building_in(parent: Path) -> Iterator[Path]:
    """Make a folder to build something in, and remove it at the end, with those of processes that were killed.

    Other processes see by its lock that it is in use. What is complete is moved out of it, or is the folder itself,
    renamed.

    Args:
        parent: the folder that it is in; it is made if there is none.

    Yields:
        The folder.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    while True:
        building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=parent))
        with locked(building) as ours:
            # Another process may have locked or removed it, as a leftover, before it was locked here.
            if ours is False or not building.exists():
                continue
            try:
                yield building
            finally:
                shutil.rmtree(building, ignore_errors=True)
            return


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder, without waiting; the system releases the lock however the process ends.

    Yields:
        Whether it was locked here; None if its file system has no locks. A folder that is gone was not.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    ours = None
    try:
        with suppress(OSError):
            ours = lock_descriptor(descriptor, blocking=False)
        yield ours
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Remove the folders of killed processes: those that no process has locked."""
    for building in parent.glob(f"{BUILDING}*"):
        with suppress(OSError), locked(building) as is_leftover:  # another process may remove or finish it
            if is_leftover:
                shutil.rmtree(building, ignore_errors=True)
