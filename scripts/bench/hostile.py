"""Read every kind of hostile file in a process of its own, and print the answer, the time and the memory.

Each process notes what Python would audit: imports, code that is run, processes, and changes of files and folders.

python -m scripts.bench.hostile
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from policy.adapters.torch_file import plain, read_torch_file
from scripts.bench.hostile_files import checkpoint, hostile_files
from scripts.bench.report import machine, write_report

LIMIT_S = 60
# Events of Python's audit that reading data does not need.
ACTIONS = (
    *("import", "exec", "compile", "pickle.", "marshal.", "code.", "ctypes.", "subprocess.", "socket.", "shutil."),
    *("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename"),
)
SENTENCES = ("FILE ", "the configuration in the file ")


def main() -> None:
    """Read all kinds."""
    print(machine())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        # What the reader itself imports late is there before the first process begins.
        good = Path(folder, "good.ckpt")
        good.write_bytes(checkpoint())
        plain(read_torch_file(good))
        for number, kind in enumerate(_in_child(_written, Path(folder))):
            path, marker = _places(Path(folder), number)
            answer, seconds, megabytes = _in_child(_answer, path)
            answer = "its code ran" if marker.exists() else answer.replace(f"{path}", "FILE")
            rows.append({"file": kind, "answer": answer, "s": round(seconds, 2), "peak MB": round(megabytes, 1)})
    write_report("hostile", rows)
    refused = sum(row["answer"].startswith(SENTENCES) for row in rows)
    seconds, megabytes = (max(row[column] for row in rows) for column in ("s", "peak MB"))
    print(f"{refused} of {len(rows)} refused in one sentence; at most {seconds} s and {megabytes} MB")
    sys.exit(refused != len(rows))


def _places(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number}.ckpt", folder / f"{number}.ran"


def _in_child(function: Callable[[Path], Any], path: Path) -> Any:
    """Call a function in a process of its own, so that its peak of memory is its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(function, path, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LIMIT_S) else ("no answer", LIMIT_S, float("nan"))
    except EOFError:
        return "the process died", float("nan"), float("nan")
    finally:
        process.kill()
        process.join()


def _send(function: Callable[[Path], Any], path: Path, connection: Connection) -> None:
    connection.send(function(path))


def _written(folder: Path) -> list[str]:
    """Write all kinds of files into a folder, and return the kinds."""
    files = hostile_files()
    for number, write in enumerate(files.values()):
        write(*_places(folder, number))
    return list(files)


def _answer(path: Path) -> tuple[str, float, float]:
    """The answer of the reader, the seconds and the megabytes that it took."""
    seen: list[str] = []
    sys.addaudithook(lambda event, args: seen.append(f"{event} {args[:1]}") if event.startswith(ACTIONS) else None)
    before, began = _peak(), time.perf_counter()
    try:
        answer = f"read: {type(plain(read_torch_file(path))).__name__}"
    except ValueError as error:
        answer = str(error)
    except BaseException as error:  # what must not happen is a row, too
        answer = f"{type(error).__name__}: {error}"
    if seen:
        answer = f"it did: {', '.join(sorted(set(seen)))}"
    return answer[:300], time.perf_counter() - began, _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
