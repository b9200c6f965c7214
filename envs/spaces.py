"""What a policy sees and does, whatever a simulator's spaces look like.

An observation is one array, or a dict of arrays by key. An array is a float32 vector or a (height, width, channels)
uint8 image. An action is a float32 vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import Space, spaces
from gymnasium.spaces.utils import flatten, flatten_space
from numpy.typing import NDArray

from envs.errors import check_action, choose

IMAGE_CHANNELS = (1, 3, 4)

Observation = NDArray[Any] | dict[str, NDArray[Any]]


class PlainObservations(NamedTuple):
    """A simulator's observations in the form that a policy takes.

    Attributes:
        space: A Box (float32 vector or uint8 image), or a Dict of such.
        convert: Maps what the simulator returns into ``space``, as arrays of its own. Raises ValueError where the
            simulator returns something else than its space declares.
    """

    space: spaces.Box | spaces.Dict
    convert: Callable[[Any], Observation]


class PlainActions(NamedTuple):
    """A simulator's actions as flat vectors.

    Attributes:
        space: Box of shape (A,), float32, infinite where the simulator sets no bound.
        convert: Maps finite numbers (A,) to the shape and dtype that the simulator declares.
    """

    space: spaces.Box
    convert: Callable[[Any], NDArray[Any]]


class _Leaf(NamedTuple):
    """One array of an observation: the way to it through Dicts and Tuples, and how it is converted."""

    path: tuple[Any, ...]
    space: spaces.Box
    convert: Callable[[Any], NDArray[Any]]


def plain_observations(
    space: Space[Any], keys: Sequence[str] | None = None, image_size: int | None = None
) -> PlainObservations:
    """Bring any space of arrays into the form that policies take.

    A uint8 Box of rank 3 is an image and stays as it is. Any other Box becomes a float32 vector; Discrete,
    MultiDiscrete and MultiBinary become zeros and ones, as `gymnasium.spaces.utils.flatten` makes them. A Dict stays a
    dict; the keys of nested Dicts, and the indices of Tuples, are joined by "/", and a "." in a key becomes "/" too.

    Args:
        space: What the simulator declares.
        keys: Those of a Dict's keys to keep, by default all; the key of a nested Dict stands for everything in it.
        image_size: Height and width to which images are resized, by default none are.

    Raises:
        ValueError: If a part of the space has no such form, or a key does not exist.
    """
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        if keys is not None:
            raise ValueError(f"observation_keys={keys!r} needs a Dict to choose from, not {_described(space)}.")
        leaf = _resized(_leaf("", (), space), image_size)
        return PlainObservations(leaf.space, leaf.convert)
    parts = list(_parts(space, (), ()))
    names = [key for key, _, _ in parts]
    if repeated := sorted({key for key in names if names.count(key) > 1}):
        raise ValueError(f"Two parts of the observation are called {repeated[0]!r} here; rename one of them.")
    kept = names if keys is None else _chosen(names, keys)
    if not kept:
        raise ValueError(f"Nothing of the observation {_described(space)} is kept; choose one key or more.")
    leaves = {key: _resized(_leaf(key, path, part), image_size) for key, path, part in parts if key in kept}

    def convert(observation: Any) -> dict[str, NDArray[Any]]:
        return {key: leaf.convert(_at(observation, key, leaf.path)) for key, leaf in leaves.items()}

    return PlainObservations(spaces.Dict({key: leaf.space for key, leaf in leaves.items()}), convert)


def plain_actions(space: Space[Any]) -> PlainActions:
    """Bring a Box of any shape, bounds and dtype into the form of a flat float32 vector.

    On its way to the simulator an action is clipped to the declared bounds (which float32 may miss by a rounding
    error), and rounded where the dtype is not a floating one.

    Args:
        space: What the simulator declares.

    Raises:
        ValueError: If the space is not a Box.
    """
    if not isinstance(space, spaces.Box):
        raise ValueError(
            f"The action space is {_described(space)}, but a diffusion policy denoises continuous actions: it needs "
            "a Box."
        )
    size, shape, dtype = int(np.prod(space.shape)), space.shape, np.dtype(space.dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)

    def convert(action: NDArray[np.float32]) -> NDArray[Any]:
        check_action(action, size)
        shaped = np.asarray(action, dtype=np.float64).reshape(shape)
        if not np.issubdtype(dtype, np.floating):
            shaped = np.rint(shaped)
        return np.asarray(np.clip(shaped, low, high)).astype(dtype)

    return PlainActions(_float_box(space), convert)


def _parts(
    space: Space[Any], names: tuple[str, ...], path: tuple[Any, ...]
) -> Iterator[tuple[str, tuple[Any, ...], Space[Any]]]:
    """Yield the key, the path and the space of everything that is not a Dict or a Tuple itself."""
    children: list[tuple[Any, Space[Any]]]
    if isinstance(space, spaces.Dict):
        children = list(space.spaces.items())
    elif isinstance(space, spaces.Tuple):
        children = list(enumerate(space.spaces))
    else:
        yield "/".join(names), path, space
        return
    for name, child in children:
        yield from _parts(child, (*names, str(name).replace(".", "/")), (*path, name))


def _leaf(key: str, path: tuple[Any, ...], space: Space[Any]) -> _Leaf:
    """Decide what becomes of one array.

    Raises:
        ValueError: If it is neither a vector nor an image.
    """
    if isinstance(space, spaces.Box):
        if space.dtype != np.uint8 or len(space.shape) != 3:
            return _Leaf(path, _float_box(space), lambda value: _vector(key, space, value))
        if space.shape[-1] in IMAGE_CHANNELS:
            return _Leaf(path, space, lambda value: _image(key, space, value))
        raise ValueError(
            f"The {_named(key)} is a uint8 Box of shape {space.shape}, but an image is (height, width, channels) with "
            "1, 3 or 4 channels last: transpose it, by the simulator's own options or in a wrapper "
            "(gymnasium.wrappers.TransformObservation)."
        )
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        flat = flatten_space(space)
        assert isinstance(flat, spaces.Box)
        return _Leaf(path, _float_box(flat), lambda value: _one_hot(key, space, value))
    raise ValueError(
        f"The {_named(key)} is {_described(space)}, which is no array of a fixed size; allowed are Box, Discrete, "
        "MultiDiscrete, MultiBinary, and Dicts and Tuples of them: leave it out with observation_keys, or wrap the "
        "environment."
    )


def _resized(leaf: _Leaf, size: int | None) -> _Leaf:
    """Let an image come in another size; whatever else it is stays as it is."""
    if size is None or leaf.space.dtype != np.uint8:
        return leaf
    from PIL import Image  # only those who resize pay for it

    shape = (size, size, leaf.space.shape[2])

    def convert(value: Any) -> NDArray[np.uint8]:
        image = Image.fromarray(leaf.convert(value).squeeze(axis=2) if shape[2] == 1 else leaf.convert(value))
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).reshape(shape)

    return _Leaf(leaf.path, spaces.Box(0, 255, shape, np.uint8), convert)


def _float_box(space: spaces.Box) -> spaces.Box:
    """Flatten a Box to float32; an integer Box declares no bound by its dtype's own limits."""
    # What float32 cannot hold is as good as no bound.
    with np.errstate(over="ignore"):
        low = np.where(space.bounded_below, space.low, -np.inf).astype(np.float32).flatten()
        high = np.where(space.bounded_above, space.high, np.inf).astype(np.float32).flatten()
    return spaces.Box(low, high, dtype=np.float32)


def _vector(key: str, space: spaces.Box, value: Any) -> NDArray[np.float32]:
    if np.shape(value) != space.shape:
        raise _misdeclared(key, space, value)
    return np.array(value, dtype=np.float32).reshape(-1)


def _image(key: str, space: spaces.Box, value: Any) -> NDArray[np.uint8]:
    # A float image in [0, 1] would turn black without a word.
    if np.shape(value) != space.shape or np.asarray(value).dtype != np.uint8:
        raise _misdeclared(key, space, value)
    return np.array(value)


def _one_hot(
    key: str, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary, value: Any
) -> NDArray[np.float32]:
    # Gymnasium's flatten takes a choice out of range for one counted from the end.
    if not space.contains(value):
        raise _misdeclared(key, space, value)
    return np.asarray(flatten(space, value), dtype=np.float32)


def _at(observation: Any, key: str, path: tuple[Any, ...]) -> Any:
    """Follow a path into an observation.

    Raises:
        ValueError: If the simulator returned an observation without it.
    """
    for name in path:
        try:
            observation = observation[name]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"The simulator returned no {_named(key)}, which its space declares: correct its observation_space, or "
                "leave the key out with observation_keys."
            ) from error
    return observation


def _chosen(names: list[str], keys: Sequence[str]) -> list[str]:
    """Keep those names that are asked for, or that lie inside of what is asked for, in the space's order.

    Raises:
        ValueError: If a key names nothing.
    """
    groups = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    # From a command line one key comes as a plain word.
    wanted = [key.replace(".", "/") for key in ([keys] if isinstance(keys, str) else keys)]
    for key in wanted:
        choose("observation key", key, {*names, *groups})
    return [name for name in names if any(name == key or name.startswith(f"{key}/") for key in wanted)]


def _misdeclared(key: str, space: Space[Any], value: Any) -> ValueError:
    array = np.asarray(value)
    held = f"{array.item()!r}" if array.ndim == 0 else f"shape {array.shape}"
    return ValueError(
        f"The simulator's {_named(key)} is declared as {_described(space)}, but it returned {held} ({array.dtype}): "
        "correct its observation_space, or leave the key out with observation_keys."
    )


def _described(space: Space[Any]) -> str:
    """Write a space on one line; the bounds of a Box may take several."""
    return " ".join(str(space).split())


def _named(key: str) -> str:
    return f"observation {key!r}" if key else "observation"
