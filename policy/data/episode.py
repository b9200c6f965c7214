"""What every format's reader gives: episodes one at a time, each checked before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policy.common.arguments import unknown_name
from policy.model.diffusion_policy import is_image

# Policy key: the file's key.
Keys = Mapping[str, str]
Transform = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
# An episode's observations and actions to those of a demonstration of what it achieved.
Relabel = Callable[[dict[str, NDArray[Any]], NDArray[Any]], tuple[Mapping[str, NDArray[Any]], NDArray[Any]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One demonstration of T transitions: what was seen, and what was then done.

    Attributes:
        observations: (T, *shape) under each policy key: images (T, H, W, C), everything else (T, D).
        actions: (T, action_dim).
    """

    observations: Mapping[str, NDArray[Any]]
    actions: NDArray[Any]


class EpisodeReader(Protocol):
    """One opened file or folder of demonstrations."""

    @property
    def names(self) -> Sequence[str]:
        """Of its episodes, as the file calls them, in its order; no name twice."""

    @property
    def held_out(self) -> Sequence[str]:
        """The names among them that the file sets aside for validation; empty where it sets none aside."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself, JSON data: `format`, and where known `env` and `rate_hz`."""

    def read(self, name: str) -> Episode:
        """One episode.

        Raises:
            ValueError: this episode is damaged; names the key where it is one key's fault.
        """
        ...

    def close(self) -> None:
        """Close its files."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked of a file.

    Attributes:
        observation_keys: the file's keys, or policy key to the file's key; None takes what the format marks as such.
        action_key: the file's key; None takes the format's own.
        subset: a subset of the episodes that the file itself names; None takes all.
    """

    observation_keys: Sequence[str] | Mapping[str, str] | None = None
    action_key: str | None = None
    subset: str | None = None

    def observations(self, available: Iterable[str], default: Iterable[str], prefix: str = "") -> dict[str, str]:
        """Which of the file's keys become which of the policy's.

        Args:
            available: the file's keys.
            default: those it marks as observations.
            prefix: what the format writes before each name and a policy does without, such as `observation.`; the
                user may leave it out too.

        Returns:
            Policy key to the file's key.

        Raises:
            ValueError: a key that is not there, none, or one name twice.
        """
        wanted = list(default) if self.observation_keys is None else self.observation_keys
        if not isinstance(wanted, Mapping):
            if len(set(wanted)) != len(wanted):
                raise ValueError(f"dataset.observation_keys must not repeat a key; got {list(wanted)}")
            pairs = [(key.removeprefix(prefix), key) for key in wanted]
        else:
            pairs = list(wanted.items())
        if not pairs:
            raise ValueError("there is no observation to train on: set dataset.observation_keys=[...]")
        options = list(available)
        chosen: dict[str, str] = {}
        for name, key in pairs:
            found = next((k for k in (key, prefix + key) if k in options), None)
            if found is None:
                raise unknown_name("observation key", key, options)
            if policy_key(name) in chosen:
                raise ValueError(
                    f"{found!r} and {chosen[policy_key(name)]!r} would both be called {policy_key(name)!r}: name them"
                    " with dataset.observation_keys={name: key, ...}"
                )
            chosen[policy_key(name)] = found
        return chosen

    def action(self, available: Iterable[str], default: str) -> str:
        """The file's key of the actions.

        Raises:
            ValueError: it is not there.
        """
        key = default if self.action_key is None else self.action_key
        options = list(available)
        if key not in options:
            raise unknown_name("action key", key, options)
        return key


def policy_key(key: str) -> str:
    """A name that a policy can use: modules of torch cannot have dots in their names.

    >>> policy_key("images.top")
    'images/top'
    """
    return key.replace(".", "/")


@dataclass(kw_only=True)
class EpisodeChecker:
    """Refuses episodes that would poison a training, and brings the others into one form.

    Every episode must have the keys, shapes and kinds of the first good one.

    Attributes:
        shapes: of one observation under each key and of one action (under `actions`), from the first good episode.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, episode: Episode) -> Episode:
        """The episode as float32 vectors and uint8 images.

        Raises:
            ValueError: saying which key is wrong, where, and how.
        """
        arrays = {key: np.asarray(values) for key, values in episode.observations.items()}
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
        converted = {
            key: as_images(key, values) if key != "actions" and is_image(values.shape[1:]) else _as_vectors(key, values)
            for key, values in arrays.items()
        }
        shapes = {key: values.shape[1:] for key, values in converted.items()}
        if self.shapes and shapes != self.shapes:
            key = next(k for k in (*shapes, *self.shapes) if shapes.get(k) != self.shapes.get(k))
            raise ValueError(f"{key!r} has shape {shapes.get(key)}, episodes before it have {self.shapes.get(key)}")
        self.shapes = shapes
        return Episode(actions=converted.pop("actions"), observations=converted)


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
    """(T, height, width, channels) pictures of any number type as uint8.

    Raises:
        ValueError: another number of channels, or pixels that are not whole numbers within 0..255.
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
