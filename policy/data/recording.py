"""Episodes on disk while a collection runs, so that an interrupted one goes on; the dataset is written at its end."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from policy.common.errors import WorkerError
from policy.common.files import json_text, replacing_file, write_text
from policy.common.locks import only_process
from policy.common.progress import progress
from policy.data.minari_writer import RecordedEpisode

SETTINGS = "settings.json"


@contextmanager
def recorded_episodes(
    folder: Path,
    settings: Mapping[str, Any],
    episodes: int,
    collect: Callable[[int, int], Iterator[Any]],
    restore: Callable[..., Any],
) -> Iterator[list[Any]]:
    """Record episodes, each on disk as soon as it ends, and go on with those of a collection that was interrupted.

    Args:
        folder: holds the episodes while they are recorded; removed once all went well, also inside the `with` block.
        settings: `seed`, that of the first attempt, and everything else that an episode depends on; JSON data.
        episodes: number of episodes.
        collect: yields episodes of ascending seeds, given the seed of the first attempt and their number.
        restore: makes an episode of its fields.

    Yields:
        The episodes, as `write_minari` takes them.

    Raises:
        ValueError: the folder is in use, holds episodes of other settings, or a damaged one.
        WorkerError: `collect` gave up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        try:
            _introduce(folder, settings)
            recorded = [restore(**_read(file)) for file in sorted(folder.glob("*.npz"))][:episodes]
            seed = settings["seed"]
            if recorded:
                print(f"{len(recorded)} of {episodes} demonstrations are on disk already")
                seed = recorded[-1].seed + 1
            if missing := episodes - len(recorded):
                attempts = collect(seed, missing)
                for episode in progress(
                    attempts, total=episodes, initial=len(recorded), desc="collect", unit="episode"
                ):
                    _write(folder, episode)
                    recorded.append(episode)
            yield recorded
        except RuntimeError as error:
            raise WorkerError(str(error)) from error
        finally:
            if not list(folder.glob("*.npz")):
                shutil.rmtree(folder)
        shutil.rmtree(folder)


def _introduce(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down the settings, or refuse those of another collection."""
    file = folder / SETTINGS
    if not file.exists():
        write_text(file, json_text(dict(settings)))
    elif json.loads(file.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{folder} holds the episodes of a collection with other settings that was interrupted: give its command"
            " again, choose another output_dir=, or remove that folder"
        )


def _write(folder: Path, episode: RecordedEpisode) -> None:
    file = folder / f"{episode.seed:012d}.npz"
    with replacing_file(file) as new, new.open("wb") as opened:
        np.savez(opened, **dict(_arrays(vars(episode))))


def _arrays(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields by name; those of a field that holds arrays by key as `field/key`."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", array) for key, array in value.items())
        else:
            yield name, value


def _read(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return _fields(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, its episode is recorded again") from error


def _fields(arrays: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        field, slash, key = name.partition("/")
        if slash:
            fields.setdefault(field, {})[key] = array
        else:
            fields[field] = array if array.ndim else array.item()
    return fields
