"""Demonstrations as plain arrays on disk, mapped into memory instead of copied.

Public formats compress, split and nest their arrays, so that reading one training window takes a decompression or a
seek in a video. Each dataset is therefore read once, in order, and its episodes are written end to end into a folder of
the cache, an entry, which training maps into memory.

<cache_dir>/<name>-<fingerprint>/
  index.json     shapes, dtypes, episodes and the checksum of each array, and a checksum of these
  <n>.bin        the n-th array of the index, row after row; frames of videos stay in their videos, and have no file

The checksums are compared each time an entry is opened; one that does not match is converted again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from policy.common.building import building_in
from policy.common.machine import warn_of_temporary_home
from policy.data.budget import Budget, BudgetError
from policy.data.demonstrations import Demonstrations
from policy.data.episode import Episode, EpisodeChecker
from policy.data.frames import Clip, Frames

INDEX = "index.json"


def default_cache_dir() -> Path:
    """The folder of converted demonstrations: `ddim-policy` in the user's cache folder ($XDG_CACHE_HOME)."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "ddim-policy"
    warn_of_temporary_home()
    return Path.home() / ".cache" / "ddim-policy"


def open_cached(folder: Path, source: str, files: Mapping[str, Path]) -> Demonstrations | None:
    """Map demonstrations that were converted before.

    Args:
        folder: the entry that `write_cached` made.
        source: the dataset, for messages, as it is named this time.
        files: the dataset's files by name, for videos that stay there.

    Returns:
        The demonstrations, or None if the entry is missing or damaged.
    """
    try:
        content = json.loads((folder / INDEX).read_text())
        index = content["index"]
        if content["sha256"] != _checksum(index):
            return None
        arrays = {
            column["key"]: _frames(column, index, files)
            if "clips" in column
            else _map(folder / f"{number}.bin", column)
            for number, column in enumerate(index["columns"])
        }
        return Demonstrations(
            actions=arrays.pop("actions"),
            observations=arrays,
            episode_ends=np.cumsum(index["lengths"], dtype=np.int64),
            **{name: index[name] for name in ("episode_names", "held_out", "metadata", "skipped")},
            source=source,
            originals=np.asarray(index.get("originals", []), np.int64),  # an older entry holds none but originals
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _checksum(index: Any) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _frames(column: Mapping[str, Any], index: Mapping[str, Any], files: Mapping[str, Path]) -> Any:
    clips = [
        Clip(name=name, file=files[name], start=start, fps=fps, count=count, episode=episode)
        for (name, start, fps), count, episode in zip(
            column["clips"], index["lengths"], index["episode_names"], strict=True
        )
    ]
    height, width = column["stored"]
    return Frames(clips, (height, width), column["resized_to"])


def _map(file: Path, column: Mapping[str, Any]) -> NDArray[Any]:
    shape, dtype = tuple(column["shape"]), np.dtype(column["dtype"])
    if file.stat().st_size != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{file} is not whole")
    # A plain array over the mapping, because indexing an instance of the memmap class is slower.
    values = np.asarray(np.memmap(file, dtype, mode="r", shape=shape))
    if zlib.crc32(values.data) != column["crc32"]:
        raise ValueError(f"{file} was changed")
    return values


def write_cached(
    folder: Path,
    episodes: Iterator[tuple[str, Callable[[], list[Episode]]]],
    *,
    source: str,
    files: Mapping[str, Path],
    metadata: Mapping[str, Any],
    held_out: Sequence[str],
    skip_bad: bool,
    budget: Budget,
) -> None:
    """Check episodes one by one and write them end to end; only one is in memory at a time.

    Args:
        folder: the entry to make. It appears when it is complete, so an interrupted conversion leaves no entry.
        episodes: the name of each episode, and a function that reads the demonstrations made of it, one or more.
        source: the dataset, for messages.
        files: the dataset's files by name.
        metadata: the dataset's description of itself, JSON data.
        held_out: names of the episodes set aside for validation.
        skip_bad: leave bad episodes out, instead of refusing the dataset.
        budget: the disk that the entry may take.

    Raises:
        ValueError: an episode is bad, no good episode is left, two episodes have the same name, the disk is full, or
            the folder cannot be written to.
    """
    try:
        if open_cached(folder, source, files) is None:
            # Now, because later it may be the complete entry of another process.
            shutil.rmtree(folder, ignore_errors=True)
        with building_in(folder.parent) as building:
            written = _write_arrays(building, episodes, source, skip_bad, budget)
            aside = set(held_out)
            index = {
                "columns": written.columns,
                "lengths": written.lengths,
                "episode_names": written.names,
                "originals": written.originals,
                "held_out": [number for number, name in enumerate(written.names) if name in aside],
                "metadata": dict(metadata),
                "skipped": written.skipped,
            }
            (building / INDEX).write_text(json.dumps({"sha256": _checksum(index), "index": index}))
            _put_in_place(building, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"the disk is full: {source} does not fit into {folder.parent}; set dataset.cache_dir to a larger disk,"
                " or take less with dataset.max_episodes, dataset.observation_keys or dataset.image_size"
            ) from error
        raise ValueError(
            f"cannot write into {folder.parent} ({error}): set dataset.cache_dir to a folder you may write to"
        ) from error


def _put_in_place(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster and wrote the same entry
            raise


@dataclass
class _Written:
    names: list[str] = field(default_factory=list)
    originals: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    columns: list[dict[str, Any]] = field(default_factory=list)


def _write_arrays(
    building: Path,
    episodes: Iterator[tuple[str, Callable[[], list[Episode]]]],
    source: str,
    skip_bad: bool,
    budget: Budget,
) -> _Written:
    checker = EpisodeChecker()
    written = _Written()
    files: dict[str, IO[bytes]] = {}
    seen: set[str] = set()
    size = good = 0
    with ExitStack() as stack:
        for name, read in episodes:
            if name in seen:
                raise ValueError(f"{source} names two episodes {name!r}: it is damaged")
            seen.add(name)
            try:
                made = [checker.check(episode) for episode in read()]
            except BudgetError:
                raise
            except (ValueError, OSError) as error:
                if not skip_bad:
                    raise bad_episode(source, name, error) from error
                written.skipped[name] = str(error)
                continue
            original = len(written.names)
            for number, episode in enumerate(made):
                arrays = {**episode.observations, "actions": episode.actions}
                size += sum(values.nbytes for values in arrays.values() if not isinstance(values, Frames))
                budget.check_disk(size, f"{source}: its first {len(written.names) + 1} episodes")
                if not files:
                    files = {
                        key: stack.enter_context((building / f"{n}.bin").open("wb"))
                        for n, (key, values) in enumerate(arrays.items())
                        if not isinstance(values, Frames)
                    }
                    written.columns = [_column_of(key, values) for key, values in arrays.items()]
                _append(files, written.columns, arrays)
                written.names.append(f"{name}, on the way {number}" if number else name)
                written.originals.append(original)
                written.lengths.append(len(episode.actions))
            good += 1
            if good == budget.max_episodes:
                break
    if not written.names:
        detail = f": {next(iter(written.skipped.values()))}" if written.skipped else ""
        raise ValueError(f"{source} holds no usable episode ({len(written.skipped)} bad ones{detail})")
    for column in written.columns:
        column["shape"] = [sum(written.lengths), *column["shape"]]
    return written


def _append(files: Mapping[str, IO[bytes]], columns: Sequence[dict[str, Any]], arrays: Mapping[str, Any]) -> None:
    """Write the rows of one demonstration behind those of the earlier ones."""
    for column in columns:
        if isinstance(values := arrays[column["key"]], Frames):
            column["clips"] += [(clip.name, clip.start, clip.fps) for clip in values.clips]
            continue
        rows = np.ascontiguousarray(values)
        files[column["key"]].write(rows.data)
        column["crc32"] = zlib.crc32(rows.data, column["crc32"])


def _column_of(key: str, values: NDArray[Any] | Frames) -> dict[str, Any]:
    """The entry of an array in the index, before any of its rows is written."""
    column = {"key": key, "dtype": values.dtype.str, "shape": values.shape[1:]}
    if isinstance(values, Frames):
        return {**column, "stored": values.stored, "resized_to": values.resized_to, "clips": []}
    return {**column, "crc32": 0}


def bad_episode(source: str, name: str, reason: object) -> ValueError:
    """Build the error for a bad episode.

    Args:
        source: the dataset.
        name: the episode's name.
        reason: the problem.

    Returns:
        The error, to be raised by the caller.
    """
    return ValueError(
        f"{source}: episode {name}: {reason}; repair it, or leave bad episodes out with dataset.on_bad_episode=skip"
    )
