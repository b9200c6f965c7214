"""Writes Minari datasets, the format of `ddim-collect` and of `ddim-rollout record=`."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from policy.common.building import building_in
from policy.common.control_rate import stated_rate

if TYPE_CHECKING:
    import gymnasium
    from numpy.typing import NDArray

# The key in the dataset's own metadata of the environment in which it was collected, as keyword data.
ENV_KEY = "ddim_policy_env"
# The key of the rate in Hz at which its control steps were recorded.
RATE_KEY = "ddim_policy_rate_hz"

# What HDF5 and Minari's own files take beside the arrays: 14 kB an episode were measured.
BYTES_A_DATASET, BYTES_AN_EPISODE = 100_000, 20_000

# All observations of an episode: (T + 1, ...), or such arrays by key if the observation space is a Dict.
RecordedObservations: TypeAlias = "NDArray[Any] | Mapping[str, RecordedObservations]"


class RecordedEpisode(Protocol):
    """One episode as a demonstrator recorded it."""

    seed: int
    observations: RecordedObservations
    actions: NDArray[Any]
    rewards: NDArray[Any]
    terminations: NDArray[Any]
    truncations: NDArray[Any]


def write_minari(
    episodes: Iterable[RecordedEpisode],
    *,
    path: Path,
    env: gymnasium.Env[Any, Any],
    env_settings: Mapping[str, Any],
    algorithm: str = "scripted expert",
    setting: str = "output_dir",
) -> None:
    """Write episodes as a Minari dataset (HDF5), pictures without loss; its id is their `dataset_name`.

    Args:
        episodes: the recorded episodes; observations hold one row more than actions.
        path: becomes the dataset's folder. Minari loads it by name if it is called like an id, as in `name-v0`.
        env: the environment, for its spaces and its control rate.
        env_settings: settings that make the environment again; training reads them from the dataset.
        algorithm: what acted, for readers.
        setting: the setting with which the user chooses the folder, for messages.

    Raises:
        ValueError: the folder exists already.
        OSError: the disk is too full for the dataset.
    """
    check_absent(path, setting)
    dataset_id, recorded = dataset_name(env_settings), list(episodes)
    # The dataset gets its name when it is complete, so that nobody finds a half-written one.
    with building_in(path.parent) as root:
        _check_room(root, recorded)
        with _minari_root(root.resolve()):  # Minari needs an absolute root
            _create_dataset(recorded, dataset_id, env, env_settings, algorithm)
        (root / dataset_id).rename(path)


def _check_room(folder: Path, episodes: Sequence[RecordedEpisode]) -> None:
    """Raise OSError if the disk is too full: HDF5 crashes when it cannot write on closing a file."""
    arrays = sum(_bytes(value) for episode in episodes for value in vars(episode).values())
    needed = arrays + BYTES_A_DATASET + BYTES_AN_EPISODE * len(episodes)
    if (free := shutil.disk_usage(folder).free) < needed:
        what = f"{os.strerror(errno.ENOSPC)}, {needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, what, str(folder))


def _bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return int(getattr(value, "nbytes", 0))


def _create_dataset(
    episodes: Sequence[RecordedEpisode],
    dataset_id: str,
    env: gymnasium.Env[Any, Any],
    env_settings: Mapping[str, Any],
    algorithm: str,
) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

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
    with warnings.catch_warnings():
        # Minari warns of missing contact details and of a missing environment spec, which `env_settings` replaces.
        warnings.simplefilter("ignore", UserWarning)
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            observation_space=env.observation_space,
            action_space=env.action_space,
            algorithm_name=algorithm,
            author="ddim-policy",
            author_email="none",
            code_permalink="none",
            description=f"{len(buffers)} demonstrations in {env_settings.get('name')}",
            data_format="hdf5",
            # A policy acts on pictures without JPEG's artefacts, so it has to learn from such pictures.
            jpeg_encoding=False,
        )
        rate = stated_rate(env.metadata.get("render_fps"))
        dataset.storage.update_metadata(
            {ENV_KEY: json.dumps(dict(env_settings)), **({} if rate is None else {RATE_KEY: rate})}
        )


def _as_dicts(observations: Any) -> Any:
    # The only mapping that Minari accepts is a dict.
    if not isinstance(observations, Mapping):
        return observations
    return {key: _as_dicts(values) for key, values in observations.items()}


def dataset_name(env_settings: Mapping[str, Any]) -> str:
    """Name demonstrations for Minari: the environment's name, its task or id, and `-v0`.

    >>> dataset_name({"name": "metaworld", "task": "pick-place-v3"})
    'metaworld-pick-place-v3-v0'
    """
    parts = [str(env_settings[key]) for key in ("name", "task", "id") if key in env_settings]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(parts)) + "-v0"


def check_absent(path: Path, setting: str = "output_dir") -> None:
    """Refuse to overwrite a dataset.

    Args:
        path: where it would be.
        setting: the setting with which the user chooses that, for the message.

    Raises:
        ValueError: there is a file or folder at that path; the message says what to do.
    """
    if path.exists():
        raise ValueError(f"{path} is there already: choose another {setting}=, or remove it first")


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    # This variable is the only way to tell Minari where to write.
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
