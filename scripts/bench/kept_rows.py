"""Rows of a benchmark, printed and kept on disk as soon as they are measured, so that a stopped benchmark goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from policy.common.progress import progress, say
from scripts.bench.report import FOLDER, cell, machine, write_report

ROOT = Path(__file__).resolve().parents[2]
# Everything that a figure may depend on in this repository, changes that are not committed included.
CODE = ("policy", "envs", "conf", "scripts")

Row = dict[str, Any]


class KeptRows:
    """The rows of one benchmark, in `outputs/bench/<name>.jsonl` as they are measured.

    A measurement is not repeated where all that it depends on is the same: the code, the machine with its versions, and
    the measurement's own settings. `KeptRows` is a context manager, which shows a progress bar.
    """

    def __init__(self, name: str, *packages: str, measurements: int) -> None:
        """Read the rows that are there.

        Args:
            name: the benchmark's name.
            *packages: packages whose versions figures depend on, besides torch and numpy.
            measurements: how many calls of `measure` will follow.
        """
        self._name, self._file = name, FOLDER / f"{name}.jsonl"
        self._circumstances = {"machine": machine(*packages), "code": code_digest(ROOT)}
        self._kept = {json.dumps(line["depends_on"]): line["rows"] for line in _lines(self._file)}
        self._rows: list[Row] = []
        print(self._circumstances["machine"], flush=True)
        self._bar = progress(total=measurements, desc=name, unit="measurement")

    def __enter__(self) -> KeptRows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt:
            raise SystemExit(f"stopped: what was measured is kept in {self._file}, and the same command goes on")

    def measure(self, settings: Mapping[str, Any], work: Callable[[], Iterable[Row]]) -> list[Row]:
        """Measure, or take what was measured before.

        Args:
            settings: what this measurement depends on, besides the code and the machine; JSON data.
            work: yields rows, JSON data; each is printed at once, and all of them are kept when the last one is there.

        Returns:
            The rows.
        """
        depends_on = {**self._circumstances, "settings": dict(settings)}
        key = json.dumps(depends_on)
        rows = self._kept.get(key)
        if rows is None:
            rows = []
            for row in work():
                say(in_words(row))
                rows.append(row)
            _append(self._file, {"depends_on": depends_on, "rows": rows})
            self._kept[key] = rows
        else:
            say(f"{', '.join(in_words(row) for row in rows)} (kept)")
        self._rows += rows
        self._bar.update()
        return rows

    def report(self) -> Path:
        """Print all rows as a table and write them to `outputs/bench/<name>.json`."""
        return write_report(self._name, self._rows)


def code_digest(root: Path) -> str:
    """Start of the SHA-256 of the code and the configuration in a checkout."""
    digest = hashlib.sha256()
    for file in sorted(path for room in CODE for path in (root / room).rglob("*") if path.suffix in (".py", ".yaml")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def in_words(row: Mapping[str, Any]) -> str:
    """A row on one line.

    >>> in_words({"backend": "onnx", "steps_per_s": 12345.6, "first_call_ms": None})
    'backend onnx, steps_per_s 12,346'
    """
    return ", ".join(f"{name} {cell(value)}" for name, value in row.items() if value is not None)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was being written when the benchmark was killed is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        found.append(content)
    return found


def _append(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(f"\n{json.dumps(content)}\n" if file.stat().st_size else f"{json.dumps(content)}\n")
