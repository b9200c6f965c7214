"""The ledger of a sweep or rollout: every finished episode, written to disk at once and exactly once.

One JSON object a line: `{"cell": id, "settings": {...}}` introduces a cell, `{"cell": id, "seed": ...}` is an episode,
`{"made_with": {...}}` says what the episodes after it were run with, `{"unpaired": "..."}` why equal seeds are not
equal episodes, `{"plan": {...}}` is a plan of looks, made before its episodes, and `{"shard": "3/16"}` says that the
file holds a share of them. Each line ends with a checksum, `"check"`; lines that earlier versions wrote have none.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import lock_descriptor

from policy.common.files import json_text
from policy.rollout.provenance import UNKNOWN, Provenance, is_provenance
from policy.statistics.results import EpisodeResult

Settings = Mapping[str, Any]

# The checksum at the end of a line.
CHECK = b', "check": "%08x"}'
CHECKED = re.compile(rb'.*, "check": "[0-9a-f]{8}"}', re.DOTALL)
# The beginning of the line that names a shard.
SHARD_LINE = b'{"shard": '
# The names in lines without a checksum: no later version writes such a line.
UNCHECKED = {
    *("cell", "settings", "unpaired"),
    *("seed", "success", "score", "return", "steps", "late_steps", "attempts", "broke_off"),
}


class _RepeatedError(ValueError):
    """A line says what an earlier one has said; the message is what."""


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
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("settings"), dict):
            found.append(row["settings"])
    return found


def _line_of(row: Mapping[str, Any]) -> bytes:
    """A line of the file, with its checksum (CRC-32 of what stands before it) and without its end."""
    text = json_text(row).encode()[:-1]
    return text + CHECK % zlib.crc32(text)


def _row_of(line: bytes, checked: bool) -> tuple[dict[str, Any], bool]:
    """Read a line.

    Args:
        line: the line without its end.
        checked: whether a line before it has a checksum, so that this one must have one.

    Returns:
        The row without its checksum, and whether it has one.

    Raises:
        ValueError: the line was edited, or cut.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON: it was edited or cut") from error
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    if row.pop("check", None) is None:
        if checked:
            raise ValueError("its checksum is missing")
        if unknown := [name for name in row if name not in UNCHECKED]:
            raise ValueError(f"{unknown[0]!r} is unknown")
        return row, False
    text = line[: -len(CHECK % 0)]
    if line != text + CHECK % zlib.crc32(text):
        raise ValueError("it does not fit its checksum: it was edited")
    return row, True


class Recorded:
    """What a ledger holds.

    Args:
        path: its file, for messages.
        content: of the file. A last line that is not whole is left out.

    Raises:
        ValueError: the content is damaged, or repeats an episode.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        # By cell and seed: the result, and the index of its provenance.
        self._results: dict[str, dict[int, tuple[EpisodeResult, int]]] = {}
        self._settings: dict[str, Settings] = {}
        self._made_with: list[Provenance] = [UNKNOWN]
        self.unpaired = ""  # why equal seeds are not equal episodes, as a sentence; empty if nothing says so
        self.shard = ""  # which share of the episodes this is, as a user writes it; empty if it is no share
        self.path = path
        self.plans: list[Settings] = []  # in the order in which they were made
        self.began_checked = False  # whether a version that writes checksums has left episodes here
        self._read_all(content)

    def _read_all(self, content: bytes) -> None:
        """Read the lines that are whole.

        Raises:
            ValueError: a line is damaged or repeated.
        """
        *lines, rest = content.split(b"\n")
        if CHECKED.match(rest) and not CHECKED.fullmatch(rest):  # no killed process leaves more than a line
            lines.append(rest)
        checked = False
        for number, line in enumerate(lines, 1):
            try:
                row, checked = _row_of(line, checked)
                _kind_of(row)(self, row)
                self.began_checked |= checked and "seed" in row
            except _RepeatedError as error:
                raise ValueError(f"{self.path}, line {number} repeats {error}: remove one of the two") from error
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                # Without the line that names a shard, its episodes would be those of a whole sweep.
                advice = (
                    "run the shard anew with another output_dir="
                    if line.startswith(SHARD_LINE)
                    else "remove the line; if it is an episode, that is run again"
                )
                raise ValueError(f"{self.path}, line {number} is damaged ({reason}): {advice}") from error

    def _read_provenance(self, row: Mapping[str, Any]) -> None:
        made_with = row["made_with"]
        if not made_with or not is_provenance(made_with):
            raise ValueError("made_with is not a provenance")
        if made_with == self._made_with[-1]:
            raise _RepeatedError("the line of before that says what episodes were run with")
        self._made_with.append(made_with)

    def _read_unpaired(self, row: Mapping[str, Any]) -> None:
        if not isinstance(row["unpaired"], str) or not row["unpaired"]:
            raise ValueError(f"unpaired must be a sentence; got {row['unpaired']!r}")
        if self.unpaired:
            raise _RepeatedError("that equal seeds are not equal episodes")
        self.unpaired = row["unpaired"]

    def _read_shard(self, row: Mapping[str, Any]) -> None:
        if not isinstance(row["shard"], str) or not row["shard"]:
            raise ValueError(f"{row['shard']!r} is not a shard")
        if self.shard:
            raise _RepeatedError("which shard this is")
        self.shard = row["shard"]

    def _read_plan(self, row: Mapping[str, Any]) -> None:
        if not isinstance(row["plan"], dict):
            raise ValueError(f"{row['plan']!r} is not a plan")
        if row["plan"] in self.plans[-1:]:  # an earlier one that nobody followed may be made again
            raise _RepeatedError("a plan")
        self.plans.append(row["plan"])

    def _read_settings(self, row: Mapping[str, Any]) -> None:
        if row["cell"] != cell_id(row["settings"]):
            raise ValueError(f"{row['cell']} is not the id of these settings")
        if row["cell"] in self._settings:
            raise _RepeatedError(f"the settings of cell {row['cell']}")
        self._settings[row["cell"]] = row["settings"]

    def _read_episode(self, row: Mapping[str, Any]) -> None:
        if not isinstance(row["cell"], str):
            raise ValueError(f"{row['cell']!r} is not the id of a cell")
        result = EpisodeResult.from_row(row)
        if result.seed in self._results.get(row["cell"], {}):
            raise _RepeatedError(f"the episode with seed {result.seed} of cell {row['cell']}")
        self._keep(row["cell"], result)

    def _keep(self, cell: str, result: EpisodeResult) -> None:
        self._results.setdefault(cell, {})[result.seed] = (result, len(self._made_with) - 1)

    @staticmethod
    def read(file: Path) -> Recorded:
        """Read a ledger, which another process may be writing.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        return Recorded(file, file.read_bytes())

    def settings_of(self, cell: str) -> Settings:
        """The settings of a cell that the file has introduced; none of another one."""
        return self._settings.get(cell, {})

    def made_with(self, cells: Iterable[str], seeds: Iterable[int]) -> list[Provenance]:
        """The provenances of the results that these cells have for these seeds, each once, in their order."""
        wanted = set(seeds)
        used = {number for cell in cells for seed, (_, number) in self._results.get(cell, {}).items() if seed in wanted}
        found = [self._made_with[number] for number in sorted(used)]
        return [one for index, one in enumerate(found) if one not in found[:index]]

    def finished(self) -> set[str]:
        """The ids of the cells that have results."""
        return {cell for cell, results in self._results.items() if results}

    def span(self, cells: Iterable[str]) -> range:
        """The seeds from the first to the last that one of these cells has a result for; at least one has results."""
        seeds = [seed for cell in cells for seed in self._results.get(cell, {})]
        return range(min(seeds), max(seeds) + 1)

    def missing(self, cell: str, seeds: Iterable[int]) -> list[int]:
        """The seeds for which the cell has no result yet."""
        return [seed for seed in seeds if seed not in self._results.get(cell, {})]

    def present(self, cell: str, seeds: Iterable[int]) -> list[EpisodeResult]:
        """The results that the cell has for these seeds, in their order."""
        found = self._results.get(cell, {})
        return [found[seed][0] for seed in seeds if seed in found]

    def results(self, cell: str, seeds: Sequence[int]) -> list[EpisodeResult]:
        """The cell's results in the order of the seeds.

        Raises:
            ValueError: a seed has no result.
        """
        if gaps := self.missing(cell, seeds):
            raise ValueError(f"{self.path}: cell {cell} lacks {len(gaps)} episodes, the first with seed {gaps[0]}")
        return self.present(cell, seeds)


class Ledger(Recorded):
    """Results by cell and seed, in a file that is appended to and never rewritten.

    The file is locked until it is closed, or until the process ends in whatever way.

    Args:
        file: created if it does not exist. A last line that a killed process left unfinished is cut off.

    Raises:
        ValueError: the file is damaged, repeats an episode, cannot be written, or is in use by another process.
    """

    def __init__(self, file: Path) -> None:
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
        try:
            super().__init__(file, content)
        except ValueError:
            self.close()
            raise
        self._file.truncate(content.rfind(b"\n") + 1)

    def introduce(self, settings: Settings) -> str:
        """Write down a cell's settings, unless the file has them, and return the cell's id."""
        cell = cell_id(settings)
        if cell not in self._settings:
            self._settings[cell] = settings
            self._append({"cell": cell, "settings": dict(settings)})
        return cell

    def note_unpaired(self, reason: str) -> None:
        """Write down that equal seeds are not equal episodes."""
        self.unpaired = reason
        self._append({"unpaired": reason})

    def note_shard(self, shard: str) -> None:
        """Write down that the file holds a share of the episodes."""
        self.shard = shard
        self._append({"shard": shard})

    def note_plan(self, plan: Settings) -> None:
        """Write down a plan of looks."""
        self.plans.append(plan)
        self._append({"plan": dict(plan)})

    def note_provenance(self, made_with: Provenance) -> None:
        """Write down what the episodes that are added from now on were run with, unless that is as before."""
        if made_with != self._made_with[-1]:
            self._made_with.append(made_with)
            self._append({"made_with": made_with})

    def add(self, cell: str, result: EpisodeResult) -> None:
        """Write down an episode's result.

        Raises:
            ValueError: the cell already has a result for that seed.
        """
        if not self.missing(cell, [result.seed]):
            raise ValueError(f"the episode with seed {result.seed} of cell {cell} was run twice")
        self._keep(cell, result)
        self._append({"cell": cell, **result.row()})

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line_of(row) + b"\n")
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


# What reads a line, by a name that only lines of its kind have; the most frequent kind comes first.
_KINDS = {
    "seed": Recorded._read_episode,
    "settings": Recorded._read_settings,
    "made_with": Recorded._read_provenance,
    "unpaired": Recorded._read_unpaired,
    "plan": Recorded._read_plan,
    "shard": Recorded._read_shard,
}


def _kind_of(row: Mapping[str, Any]) -> Callable[[Recorded, Mapping[str, Any]], None]:
    """What reads this line."""
    for name, read in _KINDS.items():
        if name in row:
            return read
    raise ValueError("it is of no known kind")
