"""The ledger of a sweep or rollout: every finished episode, written to disk at once and exactly once.

One JSON object a line: `{"cell": id, "settings": {...}}` introduces a cell, `{"cell": id, "seed": ...}` is an episode,
`{"unpaired": "..."}` says why equal seeds are not equal episodes, `{"plan": {...}}` is a plan of looks, made before the
first of its episodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import lock_descriptor

from policy.common.files import json_text
from policy.statistics.results import EpisodeResult

Settings = Mapping[str, Any]


def cell_id(settings: Settings) -> str:
    """A short name for everything that a cell's results depend on, except the episode's seed."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:12]


def recorded_settings(file: Path) -> list[Settings]:
    """The settings of all cells that a ledger has introduced; none if there is no such file.

    A damaged line is left out here: `Ledger` says what is wrong with it.
    """
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("settings"), dict):
            found.append(row["settings"])
    return found


class Ledger:
    """Results by cell and seed, in a file that is appended to and never rewritten.

    The file is locked until it is closed, or until the process ends in whatever way.

    Args:
        file: created if it does not exist. A last line that a killed process left unfinished is cut off.

    Raises:
        ValueError: the file is damaged, repeats an episode, cannot be written, or is in use by another process.
    """

    def __init__(self, file: Path) -> None:
        self._results: dict[str, dict[int, EpisodeResult]] = {}
        self.unpaired = ""  # why equal seeds are not equal episodes, as a sentence; empty if nothing says so
        self.plans: list[Settings] = []  # in the order in which they were made
        self._path = file
        try:
            self._file = file.open("a+b")
            ours = lock_descriptor(self._file.fileno(), blocking=False)
        except OSError as error:
            raise ValueError(f"cannot write {file} ({error}): choose another output_dir=") from error
        if not ours:
            self._file.close()
            raise ValueError(f"{file} is in use by another process: wait for it, or choose another output_dir=")
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        try:
            for number, line in enumerate(content[:whole].splitlines(), 1):
                self._read(number, line)
        except ValueError:
            self.close()
            raise

    def _read(self, number: int, line: bytes) -> None:
        where = f"{self._path}, line {number}"
        try:
            row = json.loads(line)
            if "unpaired" in row:
                self.unpaired = str(row["unpaired"])
                return
            if "plan" in row:
                self.plans.append(dict(row["plan"]))
                return
            known = self._results.setdefault(row["cell"], {})
            if "settings" in row:
                return
            result = EpisodeResult.from_row(row)
            repeated = result.seed in known
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is damaged ({error!r}): remove the line, its episode is run again") from error
        if repeated:
            raise ValueError(
                f"{where} repeats the episode with seed {result.seed} of cell {row['cell']}: remove one of the two"
            )
        known[result.seed] = result

    def introduce(self, settings: Settings) -> str:
        """Write down a cell's settings, unless the file has them, and return the cell's id."""
        cell = cell_id(settings)
        if cell not in self._results:
            self._results[cell] = {}
            self._append({"cell": cell, "settings": dict(settings)})
        return cell

    def note_unpaired(self, reason: str) -> None:
        """Write down that equal seeds are not equal episodes."""
        self.unpaired = reason
        self._append({"unpaired": reason})

    def note_plan(self, plan: Settings) -> None:
        """Write down a plan of looks."""
        self.plans.append(plan)
        self._append({"plan": dict(plan)})

    def finished(self) -> set[str]:
        """The ids of the cells that have results."""
        return {cell for cell, results in self._results.items() if results}

    def add(self, cell: str, result: EpisodeResult) -> None:
        """Write down an episode's result.

        Raises:
            ValueError: the cell already has a result for that seed.
        """
        if result.seed in self._results[cell]:
            raise ValueError(f"the episode with seed {result.seed} of cell {cell} was run twice")
        self._results[cell][result.seed] = result
        self._append({"cell": cell, **result.row()})

    def missing(self, cell: str, seeds: Iterable[int]) -> list[int]:
        """The seeds for which the cell has no result yet."""
        return [seed for seed in seeds if seed not in self._results[cell]]

    def results(self, cell: str, seeds: Sequence[int]) -> list[EpisodeResult]:
        """The cell's results in the order of the seeds.

        Raises:
            ValueError: a seed has no result.
        """
        if gaps := self.missing(cell, seeds):
            raise ValueError(f"{self._path}: cell {cell} lacks {len(gaps)} episodes, the first with seed {gaps[0]}")
        return [self._results[cell][seed] for seed in seeds]

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json_text(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, which releases its lock."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
