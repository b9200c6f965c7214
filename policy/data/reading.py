"""Demonstrations from any public format, by one function."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from policy.common.arguments import unknown_name
from policy.common.progress import progress
from policy.data.cache import bad_episode, default_cache_dir, open_cached, write_cached
from policy.data.demonstrations import Demonstrations
from policy.data.episode import Episode, EpisodeReader, Relabel, Request, Transform, as_images
from policy.data.files import fingerprint, list_files
from policy.data.formats import FORMATS
from policy.data.formats.minari import find_minari
from policy.model.diffusion_policy import is_image

# Raised when what the cache holds changes its meaning.
CACHE_VERSION = 1


def read_demonstrations(
    *,
    format: str,
    path: Path,
    observation_keys: list[str] | dict[str, str] | None = None,
    action_key: str | None = None,
    subset: str | None = None,
    max_episodes: int | None = None,
    relabel: Relabel | None = None,
    transform: Transform | None = None,
    image_size: int | None = None,
    on_bad_episode: str = "error",
    cache_dir: Path | None = None,
) -> Demonstrations:
    """Open demonstrations; the first time, they are converted into a cache that training maps into memory.

    Args:
        format: `minari`, `lerobot`, `robomimic` or `zarr` (the Diffusion Policy replay buffer).
        path: the file or folder; for Minari also an id such as D4RL/door/human-v2, found under the local Minari root or
            downloaded.
        observation_keys: which of the file's keys are observed, or policy key to the file's key; by default those that
            the format marks as observations.
        action_key: the file's key of the actions, where it is not the format's own.
        subset: a subset of the episodes that the file itself names (robomimic's filter keys, LeRobot's splits).
        max_episodes: only the first so many good episodes.
        relabel: hindsight: rewrites an episode, the file's observations by key and its actions, as a demonstration of
            what it achieved.
        transform: maps the file's observations of an episode, (T, ...) by key, to those the environment gives.
        image_size: height and width to which images are resized; by default they stay as they are.
        on_bad_episode: `error` refuses a dataset with a bad episode, `skip` leaves bad ones out with a warning.
        cache_dir: where converted demonstrations are kept; by default the user's cache folder.

    Returns:
        The demonstrations, mapped from disk.

    Raises:
        ValueError: the dataset is missing, damaged, or has not what was asked for; names file, episode and key.
    """
    if format not in FORMATS:
        raise unknown_name("format of demonstrations", format, FORMATS)
    if on_bad_episode not in ("error", "skip"):
        raise unknown_name("value of dataset.on_bad_episode", on_bad_episode, ("error", "skip"))
    for name, value in (("max_episodes", max_episodes), ("image_size", image_size)):
        if value is not None and value < 1:
            raise ValueError(f"dataset.{name} must be 1 or more; got {value}")
    path = find_minari(path) if format == "minari" else Path(path).expanduser()
    files = list_files(path)
    settings = {
        "version": CACHE_VERSION,
        "format": format,
        "observation_keys": observation_keys,
        "action_key": action_key,
        "subset": subset,
        "max_episodes": max_episodes,
        "relabel": relabel and _code_of("relabel", relabel),
        "transform": transform and _code_of("transform", transform),
        "image_size": image_size,
        "path": str(path.resolve()),
    }
    folder = (cache_dir or default_cache_dir()).expanduser() / f"{path.name}-{fingerprint(files, settings)}"
    found = open_cached(folder)
    if found is None:
        request = Request(observation_keys=observation_keys, action_key=action_key, subset=subset)
        reader = _open(format, path, files, request)
        try:
            write_cached(
                folder,
                _episodes(reader, partial(_prepared, reader, relabel, transform, image_size), max_episodes),
                source=str(path),
                metadata=reader.metadata,
                held_out=reader.held_out,
                skip_bad=on_bad_episode == "skip",
                max_episodes=max_episodes,
            )
        finally:
            reader.close()
        found = open_cached(folder)
        if found is None:
            raise ValueError(f"the cache folder {folder.parent} keeps nothing: set dataset.cache_dir to another one")
    if max_episodes is not None and found.num_episodes < max_episodes:
        raise ValueError(f"{path} has {found.num_episodes} episodes; dataset.max_episodes asks for {max_episodes}")
    if found.skipped:
        name, reason = next(iter(found.skipped.items()))
        if on_bad_episode == "error":  # converted before, when bad episodes were to be skipped
            raise bad_episode(str(path), name, reason)
        warnings.warn(
            f"{path}: {len(found.skipped)} of {len(found.skipped) + found.num_episodes} episodes are bad and left out;"
            f" the first one is {name}: {reason}",
            stacklevel=2,
        )
    return found


def _open(format: str, path: Path, files: Mapping[str, Path], request: Request) -> EpisodeReader:
    try:
        return FORMATS[format](path, files, request)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _episodes(
    reader: EpisodeReader, read: Callable[[str], Episode], max_episodes: int | None
) -> Iterator[tuple[str, Callable[[], Episode]]]:
    total = min(len(reader.names), max_episodes or len(reader.names))
    with progress(reader.names, total=total, desc="read", unit="episode") as names:
        for name in names:
            yield name, partial(read, name)


def _prepared(
    reader: EpisodeReader, relabel: Relabel | None, transform: Transform | None, image_size: int | None, name: str
) -> Episode:
    episode = reader.read(name)
    observations, actions = dict(episode.observations), episode.actions
    if relabel is not None:
        with _named("relabel"):
            relabelled, actions = relabel(observations, actions)
            observations = dict(relabelled)
    if transform is not None:
        with _named("transform"):
            observations = dict(transform(observations))
    if image_size is not None:
        observations = {
            key: resized(as_images(key, values), image_size) if is_image(values.shape[1:]) else values
            for key, values in observations.items()
        }
    return Episode(observations=observations, actions=actions)


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """Name the setting whose function, the user's code, fails."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"dataset.{setting} failed with {type(error).__name__}: {error}") from error


def resized(images: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """(N, H, W, C) uint8 images as (N, size, size, C), by Pillow's antialiased bilinear filter."""
    if images.shape[1:3] == (size, size):
        return images
    frames = [Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image) for image in images]
    smaller = [np.asarray(frame.resize((size, size), Image.Resampling.BILINEAR)) for frame in frames]
    return np.stack(smaller).reshape(len(images), size, size, images.shape[3])


def _code_of(setting: str, given: Callable[..., Any]) -> str:
    """A name for a function's file as it is now: edited code must not find what the old code left in the cache."""
    function = getattr(given, "func", given)  # inside a functools.partial
    settings = [getattr(given, "args", ()), sorted(getattr(given, "keywords", {}).items())]
    try:
        code = Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError) as error:
        raise ValueError(f"dataset.{setting} must be a function from a file; got {given!r}") from error
    return f"{function.__module__}.{function.__qualname__} {settings!r} {hashlib.sha256(code).hexdigest()}"
