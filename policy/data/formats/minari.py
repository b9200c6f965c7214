"""Minari datasets, stored as HDF5, arrow or parquet; a folder, or an id such as D4RL/door/human-v2."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from gymnasium import spaces
from minari.serialization import deserialize_space
from numpy.typing import NDArray
from PIL import Image

from policy.common.control_rate import stated_rate
from policy.common.observations import is_image
from policy.data.budget import Budget, BudgetError
from policy.data.episode import Episode, EpisodeReader, Request
from policy.data.formats.format import Format
from policy.data.formats.hdf5 import HDF5File
from policy.data.formats.parquet import check_row_groups
from policy.data.minari_writer import ENV_KEY, RATE_KEY

ACTIONS = "actions"
OBSERVATIONS = "observations"
DATASET_ID = re.compile(r"[\w-]+(/[\w-]+)*-v\d+")
# A choice among more options has a one-hot vector that is too wide for a network.
MAX_CHOICES = 2**16
# The distance by which an action may leave its space, as a fraction of the space's width, because float32 cannot hold
# every bound of float64.
TOLERANCE = 1e-4
# Seconds to wait for the hub's answer.
REACH_SECONDS = 10

# Observations as they are stored: an array with a row for each of them, or one JPEG for each of them.
Rows = NDArray[Any] | list[bytes]


@dataclass(frozen=True)
class _Leaf:
    """One array of a dataset: its path through Dicts (keys) and Tuples (indices), and its space."""

    path: tuple[str | int, ...]
    space: gymnasium.Space[Any]

    def __str__(self) -> str:
        return "/".join(map(str, self.path))


def find_minari(path: Path) -> Path:
    """Find the folder of a Minari dataset.

    Args:
        path: the folder, or an id; an id that is not under Minari's local root is downloaded.

    Returns:
        The folder that holds `data/`.

    Raises:
        ValueError: the id is not under the local root and cannot be downloaded.
    """
    path = path.expanduser()
    dataset_id = path.as_posix()
    if path.exists() or not DATASET_ID.fullmatch(dataset_id):
        return path
    root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    folder = root / dataset_id
    if not folder.exists():
        _download(dataset_id, root, folder)
    return folder


def _download(dataset_id: str, root: Path, folder: Path) -> None:
    try:
        _check_reachable()
        minari.download_dataset(dataset_id)
        if not folder.exists():
            raise FileNotFoundError(f"the download left nothing at {folder}")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # otherwise half a dataset would be found the next time
        if not isinstance(error, Exception):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{dataset_id} is not a folder, is not under Minari's local root {root}, and could not be downloaded"
            f" ({reason}): correct dataset.path, or connect to the network, or copy the dataset to {folder}"
        ) from error


def _check_reachable() -> None:
    # Without a network, the hub's client would retry for half a minute or more.
    if os.environ.get("MINARI_REMOTE", "hf://").startswith("hf://"):
        from huggingface_hub import constants, get_session

        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)


def open_minari(path: Path, files: Mapping[str, Path], request: Request) -> EpisodeReader:
    """Open a Minari dataset.

    Vectors, pictures and choices (one-hot) are observed, each under its key in the observation space; nested keys are
    joined, as in `outer/inner`. An observation without a key gets `state`, or `image`.

    Args:
        path: the dataset's folder.
        files: the files in the folder.
        request: the user's request; by default every array of a fixed size is observed.

    Returns:
        The dataset's reader.

    Raises:
        ValueError: it is not a Minari dataset, is damaged, or lacks a requested part.
    """
    metadata = _metadata(files)
    if request.action_key is not None:
        raise ValueError(f"Minari names its actions itself: leave out dataset.action_key={request.action_key!r}")
    if request.subset is not None:
        raise ValueError(f"Minari names no subsets of its episodes: leave out dataset.subset={request.subset!r}")
    action = _Leaf((ACTIONS,), _space(metadata, "action_space"))
    if not isinstance(action.space, spaces.Box):
        raise ValueError(f"its actions are {action.space}; a diffusion policy denoises continuous actions (a Box)")
    observations = _observations(_space(metadata, "observation_space"), request)
    said: dict[str, Any] = {"env": _environment(metadata)}
    if rate := stated_rate(metadata.get(RATE_KEY)):
        said["rate_hz"] = rate
    if isinstance(metadata.get("dataset_id"), str):
        said["dataset_id"] = metadata["dataset_id"]
    _check_total(metadata, action, observations, request.budget)
    storage = _open_storage(str(metadata.get("data_format", "hdf5")), files, request.budget)
    total = metadata.get("total_episodes")
    if not storage.names or (isinstance(total, int) and total != len(storage.names)):
        storage.close()
        raise ValueError(
            f"it should have {total} episodes, but {len(storage.names)} are there: it was written or copied partly,"
            " fetch it again"
        )
    clip = request.on_action_outside == "clip"
    return MinariReader(storage, observations=observations, action=action, clip=clip, said=said)


FORMAT = Format(open=open_minari, find=find_minari)


class MinariReader:
    """Reads one episode at a time, and only the requested arrays of it."""

    held_out: Sequence[str] = ()

    def __init__(
        self,
        storage: _Storage,
        *,
        observations: Mapping[str, _Leaf],
        action: _Leaf,
        clip: bool,
        said: Mapping[str, Any],
    ) -> None:
        self.names = storage.names
        self.metadata: Mapping[str, Any] = {"format": "minari", **said}
        self._storage = storage
        self._observations = observations
        self._action = action
        self._clip = clip
        self._low, self._high = _limits(action.space)

    def read(self, name: str) -> Episode:
        """See `EpisodeReader`."""
        rows, *observed = self._storage.rows(name, [self._action, *self._observations.values()])
        for leaf, seen in zip(self._observations.values(), observed, strict=True):
            if len(seen) != len(rows) + 1:
                raise ValueError(
                    f"lengths disagree: '{leaf}' has {len(seen)} rows, {len(rows)} actions need {len(rows) + 1}"
                )
        actions = _values(rows, self._action)
        if self._clip:
            actions = np.clip(actions, *self._bounds())
        else:
            self._check_limits(actions)
        # The last observation is left out: it follows the last action.
        pairs = zip(self._observations.items(), observed, strict=True)
        return Episode(actions=actions, observations={key: _values(seen[:-1], leaf) for (key, leaf), seen in pairs})

    def close(self) -> None:
        """See `EpisodeReader`."""
        self._storage.close()

    def _check_limits(self, actions: NDArray[Any]) -> None:
        outside = np.argwhere((actions < self._low) | (actions > self._high))
        if len(outside):
            transition, index = outside[0]
            low, high = (bound[index] for bound in self._bounds())
            raise ValueError(
                f"'actions' is {actions[transition, index]:g} at transition {transition}, index {index}; its space"
                f" allows {low:g} to {high:g}: clip such actions, as simulators do, with dataset.on_action_outside=clip"
            )

    def _bounds(self) -> tuple[NDArray[Any], NDArray[Any]]:
        space: Any = self._action.space
        return np.ravel(space.low), np.ravel(space.high)


def _check_total(metadata: Mapping[str, Any], action: _Leaf, observations: Mapping[str, _Leaf], budget: Budget) -> None:
    """Compare the size that the metadata states with the budget; the episodes' own sizes are compared when read."""
    steps, episodes = metadata.get("total_steps"), metadata.get("total_episodes")
    if not (isinstance(steps, int) and isinstance(episodes, int) and 0 < episodes <= steps):
        return
    shapes = {key: _shape(leaf.space) for key, leaf in {**observations, ACTIONS: action}.items()}
    count = min(episodes, budget.max_episodes or episodes)
    budget.check_episodes([steps // episodes] * count, shapes)


def _shape(space: gymnasium.Space[Any]) -> tuple[int, ...]:
    return space.shape or () if isinstance(space, spaces.Box) else (spaces.utils.flatdim(space),)


def _limits(space: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = (np.ravel(bound).astype(np.float64) for bound in (space.low, space.high))
    two_sided = np.isfinite(low) & np.isfinite(high)
    with np.errstate(over="ignore", invalid="ignore"):
        low_slack, high_slack = (
            TOLERANCE * np.where(two_sided, high - low, np.maximum(1, np.abs(bound))) for bound in (low, high)
        )
        return low - low_slack, high + high_slack


# The metadata


def _metadata(files: Mapping[str, Path]) -> dict[str, Any]:
    if "data/metadata.json" not in files:
        raise ValueError(
            "no Minari dataset is there (it has no data/metadata.json): set dataset.path to the folder that holds data/"
        )
    try:
        metadata = json.loads(files["data/metadata.json"].read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"data/metadata.json is damaged ({error}): fetch it again") from error
    # If the spaces are missing, Minari would import and build the environment that the file names.
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(key), str) for key in ("observation_space", "action_space")
    ):
        raise ValueError(
            "data/metadata.json does not state the observation_space and action_space: write it again with Minari 0.5"
        )
    return metadata


def _space(metadata: Mapping[str, Any], key: str) -> gymnasium.Space[Any]:
    try:
        return deserialize_space(metadata[key])
    except Exception as error:  # Minari does not check its input: each kind of damage raises another exception
        raise ValueError(f"{key} in data/metadata.json is not a space that Minari knows ({error!r})") from error


def _environment(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        env = json.loads(metadata.get(ENV_KEY, "null"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{ENV_KEY} in data/metadata.json is damaged ({error}): fetch it again") from error
    if not isinstance(env, dict | None):
        raise ValueError(f"{ENV_KEY} in data/metadata.json must be the settings of an environment; it is {env!r}")
    return env


def _observations(space: gymnasium.Space[Any], request: Request) -> dict[str, _Leaf]:
    leaves = dict[str, _Leaf]()
    for leaf in _leaves(space, ()):
        name = "/".join(map(str, leaf.path[1:])) or ("image" if _is_picture(space) else "state")
        if name in leaves:
            raise ValueError(f"two of its observations are called {name!r}")
        leaves[name] = leaf
    usable = [name for name, leaf in leaves.items() if _is_usable(leaf.space)]
    if not usable:
        raise ValueError(f"none of its observations is an array of a fixed size; its observation space is {space}")
    chosen = request.observations(leaves, usable)
    if refused := [name for name in chosen.values() if name not in usable]:
        raise ValueError(
            f"observation {refused[0]!r} is {leaves[refused[0]].space}, which is not an array of a fixed size; usable:"
            f" {', '.join(usable)}"
        )
    return {key: leaves[name] for key, name in chosen.items()}


def _leaves(space: gymnasium.Space[Any], path: tuple[str | int, ...]) -> Iterator[_Leaf]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        children = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for name, child in children:
            yield from _leaves(child, (*path, name))
    else:
        yield _Leaf((OBSERVATIONS, *path), space)


def _is_picture(space: gymnasium.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and is_image(space.shape)


def _is_usable(space: gymnasium.Space[Any]) -> bool:
    if isinstance(space, spaces.Box):
        return True
    choices = spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    return isinstance(space, choices) and spaces.utils.flatdim(space) <= MAX_CHOICES


# The storage


class _Storage(Protocol):
    """One of Minari's storage formats.

    Attributes:
        names: numbers of the episodes, in order.
    """

    names: Sequence[str]

    def rows(self, name: str, leaves: Sequence[_Leaf]) -> list[Rows]:
        """Read some arrays of an episode: T rows of actions, T + 1 rows of observations."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def _open_storage(data_format: str, files: Mapping[str, Path], budget: Budget) -> _Storage:
    if data_format == "hdf5":
        return _HDF5Storage(files, budget)
    if data_format in ("arrow", "parquet"):
        return _ArrowStorage(files, data_format, budget)
    raise ValueError(f"data_format {data_format!r} in data/metadata.json must be hdf5, arrow or parquet")


class _HDF5Storage:
    """One file, `episode_<i>/observations/...` and `episode_<i>/actions`."""

    def __init__(self, files: Mapping[str, Path], budget: Budget) -> None:
        if "data/main_data.hdf5" not in files:
            raise ValueError("it has no data/main_data.hdf5: it was copied partly, fetch it again")
        self._file = HDF5File(files["data/main_data.hdf5"], budget)
        found = (re.fullmatch(r"episode_(\d+)", name) for name in self._file.names(""))
        self.names: Sequence[str] = sorted((match[1] for match in found if match), key=int)

    def rows(self, name: str, leaves: Sequence[_Leaf]) -> list[Rows]:
        return [self._rows(name, leaf) for leaf in leaves]

    def _rows(self, name: str, leaf: _Leaf) -> Rows:
        steps = (f"_index_{step}" if isinstance(step, int) else step for step in leaf.path)
        key = "/".join((f"episode_{name}", *steps))
        if not _may_be_jpeg(leaf.space):
            return self._file.numbers(key)
        blobs = self._file.blobs(key)
        if blobs is not None:
            return blobs
        rows = self._file.numbers(key)
        # Minari stores JPEGs of equal length as a matrix.
        return [row.tobytes() for row in rows] if rows.ndim == 2 else rows

    def close(self) -> None:
        self._file.close()


class _ArrowStorage:
    """A folder for each episode, with columns `observations` (a struct if they are nested) and `actions`."""

    def __init__(self, files: Mapping[str, Path], suffix: str, budget: Budget) -> None:
        self._budget = budget
        self._parts: dict[str, list[Path]] = {}
        for name, file in files.items():
            if match := re.fullmatch(rf"data/(\d+)/[^/]+\.{suffix}", name):
                self._parts.setdefault(match[1], []).append(file)
        self.names: Sequence[str] = sorted(self._parts, key=int)

    def rows(self, name: str, leaves: Sequence[_Leaf]) -> list[Rows]:
        try:
            table = pa.concat_tables([_read_table(part, leaves, self._budget) for part in self._parts[name]])
        except BudgetError:
            raise
        except Exception as error:  # exceptions of pyarrow, and exceptions of Python that it lets through
            raise ValueError(f"{self._parts[name][0].name} cannot be read ({error}): fetch it again") from error
        return [_arrow_rows(table, leaf) for leaf in leaves]

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _read_table(part: Path, leaves: Sequence[_Leaf], budget: Budget) -> pa.Table:
    if part.suffix == ".parquet":
        check_row_groups(pyarrow.parquet.read_metadata(part), budget, part.name)
        columns = [".".join(map(str, leaf.path)) for leaf in leaves]
        return pyarrow.parquet.ParquetFile(part).read(columns=columns, use_threads=False)
    with pa.memory_map(str(part)) as mapped:  # columns that are not requested are never read
        return pa.ipc.open_file(mapped, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()


def _arrow_rows(table: pa.Table, leaf: _Leaf) -> Rows:
    first, *steps = leaf.path
    try:
        column = table.column(first).combine_chunks()
        column.validate(full=True)
        for step in steps:
            column = column.field(str(step))
        rows = _arrow_values(column, leaf.space)
    except Exception as error:
        raise ValueError(f"'{leaf}' cannot be read ({error})") from error
    # Minari pads actions to the length of the observations.
    return rows[:-1] if first == ACTIONS else rows


def _arrow_values(column: Any, space: gymnasium.Space[Any]) -> Rows:
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [value or b"" for value in column.to_pylist()]
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    if column.null_count or values.null_count:
        raise ValueError("it has empty rows")
    numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if values is column:
        return numbers
    width = column.type.list_size
    return numbers.reshape(len(column), *(space.shape if width == math.prod(space.shape or ()) else (width,)))  # type: ignore[misc]


# The values


def _values(rows: Rows, leaf: _Leaf) -> NDArray[Any]:
    """Convert stored rows to vectors (T, D) or pictures (T, H, W, C)."""
    space = leaf.space
    values = _pictures(rows, leaf) if isinstance(rows, list) else rows
    if values.shape[1:] != space.shape:
        raise ValueError(f"'{leaf}' holds arrays of shape {values.shape[1:]}; its space is {space}")
    if _is_picture(space):
        return values
    flat = values.reshape(len(values), math.prod(space.shape))
    return flat if isinstance(space, spaces.Box) else _zeros_and_ones(flat, leaf)


def _may_be_jpeg(space: gymnasium.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


def _pictures(rows: Sequence[bytes], leaf: _Leaf) -> NDArray[np.uint8]:
    shape = leaf.space.shape or ()
    pictures = np.empty((len(rows), *shape), np.uint8)
    for number, row in enumerate(rows):
        try:
            with Image.open(io.BytesIO(row), formats=["JPEG"]) as image:
                if (*image.size[::-1], *((3,) if image.mode == "RGB" else ())) != shape:
                    raise ValueError(f"it is {image.mode}, {image.width} x {image.height} pixels; its space is {shape}")
                pictures[number] = np.asarray(image)
        except Exception as error:  # Pillow's exceptions have no common class
            raise ValueError(f"'{leaf}' cannot be read at transition {number} ({error})") from error
    return pictures


def _counts(space: gymnasium.Space[Any]) -> Any:
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec
    return space.n if isinstance(space, spaces.Discrete) else 2


def _zeros_and_ones(values: NDArray[Any], leaf: _Leaf) -> NDArray[np.float32]:
    """Encode choices (T, C) as `gymnasium.spaces.utils.flatten` does."""
    space: Any = leaf.space
    if values.dtype.kind not in "biu":
        raise ValueError(f"'{leaf}' must hold whole numbers; it holds {values.dtype}")
    start = np.ravel(getattr(space, "start", 0))
    counts = np.ravel(_counts(space))
    choices = values.astype(np.int64) - start
    wrong = np.argwhere((choices < 0) | (choices >= counts))
    if len(wrong):
        transition, index = wrong[0]
        raise ValueError(f"'{leaf}' is {values[transition, index]} at transition {transition}; its space is {space}")
    if isinstance(space, spaces.MultiBinary):
        return choices.astype(np.float32)
    encoded = np.zeros((len(choices), counts.sum()), np.float32)
    np.put_along_axis(encoded, choices + np.cumsum(counts) - counts, 1, axis=1)
    return encoded
