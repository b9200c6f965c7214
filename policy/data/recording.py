"""Episodes on disk while a command records them, so that it goes on if interrupted; the dataset comes at its end."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from policy.common.arguments import dotted
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
        folder: see `unfinished_recording`.
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
    with unfinished_recording(folder, settings):
        recorded = [read_episode(file, restore) for file in sorted(folder.glob("*.npz"))][:episodes]
        seed = settings["seed"]
        if recorded:
            print(f"{len(recorded)} of {episodes} demonstrations are on disk already")
            seed = recorded[-1].seed + 1
        if missing := episodes - len(recorded):
            try:
                attempts = collect(seed, missing)
                for episode in progress(
                    attempts, total=episodes, initial=len(recorded), desc="collect", unit="episode"
                ):
                    write_episode(folder, episode)
                    recorded.append(episode)
            except RuntimeError as error:
                raise WorkerError(str(error)) from error
        yield recorded


@contextmanager
def unfinished_recording(folder: Path, settings: Mapping[str, Any], setting: str = "output_dir") -> Iterator[None]:
    """Keep a folder for episodes while they are recorded, and keep other processes out of it.

    Args:
        folder: removed once all went well inside, or if it holds no episode then; otherwise the same command goes on.
        settings: what the episodes depend on; JSON data.
        setting: the setting with which the user chooses the folder, for messages.

    Raises:
        ValueError: the folder is in use, or holds episodes of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        try:
            _introduce(folder, settings, setting)
            yield
        finally:
            if not list(folder.glob("*.npz")):
                shutil.rmtree(folder)
        if folder.exists():
            shutil.rmtree(folder)


def _introduce(folder: Path, settings: Mapping[str, Any], setting: str) -> None:
    """Write down the settings, or refuse episodes of other ones."""
    file = folder / SETTINGS
    if not (file.exists() and any(folder.glob("*.npz"))):  # one that was killed before its first episode is nothing
        write_text(file, json_text(dict(settings)))
        return
    try:
        before = dotted(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: remove {folder}, and give the same command again") from error
    now = dotted(settings)
    names = sorted(
        name for name in {*before, *now} if not (name in before and name in now and before[name] == now[name])
    )
    if names:
        differing = ", ".join(f"{name}={before.get(name, 'none')}, now {now.get(name, 'none')}" for name in names)
        raise ValueError(
            f"{folder} holds the episodes of a command with other settings that was interrupted ({differing}): give"
            f" that one again, choose another {setting}=, or remove that folder"
        )


def episode_file(folder: Path, seed: int) -> Path:
    """Where the episode with this seed is recorded."""
    return folder / f"{seed:012d}.npz"


def write_episode(folder: Path, episode: RecordedEpisode) -> None:
    """Write an episode to the file of its seed, which is whole or as it was before."""
    with replacing_file(episode_file(folder, episode.seed)) as new, new.open("wb") as opened:
        np.savez(opened, **dict(_arrays(vars(episode))))


def _arrays(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields by name; those of a field that holds arrays by key as `field/key`."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", array) for key, array in value.items())
        else:
            yield name, value


def read_episode(file: Path, restore: Callable[..., Any]) -> Any:
    """Read an episode that was recorded.

    Args:
        file: see `episode_file`.
        restore: makes an episode of its fields.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return restore(**_fields(arrays))
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it, and give the command again") from error


def _fields(arrays: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        field, slash, key = name.partition("/")
        if slash:
            fields.setdefault(field, {})[key] = array
        else:
            fields[field] = array if array.ndim else array.item()
    return fields
