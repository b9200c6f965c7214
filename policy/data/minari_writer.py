"""Writes Minari datasets, the format of `scripts/collect.py`."""

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
from minari.data_collector import EpisodeBuffer
from numpy.typing import NDArray

# Under this key of the dataset's own metadata stands the environment it was collected in, as keyword data.
ENV_KEY = "ddim_policy_env"


# (T + 1, ...), or such arrays by key where the observation space is a Dict.
Observations = NDArray[Any] | Mapping[str, "Observations"]


class RecordedEpisode(Protocol):
    """One episode as a demonstrator recorded it."""

    seed: int
    observations: Observations
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
    """Write episodes as a Minari dataset (HDF5), pictures without loss.

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
            observations=_as_dicts(episode.observations),
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
            # A policy acts on pictures without JPEG's traces, so it learns from such.
            jpeg_encoding=False,
        )
        dataset.storage.update_metadata({ENV_KEY: json.dumps(dict(env_settings))})
        (Path(root) / dataset_id).rename(path)
    return path


def _as_dicts(observations: Any) -> Any:
    # Minari knows no other mapping.
    if not isinstance(observations, Mapping):
        return observations
    return {key: _as_dicts(values) for key, values in observations.items()}


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
