"""Read demonstrations of any format into one form, through the cache."""

from __future__ import annotations

import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.common.arguments import check_choice
from policy.common.machine import available_cores
from policy.common.modules import failures_named
from policy.common.observations import is_image
from policy.common.progress import progress
from policy.common.torchrun import first_on_machine_goes_ahead
from policy.data.budget import Budget, free_disk, free_memory
from policy.data.cache import bad_episode, default_cache_dir, open_cached, write_cached
from policy.data.demonstrations import Demonstrations
from policy.data.episode import Episode, EpisodeReader, Relabel, Request, Transform, as_images, warn_empty
from policy.data.files import fingerprint, list_files
from policy.data.formats import FORMATS
from policy.data.formats.format import Format
from policy.data.frames import Frames, resized
from policy.data.joining import check_alike, join

# Increase it when the meaning of cached data changes, so that older entries are not found any more.
CACHE_VERSION = 5
# Most processes that decode videos, unless the user asks for more.
MAX_WORKERS = 8
# The most that a user may ask for: thousands would take all memory of the machine before one of them decodes.
MOST_WORKERS = 64


def read_demonstrations(
    *,
    format: str,
    path: Path | list[Path],
    observation_keys: list[str] | dict[str, str] | None = None,
    action_key: str | None = None,
    subset: str | None = None,
    max_episodes: int | None = None,
    relabel: Relabel | None = None,
    transform: Transform | None = None,
    image_size: int | None = None,
    on_bad_episode: str = "error",
    on_action_outside: str = "error",
    decode: str | None = None,
    decode_workers: int | None = None,
    max_bytes: int | None = None,
    cache_dir: Path | None = None,
) -> Demonstrations:
    """Open demonstrations; the first time, they are converted into a cache that training maps into memory.

    Args:
        format: `minari`, `lerobot`, `robomimic`, `zarr` (the Diffusion Policy replay buffer) or a format of a plugin.
        path: the file or folder; for Minari also an id such as D4RL/door/human-v2, and for LeRobot a repository such as
            lerobot/pusht, which is looked up where the package keeps its datasets and otherwise downloaded. A list of
            them is read as one dataset, each with the settings below.
        observation_keys: keys of the file to observe, or policy key to the file's key; by default the keys that the
            format marks as observations.
        action_key: the file's key of the actions; by default the format's own.
        subset: a subset of the episodes that the file itself names (robomimic's filter keys, LeRobot's splits).
        max_episodes: read only the first good episodes of the file, up to this number, of each dataset.
        relabel: rewrites an episode, given as the file's observations by key and its actions, as a demonstration of
            what it achieved (hindsight relabelling), or as a list of demonstrations: its own, and those of what it
            achieved on the way, which are trained on if their episode is, and never held out.
        transform: maps an episode's observations in the file, (T, ...) by key, to observations of the environment.
        image_size: height and width to which images are resized; by default they keep their size.
        on_bad_episode: `error` refuses a dataset with a bad episode, `skip` leaves bad ones out with a warning.
        on_action_outside: `error` refuses actions beyond the action space that the dataset states (Minari does), `clip`
            clips them, as the simulator did.
        decode: `cache` decodes the frames of videos to arrays in the cache, `stream` leaves them in the videos and
            decodes them while training, in another order of the windows; by default, frames of more than 16 GiB stay
            in their videos, unless a relabel or transform function needs them.
        decode_workers: processes that decode ahead of a training, 0 for none; by default one for each core, up to 8.
        max_bytes: largest number of bytes that reading may need, in memory for the longest episode and on disk for the
            cache; by default half of what is free there.
        cache_dir: folder of the converted demonstrations; by default the user's cache folder.

    Returns:
        The demonstrations, mapped from disk.

    Raises:
        ValueError: the dataset is missing or damaged, or lacks a requested part; the message names file, episode and
            key. Several datasets have different keys, shapes or control rates; the message names two of them.
    """
    if format not in FORMATS:
        raise FORMATS.unknown(format)
    check_choice("dataset.on_bad_episode", on_bad_episode, ("error", "skip"))
    check_choice("dataset.on_action_outside", on_action_outside, ("error", "clip"))
    functions = [name for name, given in (("relabel", relabel), ("transform", transform)) if given]
    chosen = _check_decode(decode, format, functions)
    for name, value in (("max_episodes", max_episodes), ("image_size", image_size), ("max_bytes", max_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"dataset.{name} must be 1 or more; got {value}")
    if decode_workers is not None and not 0 <= decode_workers <= MOST_WORKERS:
        raise ValueError(f"dataset.decode_workers must be within 0..{MOST_WORKERS}; got {decode_workers}")
    cache, skip_bad = (cache_dir or default_cache_dir()).expanduser(), on_bad_episode == "skip"
    found: list[Demonstrations] = []
    for place in _found(format, [path] if isinstance(path, str | Path) else path):
        budget = _budget(cache, max_bytes, max_episodes, image_size, transform)
        request = Request(observation_keys, action_key, subset, on_action_outside, chosen, budget)
        reading = _Reading(format, place, request, relabel, transform, skip_bad, decode)
        newest = reading.read(cache)
        reading.check(newest)
        for earlier in found:
            check_alike(earlier, newest)
        found.append(newest)
    return replace(
        join(found),
        read_with={
            "observation_keys": observation_keys,
            "action_key": action_key,
            "subset": subset,
            "relabel": relabel and _name_of(relabel),
            "transform": transform and _name_of(transform),
        },
        decode_workers=_usual_workers() if decode_workers is None else decode_workers,
    )


def _found(format: str, paths: Sequence[Path]) -> list[Path]:
    """Find the files or folders of datasets.

    Raises:
        ValueError: there is none, or one is named twice.
    """
    if not paths:
        raise ValueError("dataset.path=[] names no dataset: give one path or more")
    places: dict[str, Path] = {}
    for path in paths:
        place = FORMATS[format].find(Path(path))
        if (file := os.path.realpath(place)) in places:
            raise ValueError(f"dataset.path names {place} twice: its episodes would count double; leave one out")
        places[file] = place
    for place in [*places.values()][1:]:
        list_files(place)  # before the first one is converted
    return [*places.values()]


def _format_hint(format: str, files: Collection[str]) -> str:
    asked = FORMATS[format]
    if asked.looks is None or asked.looks(files):
        return ""
    others = [name for name, other in FORMATS.items() if other.looks and other.looks(files)]
    return f"; its files look like those of dataset={others[0]}" if others else ""


def _check_decode(decode: str | None, format: str, functions: Sequence[str]) -> str | None:
    """Check `dataset.decode`, and return it, or `cache` where functions need whole episodes and it is left open.

    Raises:
        ValueError: frames cannot stay in their videos; the message says what to do.
    """
    if decode is None:
        return "cache" if functions else None
    check_choice("dataset.decode", decode, ("cache", "stream"))
    if decode == "stream" and not FORMATS[format].has_videos:
        raise ValueError(
            f"dataset.decode=stream is for videos, and datasets of the format {format} have none: leave it out"
        )
    if decode == "stream" and functions:
        raise ValueError(
            f"dataset.decode=stream decodes single frames, and dataset.{functions[0]} needs whole episodes: use"
            f" dataset.decode=cache, or leave dataset.{functions[0]} out"
        )
    return decode


def _usual_workers() -> int:
    return min(available_cores(), MAX_WORKERS)


def _budget(
    cache: Path, max_bytes: int | None, max_episodes: int | None, image_size: int | None, transform: Transform | None
) -> Budget:
    """The budget that the user set, or half of what is free."""
    return Budget(
        memory=free_memory() // 2 if max_bytes is None else max_bytes,
        disk=free_disk(cache) // 2 if max_bytes is None else max_bytes,
        max_episodes=max_episodes,
        image_size=image_size,
        is_transformed=transform is not None,
    )


@dataclass(frozen=True)
class _Reading:
    """The checked arguments of `read_demonstrations`, with the dataset's own path."""

    format: str
    path: Path
    request: Request
    relabel: Relabel | None
    transform: Transform | None
    skip_bad: bool
    decode: str | None

    @first_on_machine_goes_ahead()
    def read(self, cache: Path) -> Demonstrations:
        """Open the dataset's entry in the cache; convert the dataset first if there is no such entry."""
        files = list_files(self.path)
        entry = cache / f"{self.path.name}-{fingerprint(files, self._settings())}"
        found = open_cached(entry, str(self.path), files)
        if found is None:
            # On an error the episodes are closed too, so that their progress bar ends before the message.
            with closing(self._open(files)) as reader, closing(self._episodes(reader)) as episodes:
                write_cached(
                    entry,
                    episodes,
                    source=str(self.path),
                    files=files,
                    metadata=reader.metadata,
                    held_out=reader.held_out,
                    skip_bad=self.skip_bad,
                    budget=self.request.budget,
                )
            found = open_cached(entry, str(self.path), files)
        if found is None:
            raise ValueError(f"the cache folder {cache} keeps nothing: set dataset.cache_dir to another one")
        return found

    def check(self, found: Demonstrations) -> None:
        """Check the number of episodes, and warn of those that were left out as bad.

        Raises:
            ValueError: there are fewer episodes than requested, or an earlier conversion skipped bad episodes that
                this one has to refuse.
        """
        count, wanted = found.num_originals, self.request.budget.max_episodes
        if wanted is not None and count < wanted:
            raise ValueError(f"{self.path} has {count} episodes; dataset.max_episodes asks for {wanted}")
        if not found.skipped:
            return
        name, reason = next(iter(found.skipped.items()))
        if not self.skip_bad:
            raise bad_episode(str(self.path), name, reason)
        total = len(found.skipped) + count
        warnings.warn(
            f"{self.path}: {len(found.skipped)} of {total} episodes are bad and left out; the first one is {name}:"
            f" {reason}",
            stacklevel=3,
        )

    def _settings(self) -> dict[str, Any]:
        """The settings on which the converted demonstrations depend, as JSON data."""
        return {
            "version": CACHE_VERSION,
            "format": self.format,
            "observation_keys": self.request.observation_keys,
            "action_key": self.request.action_key,
            "subset": self.request.subset,
            "on_action_outside": self.request.on_action_outside,
            "max_episodes": self.request.budget.max_episodes,
            "relabel": self.relabel and _code_of("relabel", self.relabel),
            "transform": self.transform and _code_of("transform", self.transform),
            "image_size": self.request.budget.image_size,
            "path": str(self.path.resolve()),
            **({"decode": self.decode} if self.decode else {}),
            **({"reader": reader} if (reader := _code_of_own(FORMATS[self.format])) else {}),
        }

    def _open(self, files: dict[str, Path]) -> EpisodeReader:
        try:
            return FORMATS[self.format].open(self.path, files, self.request)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}{_format_hint(self.format, files)}") from error

    def _episodes(self, reader: EpisodeReader) -> Generator[tuple[str, Callable[[], list[Episode]]], None, None]:
        """The name of each episode, and a function that reads the demonstrations that are made of it."""
        total = min(len(reader.names), self.request.budget.max_episodes or len(reader.names))
        left_out: set[str] = set()
        with progress(reader.names, total=total, desc="read", unit="episode") as names:
            for name in names:
                yield name, partial(self._prepared, reader, name, left_out)

    def _prepared(self, reader: EpisodeReader, name: str, left_out: set[str]) -> list[Episode]:
        """An episode as it is trained on: without empty observations, relabelled, transformed and resized."""
        episode = reader.read(name)
        observations, actions = dict[str, Any](episode.observations), episode.actions
        if self.request.observation_keys is None:
            empty = {key for key, values in observations.items() if 0 in getattr(values, "shape", ())[1:]}
            if empty < observations.keys():  # if all are empty, the check of the episode refuses it
                observations = {key: values for key, values in observations.items() if key not in empty}
                if new := sorted(empty - left_out):
                    warn_empty(self.path, new)
                    left_out |= empty
        if self.relabel is None:
            return [self._as_observed(observations, actions)]
        with failures_named("dataset.relabel"):
            made = self.relabel(observations, actions)
            demonstrations = made if isinstance(made, list) else [made]
            if not demonstrations:
                raise ValueError("it must return one demonstration or more")
            pairs = [(dict(relabelled), actions) for relabelled, actions in demonstrations]
        return [self._as_observed(*pair) for pair in pairs]

    def _as_observed(self, observations: dict[str, Any], actions: NDArray[Any]) -> Episode:
        """A demonstration with its observations transformed and resized."""
        if self.transform is not None:
            with failures_named("dataset.transform"):
                observations = _by_key(self.transform(observations))
        if (size := self.request.budget.image_size) is not None:
            arrays = {key: one if isinstance(one, Frames) else np.asarray(one) for key, one in observations.items()}
            observations = {
                key: _resized(key, values, size) if is_image(values.shape[1:]) else values
                for key, values in arrays.items()
            }
        return Episode(observations=observations, actions=actions)


def _resized(key: str, values: Any, size: int) -> Any:
    return values.resized(size) if isinstance(values, Frames) else resized(as_images(key, values), size)


def _by_key(returned: Any) -> dict[str, Any]:
    """Check that a transform returned arrays by key.

    Raises:
        TypeError: it returned something else.
    """
    if not (isinstance(returned, Mapping) and all(isinstance(key, str) for key in returned)):
        shown = f"keys {list(returned)}" if isinstance(returned, Mapping) else repr(returned)
        raise TypeError(f"it must return a dict of arrays whose keys are text; it returned {shown:.80}")
    return dict(returned)


def _code_of_own(format: Format) -> str | None:
    """Identify the code of a user's own format; `CACHE_VERSION` identifies that of the built-in ones."""
    module = getattr(inspect.getmodule(getattr(format.open, "func", format.open)), "__name__", "")
    if module.startswith("policy.data.formats."):
        return None
    with suppress(ValueError):  # code that was typed in has no file
        return _code_of("format", format.open)
    return None


def _code_of(setting: str, given: Callable[..., Any]) -> str:
    """Identify a function by its name, its arguments and the content of its file.

    The cache must not return data that an older version of the code converted. A module may name its code by a
    `CACHE_REVISION` instead, so that a change of its comments leaves the cache as it is.
    """
    function = getattr(given, "func", given)  # inside a functools.partial
    try:
        code = Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError) as error:
        raise ValueError(f"dataset.{setting} must be a function from a file; got {given!r}") from error
    revision = getattr(inspect.getmodule(function), "CACHE_REVISION", None) or hashlib.sha256(code).hexdigest()
    return f"{_name_of(given)} {revision}"


def _name_of(given: Callable[..., Any]) -> str:
    """The name of a function and the arguments that it is given besides an episode."""
    function = getattr(given, "func", given)
    settings = [getattr(given, "args", ()), sorted(getattr(given, "keywords", {}).items())]
    return f"{function.__module__}.{function.__qualname__} {settings!r}"
