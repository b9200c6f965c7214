"""Console commands: wiring between configuration, environments and policies."""

import os
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def _leave_out_empty_entries() -> None:
    """Do not search the current folder because of an empty entry of PYTHONPATH, which nobody meant to write."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = os.getcwd()
    if len(entries) > 1 and "" in entries and not any(entry and os.path.abspath(entry) == here for entry in entries):
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


def _check_own_packages() -> None:
    """End the command if Python would take a folder of the user's for a package of this project.

    It runs before any of them is imported, which would fail with an error that does not name the folders.
    """
    for name in ("policy", "envs"):
        own = Path(__file__).resolve().parents[1] / name
        spec = PathFinder.find_spec(name)
        found = Path(spec.origin or own).resolve() if spec else own
        if not found.is_relative_to(own):
            print(
                f"error: there are two packages called {name}: Python takes {found}, and not {own}, which this command"
                f" needs: rename yours, such as to my_{name}, or take its folder out of PYTHONPATH",
                file=sys.stderr,
            )
            sys.exit(2)


def _end_silently_on_interrupt() -> None:
    """Let Ctrl-C end a command without a traceback while it imports; `scripts.command` handles it afterwards."""
    program = Path(sys.argv[0])
    if program.name.startswith("ddim-") or program.resolve().parent == Path(__file__).resolve().parent:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _let_threads_sleep() -> None:
    """Let torch's threads wait for each other asleep, after a moment, unless the user has chosen how they wait.

    libgomp reads this when torch is imported. By itself it lets them wait in a loop of 300,000 rounds. Where another
    process uses the same cores, a training is then up to 20 times slower than with 1,000 rounds (docs/scale.md).
    """
    if not os.environ.get("OMP_WAIT_POLICY") and not os.environ.get("GOMP_SPINCOUNT"):
        os.environ["GOMP_SPINCOUNT"] = "1000"


_leave_out_empty_entries()
_check_own_packages()
_end_silently_on_interrupt()
_let_threads_sleep()
