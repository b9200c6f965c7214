"""Episodes as every format's reader returns them, the user's request, and the check of each episode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policy.common.arguments import check_choice, unknown_name
from policy.common.observations import is_image
from policy.data.budget import Budget
from policy.data.frames import Frames

# A function of an episode's observations in the file, to observations of the environment.
Transform = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
# The observations by key and the actions of one demonstration.
Relabelled = tuple[Mapping[str, NDArray[Any]], NDArray[Any]]
# A function of an episode's observations and actions, to those of a demonstration of what the episode achieved; or to a
# list of them, the first of which is the episode's own, and the others of what it achieved on the way.
Relabel = Callable[[dict[str, NDArray[Any]], NDArray[Any]], Relabelled | list[Relabelled]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One demonstration of T transitions, each an observation and the action taken on it.

    Attributes:
        observations: (T, *shape) under each policy key: images (T, H, W, C), everything else (T, D). Images may be
            `Frames`, which stay in their videos.
        actions: (T, action_dim).
    """

    observations: Mapping[str, NDArray[Any] | Frames]
    actions: NDArray[Any]


class EpisodeReader(Protocol):
    """One opened file or folder of demonstrations."""

    @property
    def names(self) -> Sequence[str]:
        """The file's own names of its episodes, in the file's order, without repetition."""

    @property
    def held_out(self) -> Sequence[str]:
        """The names of the episodes that the file sets aside for validation; empty if there are none."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's description of itself as JSON data: `format`, and where known `env` and `rate_hz`."""

    def read(self, name: str) -> Episode:
        """Read one episode.

        Raises:
            ValueError: this episode is damaged; the message names the key if a single key is at fault.
        """
        ...

    def close(self) -> None:
        """Close the files."""
        ...


@dataclass(frozen=True)
class Request:
    """The part of a file that the user asked for.

    Attributes:
        observation_keys: the file's keys, or policy key to the file's key; None selects the keys that the format marks
            as observations.
        action_key: the file's key of the actions; None selects the format's own.
        subset: a subset of the episodes that the file itself names; None selects all of them.
        on_action_outside: `error` refuses an episode with an action beyond the action space that the file states,
            `clip` clips its actions.
        decode: `cache` decodes the frames of videos, `stream` returns them as `Frames`, None chooses by their size.
        budget: the memory and disk that reading may take.
    """

    observation_keys: Sequence[str] | Mapping[str, str] | None = None
    action_key: str | None = None
    subset: str | None = None
    on_action_outside: str = "error"
    decode: str | None = None
    budget: Budget = field(default_factory=Budget)

    def observations(self, available: Iterable[str], default: Iterable[str], prefix: str = "") -> dict[str, str]:
        """Choose the file's keys to observe, and name them for the policy.

        Args:
            available: the file's keys.
            default: the keys that the file marks as observations.
            prefix: a prefix that the format writes before each name, such as `observation.`. The policy's names, see
                `policy_key`, do not have it, and the user may leave it out, or give the policy's name.

        Returns:
            Policy key to the file's key.

        Raises:
            ValueError: a key is not in the file, no key is chosen, or two keys get the same name.
        """
        wanted = list(default) if self.observation_keys is None else self.observation_keys
        if not isinstance(wanted, Mapping):
            if len(set(wanted)) != len(wanted):
                raise ValueError(f"dataset.observation_keys must not repeat a key; got {list(wanted)}")
            pairs = [(policy_key(key.removeprefix(prefix)), key) for key in wanted]
        else:
            pairs = list(wanted.items())
        if not pairs:
            raise ValueError("there is no observation to train on: set dataset.observation_keys=[...]")
        options = list(available)
        of_policy = {policy_key(key.removeprefix(prefix)): key for key in options}
        chosen: dict[str, str] = {}
        for name, key in pairs:
            found = next((k for k in (key, prefix + key, of_policy.get(key)) if k in options), None)
            if found is None and self.observation_keys is None:
                others = sorted({*options} - {self.action_key or "action"})
                raise ValueError(
                    f"there is no {key!r}: choose what to observe, dataset.observation_keys=[...]; there are"
                    f" {', '.join(others) or 'no other arrays'}"
                )
            if found is None:
                raise unknown_name("observation key", key, options)
            if name in chosen:
                raise ValueError(
                    f"{found!r} and {chosen[name]!r} would both be called {name!r}: name them with"
                    " dataset.observation_keys={name: key, ...}"
                )
            chosen[name] = found
        return chosen

    def action(self, available: Iterable[str], default: str) -> str:
        """Choose the file's key of the actions.

        Args:
            available: the file's keys.
            default: the format's own key.

        Returns:
            The key.

        Raises:
            ValueError: the key is not in the file.
        """
        key = default if self.action_key is None else self.action_key
        options = list(available)
        if key not in options and self.action_key is None:
            raise ValueError(
                f"there is no {key!r}: say which array holds the actions, dataset.action_key=NAME; there are"
                f" {', '.join(sorted(options)) or 'no arrays'}"
            )
        check_choice("action key", key, options)
        return key


def warn_empty(source: object, keys: Sequence[str]) -> None:
    """Warn that observations without any numbers are left out.

    Args:
        source: the dataset.
        keys: the observations' keys.
    """
    names = ", ".join(map(repr, keys))
    warnings.warn(f"{source}: {names} has the shape (0,), so there is nothing to observe: left out", stacklevel=3)


def policy_key(key: str) -> str:
    """How a policy calls an observation that the user does not name: slashes take the place of dots in the file's key.

    LeRobot's files separate words by dots, and `env=gym` separates a space's keys by slashes.

    >>> policy_key("images.top")
    'images/top'
    """
    return key.replace(".", "/")


@dataclass(kw_only=True)
class EpisodeChecker:
    """Refuses episodes that would spoil a training, and converts the others into one form.

    Every episode must have the keys and shapes of the first good one.

    Attributes:
        shapes: shape of one observation under each key and of one action (under `actions`) in the first good episode.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, episode: Episode) -> Episode:
        """Convert an episode to float32 vectors and uint8 images.

        Raises:
            ValueError: the episode is bad; the message names the key, the transition and the problem.
        """
        arrays: dict[str, Any] = {
            key: values if isinstance(values, Frames) else np.asarray(values)
            for key, values in episode.observations.items()
        }
        if "actions" in arrays:
            raise ValueError("an observation cannot be called 'actions': rename it with dataset.observation_keys={...}")
        arrays["actions"] = np.asarray(episode.actions)
        for key, values in arrays.items():
            if values.ndim == 0 or values.dtype.kind not in "biuf":
                raise ValueError(f"{key!r} must hold numbers; it holds {values.dtype} of shape {values.shape}")
        lengths = {key: len(values) for key, values in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"lengths disagree: {', '.join(f'{k!r} has {n}' for k, n in lengths.items())}")
        if lengths["actions"] == 0:
            raise ValueError("it has no transitions")
        if empty := [key for key, values in arrays.items() if values.size == 0]:
            raise ValueError(f"{empty[0]!r} is empty: one of its rows has shape {arrays[empty[0]].shape[1:]}")
        converted = {key: _as_trained_on(key, values) for key, values in arrays.items()}
        shapes = {key: values.shape[1:] for key, values in converted.items()}
        if self.shapes and shapes != self.shapes:
            key = next(k for k in (*shapes, *self.shapes) if shapes.get(k) != self.shapes.get(k))
            raise ValueError(f"{key!r} has shape {shapes.get(key)}, episodes before it have {self.shapes.get(key)}")
        self.shapes = shapes
        return Episode(actions=converted.pop("actions"), observations=converted)


def _as_trained_on(key: str, values: NDArray[Any]) -> NDArray[Any]:
    if isinstance(values, Frames):
        return values
    return as_images(key, values) if key != "actions" and is_image(values.shape[1:]) else _as_vectors(key, values)


def _as_vectors(key: str, values: NDArray[Any]) -> NDArray[np.float32]:
    flat = values.reshape(len(values), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = flat.astype(np.float32, copy=False)
    if not np.isfinite(vectors).all():
        transition = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        _refuse_non_finite(key, flat, transition)
        raise ValueError(f"{key!r} holds a value too large for float32 at transition {transition}")
    return vectors


def as_images(key: str, values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert (T, height, width, channels) pictures of any number type to uint8.

    Raises:
        ValueError: the number of channels is not 1, 3 or 4, or a pixel is not a whole number within 0..255.
    """
    if values.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{key!r} has shape {values.shape[1:]}; pictures must be (height, width, channels) with 1, 3 or 4 channels"
        )
    with np.errstate(invalid="ignore"):
        pixels = values.astype(np.uint8, copy=False)
    if values.dtype != np.uint8 and not np.array_equal(pixels, values):
        transition = int(np.argmax((pixels != values).any(axis=(1, 2, 3))))
        _refuse_non_finite(key, values, transition)
        picture = values[transition]
        raise ValueError(
            f"{key!r} holds pictures of {values.dtype} within {picture.min():g} to {picture.max():g} at transition"
            f" {transition}; pixels must be whole numbers within 0..255: bring them there with dataset.transform=..."
        )
    return pixels


def _refuse_non_finite(key: str, values: NDArray[Any], transition: int) -> None:
    if not np.isfinite(values[transition]).all():
        raise ValueError(f"{key!r} holds a NaN or infinity at transition {transition}")
