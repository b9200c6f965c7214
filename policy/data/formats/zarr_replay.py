"""Reader for the Diffusion Policy zarr replay buffer: `data/<key>` end to end, `meta/episode_ends` exclusive."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from policy.data.demonstrations import Demonstrations

Transform = Callable[[NDArray[Any]], NDArray[Any]]


def read_zarr_replay(
    *,
    path: Path,
    observation_key: str = "state",
    action_key: str = "action",
    max_episodes: int | None = None,
    transform: Transform | None = None,
) -> Demonstrations:
    """Read a replay buffer, a folder or a `.zarr.zip`.

    Args:
        path: the store.
        observation_key: which array under `data/` holds the observations.
        action_key: which array under `data/` holds the actions.
        max_episodes: only the first so many episodes.
        transform: maps the stored observations (N, ...) to those the environment gives, where they differ.

    Returns:
        The episodes, observations under the key `state`.

    Raises:
        ValueError: the file is missing, damaged or not a replay buffer, or a key is not in it.
    """
    path = Path(path).expanduser()
    root = _open(path)
    ends = np.asarray(_array(root, "meta", "episode_ends", path), dtype=np.int64)
    observations = np.asarray(_array(root, "data", observation_key, path))
    actions = np.asarray(_array(root, "data", action_key, path), dtype=np.float32)
    if transform is not None:
        observations = transform(observations)
    if observations.dtype == np.float64:
        observations = observations.astype(np.float32)
    return Demonstrations(
        observations={"state": observations},
        actions=actions,
        episode_ends=ends,
        source=str(path),
        metadata={"format": "zarr_replay"},
    ).first(max_episodes)


def _open(path: Path) -> zarr.Group:
    if not path.exists():
        raise ValueError(f"no dataset at {path}: set dataset.path to a zarr replay buffer (a folder or a .zarr.zip)")
    try:
        # Both stores only read here: nothing is unpickled or extracted.
        store = zarr.storage.ZipStore(path, mode="r") if path.is_file() else str(path)
        return zarr.open_group(store, mode="r")
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable zarr replay buffer ({error}): fetch it again") from error


def _array(root: zarr.Group, group: str, key: str, path: Path) -> Any:
    name = f"{group}/{key}"
    try:
        node: Any = root[name]
        # Older numcodecs unpickles with this codec, which runs whatever the file says.
        codecs = (node.filters, node.compressors if hasattr(node, "compressors") else node.compressor)
        if "pickle" in repr(codecs).lower() or node.dtype == object:
            raise TypeError("it holds pickled objects")
        return node[:]
    except KeyError as error:
        try:
            held = ", ".join(sorted(root[group].array_keys())) or "nothing"  # type: ignore[union-attr]
        except KeyError:
            held = "nothing"
        raise ValueError(f"{path} has no array {name!r}; {group}/ holds: {held}") from error
    except Exception as error:  # every codec brings its own errors for damaged chunks
        raise ValueError(f"{path}: array {name!r} is damaged ({error}): fetch the file again") from error
