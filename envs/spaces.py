"""Conversion of a simulator's spaces into the plain ones that policies take.

A plain observation is one array, or a dict of arrays by key. An array is a float32 vector or a (height, width,
channels) uint8 image. A plain action is a float32 vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from gymnasium import Space, spaces
from gymnasium.spaces.utils import flatten, flatten_space
from numpy.typing import ArrayLike, NDArray

from envs.errors import DeviationError, choose

IMAGE_CHANNELS = (1, 3, 4)

Observation = NDArray[Any] | dict[str, NDArray[Any]]


class PlainObservations(NamedTuple):
    """A simulator's observations in the form that a policy takes.

    Attributes:
        space: A Box (float32 vector or uint8 image), or a Dict of such Boxes.
        convert: Maps an observation of the simulator into ``space``, as new arrays. It raises ValueError if the
            observation does not fit the simulator's declared space.
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
    """One array of an observation: its path through Dicts and Tuples, its plain space and its conversion."""

    path: tuple[Any, ...]
    space: spaces.Box
    convert: Callable[[Any], NDArray[Any]]


def plain_observations(
    space: Space[Any], keys: Sequence[str] | None = None, image_size: int | None = None
) -> PlainObservations:
    """Convert any space of arrays into the form that policies take.

    A uint8 Box of rank 3 is an image and stays as it is. Any other Box becomes a float32 vector; Discrete,
    MultiDiscrete and MultiBinary become zeros and ones, as `gymnasium.spaces.utils.flatten` encodes them. A Dict stays
    a dict; the keys of nested Dicts, and the indices of Tuples, are joined by "/", and a "." in a key becomes "/" too.

    Args:
        space: The space that the simulator declares.
        keys: Keys of a Dict to keep, by default all; the key of a nested Dict selects everything in it.
        image_size: Height and width to which images are resized; by default they keep their size.

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
    """Convert a Box of any shape, bounds and dtype into one of flat float32 vectors.

    Before the simulator gets an action, it is clipped to the declared bounds (which float32 may miss by a rounding
    error), and rounded if the dtype is not a floating one.

    Args:
        space: The space that the simulator declares.

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


def check_action(action: ArrayLike, size: int) -> None:
    """Refuse an action that a physics engine would accept and turn into nonsense.

    Raises:
        ValueError: If ``action`` is not ``size`` finite numbers.
    """
    if isinstance(action, np.ndarray) and action.shape == (size,) and isfinite(action.dot(action)):
        return  # the common case in the fewest operations: this is done at every control step
    if np.shape(action) != (size,) or not np.isfinite(action).all():
        raise ValueError(f"An action is {size} finite numbers, shape ({size},); got {action!r}.")


def _parts(
    space: Space[Any], names: tuple[str, ...], path: tuple[Any, ...]
) -> Iterator[tuple[str, tuple[Any, ...], Space[Any]]]:
    """Yield the key, the path and the space of every part that is not itself a Dict or a Tuple."""
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
    """Decide how one array is converted.

    Raises:
        ValueError: If it can become neither a vector nor an image.
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
        f"The {_named(key)} is {_described(space)}, which is not an array of a fixed size; allowed are Box, Discrete, "
        "MultiDiscrete, MultiBinary, and Dicts and Tuples of them: leave it out with observation_keys, or wrap the "
        "environment."
    )


def _resized(leaf: _Leaf, size: int | None) -> _Leaf:
    """Resize an image; any other array stays as it is."""
    if size is None or leaf.space.dtype != np.uint8:
        return leaf
    shape = (size, size, leaf.space.shape[2])
    return _Leaf(leaf.path, spaces.Box(0, 255, shape, np.uint8), lambda value: _smaller(leaf.convert(value), size))


def _smaller(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize an (H, W, C) image to (size, size, C), as `dataset.image_size` does."""
    from PIL import Image

    channels = image.shape[2]
    if channels == 4:  # Pillow would weight the first three by the fourth, as if it were transparency
        return np.concatenate([_smaller(image[..., :3], size), _smaller(image[..., 3:], size)], axis=2)
    whole = Image.fromarray(image.squeeze(axis=2) if channels == 1 else image)
    return np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, channels)


def _float_box(space: spaces.Box) -> spaces.Box:
    """Flatten a Box to float32; the limits of an integer dtype do not count as bounds."""
    # A bound beyond the range of float32 becomes infinite, which has the same effect.
    with np.errstate(over="ignore"):
        low = np.where(space.bounded_below, space.low, -np.inf).astype(np.float32).flatten()
        high = np.where(space.bounded_above, space.high, np.inf).astype(np.float32).flatten()
    return spaces.Box(low, high, dtype=np.float32)


def _vector(key: str, space: spaces.Box, value: Any) -> NDArray[np.float32]:
    array = np.asarray(value)
    if array.shape != space.shape or array.dtype.kind not in "biuf":
        raise _misdeclared(key, space, value)
    return array.astype(np.float32).reshape(-1)


def _image(key: str, space: spaces.Box, value: Any) -> NDArray[np.uint8]:
    # A conversion to uint8 would turn a float image in [0, 1] black without a message.
    if np.shape(value) != space.shape or np.asarray(value).dtype != np.uint8:
        raise _misdeclared(key, space, value)
    return np.array(value)


def _one_hot(
    key: str, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary, value: Any
) -> NDArray[np.float32]:
    # Gymnasium's flatten would count a negative choice from the end.
    if not space.contains(value):
        raise _misdeclared(key, space, value)
    return np.asarray(flatten(space, value), dtype=np.float32)


def _at(observation: Any, key: str, path: tuple[Any, ...]) -> Any:
    """Follow a path into an observation.

    Raises:
        ValueError: If the observation has no such part.
    """
    for name in path:
        try:
            observation = observation[name]
        except (KeyError, IndexError, TypeError) as error:
            raise DeviationError(
                f"The simulator returned no {_named(key)}, which its space declares: correct its observation_space, or "
                "leave the key out with observation_keys."
            ) from error
    return observation


def _chosen(names: list[str], keys: Sequence[str]) -> list[str]:
    """Select the names that equal one of the keys or lie inside one of them, in the space's order.

    Raises:
        ValueError: If a key does not exist.
    """
    groups = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    # On a command line a single key may be given without a list.
    wanted = [key.replace(".", "/") for key in ([keys] if isinstance(keys, str) else keys)]
    for key in wanted:
        choose("observation key", key, {*names, *groups})
    return [name for name in names if any(name == key or name.startswith(f"{key}/") for key in wanted)]


def _misdeclared(key: str, space: Space[Any], value: Any) -> DeviationError:
    array = np.asarray(value)
    held = f"{array.item()!r}" if array.ndim == 0 else f"shape {array.shape}"
    return DeviationError(
        f"The simulator's {_named(key)} is declared as {_described(space)}, but it returned {held} ({array.dtype}): "
        "correct its observation_space, or leave the key out with observation_keys."
    )


def _described(space: Space[Any]) -> str:
    """Write a space on one line; NumPy breaks long bounds of a Box into several."""
    return " ".join(str(space).split())


def _named(key: str) -> str:
    return f"observation {key!r}" if key else "observation"
