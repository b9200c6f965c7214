"""Minari datasets: the format `scripts/collect.py` writes, and one of those training reads."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import minari
import numpy as np
from gymnasium.spaces.utils import flatten_space
from minari.data_collector import EpisodeBuffer
from numpy.typing import NDArray

from policy.data.demonstrations import Demonstrations

# Under this key of the dataset's own metadata stands the environment it was collected in, as keyword data.
ENV_KEY = "ddim_policy_env"


class RecordedEpisode(Protocol):
    """One episode as a demonstrator recorded it."""

    seed: int
    observations: NDArray[Any]
    actions: NDArray[Any]
    rewards: NDArray[Any]
    terminations: NDArray[Any]
    truncations: NDArray[Any]


def write_minari(
    episodes: Iterable[RecordedEpisode],
    *,
    folder: Path,
    dataset_id: str,
    env: gymnasium.Env[Any, Any],
    env_settings: Mapping[str, Any],
) -> Path:
    """Write episodes as a Minari dataset (HDF5).

    Args:
        episodes: what was recorded; observations hold one row more than actions.
        folder: a Minari root; the dataset becomes a folder in it.
        dataset_id: Minari's name for it, `name-v0`.
        env: gives the spaces.
        env_settings: how to make that environment again; training reads it from the dataset.

    Returns:
        The dataset's folder.

    Raises:
        ValueError: a dataset of that name is there already.
    """
    path = Path(folder) / dataset_id
    check_absent(path)
    buffers = [
        EpisodeBuffer(
            seed=episode.seed,
            observations=episode.observations,
            actions=episode.actions,
            rewards=episode.rewards,
            terminations=episode.terminations,
            truncations=episode.truncations,
        )
        for episode in episodes
    ]
    # Minari wants its root absolute. The dataset gets its name once it is whole: a half-written one is never found.
    with (
        tempfile.TemporaryDirectory(prefix=".writing-", dir=_made(path.parent)) as root,
        _minari_root(Path(root).resolve()),
        warnings.catch_warnings(),
    ):
        # Minari misses an environment spec and contact details; env_settings say how to make the environment.
        warnings.simplefilter("ignore", UserWarning)
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            observation_space=env.observation_space,
            action_space=env.action_space,
            algorithm_name="scripted expert",
            author="ddim-policy",
            author_email="none",
            code_permalink="none",
            description=f"{len(buffers)} demonstrations in {env_settings.get('name')}",
            data_format="hdf5",
        )
        dataset.storage.update_metadata({ENV_KEY: json.dumps(dict(env_settings))})
        (Path(root) / dataset_id).rename(path)
    return path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def dataset_name(env_settings: Mapping[str, Any]) -> str:
    """A Minari name for demonstrations in an environment: its name and its task or id, `-v0`.

    >>> dataset_name({"name": "metaworld", "task": "pick-place-v3"})
    'metaworld-pick-place-v3-v0'
    """
    parts = [str(env_settings[key]) for key in ("name", "task", "id") if key in env_settings]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(parts)) + "-v0"


def check_absent(path: Path) -> None:
    """Refuse to write a dataset over another.

    Raises:
        ValueError: with what to do.
    """
    if path.exists():
        raise ValueError(f"{path} is there already: choose another output_dir=, or remove it first")


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    # Minari knows where to write only from this variable.
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def read_minari(*, path: Path, max_episodes: int | None = None) -> Demonstrations:
    """Read a Minari dataset from its folder.

    Args:
        path: the dataset's folder, the one that holds `data/`.
        max_episodes: only the first so many episodes.

    Returns:
        The episodes; a flat observation stands under the key `state`.

    Raises:
        ValueError: the folder is missing, damaged or not a Minari dataset, or its spaces cannot be used.
    """
    path = Path(path).expanduser()
    if not (path / "data").is_dir():
        raise ValueError(f"no Minari dataset at {path}: set dataset.path to the folder that scripts/collect.py names")
    _check_states_spaces(path)
    try:
        dataset = minari.MinariDataset(path / "data")
        episodes = list(dataset.iterate_episodes())
        env = json.loads(dataset.storage.metadata.get(ENV_KEY, "null"))
        if not isinstance(env, (dict, type(None))):
            raise TypeError(f"{ENV_KEY} is {env!r}")
    except Exception as error:  # h5py, JSON and Minari each bring their own errors for damaged files
        raise ValueError(f"{path} is damaged or incomplete ({error}): collect it again") from error
    if not episodes:
        raise ValueError(f"{path} holds no episodes: collect it again")
    space = dataset.observation_space
    if not (isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1):
        raise ValueError(f"{path}: observations must be vectors; this dataset has {space}")
    if not isinstance(dataset.action_space, gymnasium.spaces.Box):
        raise ValueError(f"{path}: actions must be continuous (Box); this dataset has {dataset.action_space}")
    width = flatten_space(dataset.action_space).shape[0]  # type: ignore[index]
    return Demonstrations(
        # An episode's last observation was seen after its last action.
        observations={"state": np.concatenate([e.observations[: len(e.actions)] for e in episodes]).astype(np.float32)},
        actions=np.concatenate([np.reshape(e.actions, (-1, width)) for e in episodes]).astype(np.float32),
        episode_ends=np.cumsum([len(e.actions) for e in episodes], dtype=np.int64),
        source=str(path),
        metadata={"format": "minari", "env": env},
    ).first(max_episodes)


def _check_states_spaces(path: Path) -> None:
    try:
        metadata = json.loads((path / "data" / "metadata.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): collect it again") from error
    # Without its spaces Minari would import and build the environment that the file names.
    if not isinstance(metadata, dict) or not all(
        isinstance(metadata.get(key), str) for key in ("observation_space", "action_space")
    ):
        raise ValueError(f"{path} does not state its observation and action spaces: write it again with Minari 0.5")
