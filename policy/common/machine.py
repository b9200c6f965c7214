"""What a machine has: cores, a processor, a home folder, a name of the user, a safe folder to start processes in."""

from __future__ import annotations

import atexit
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Python's own variable; a process that has this value of it was started in `outside_current_folder`.
SAFE_PATH, OURS = "PYTHONSAFEPATH", "ddim-policy"

_TEMPORARY: list[str] = []  # the home folder that this process made


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the model of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def settle_home() -> None:
    """Give this process a home folder and a user name if the machine has none, for the libraries that ask for them.

    Without a home folder, libraries fail, or take a folder called `~` in the current folder. The new one is temporary.

    Raises:
        ValueError: there is no folder for temporary files either.
    """
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # Python would take an empty one for the root of the file system
    os.environ.setdefault("LOGNAME", os.environ.get("USER") or f"uid{os.getuid()}")  # the user may have no passwd entry
    home = _home()
    if home is not None and os.path.isdir(home):  # unlike Path.is_dir, without an error where nobody may look
        return
    try:
        folder = tempfile.mkdtemp(prefix="ddim-policy-home-")
    except OSError as error:
        raise ValueError(
            f"there is neither a home folder nor a folder for temporary files ({error}): set HOME, or TMPDIR, to a"
            " folder that you may write to"
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["HOME"] = folder
    _TEMPORARY.append(folder)


def warn_of_temporary_home() -> None:
    """Say that what is kept in the home folder is lost, if this process had to make one."""
    if _TEMPORARY:
        warnings.warn(
            "there is no home folder: converted demonstrations are kept until the end of this command only; set HOME,"
            " XDG_CACHE_HOME or dataset.cache_dir to keep them",
            stacklevel=2,
        )


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None


@contextmanager
def outside_current_folder() -> Iterator[None]:
    """Start Python processes in this block. Otherwise they would search the current folder before all others.

    `python -c`, as which multiprocessing starts its processes, puts that folder in front of the standard library.
    """
    if SAFE_PATH in os.environ:
        yield
        return
    os.environ[SAFE_PATH] = OURS
    try:
        yield
    finally:
        os.environ.pop(SAFE_PATH, None)


def leave_children_alone() -> None:
    """In a process started by `outside_current_folder`: its own children are started as usual."""
    if os.environ.get(SAFE_PATH) == OURS:
        del os.environ[SAFE_PATH]
