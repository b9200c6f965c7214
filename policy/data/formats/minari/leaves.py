"""The arrays of a Minari dataset: where they are in its spaces, and what their rows become."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image

from policy.common.observations import is_image
from policy.data.episode import Request

ACTIONS = "actions"
OBSERVATIONS = "observations"
# A choice among more options has a one-hot vector that is too wide for a network.
MAX_CHOICES = 2**16

# Observations as they are stored: an array with a row for each of them, or one JPEG for each of them.
Rows = NDArray[Any] | list[bytes]


@dataclass(frozen=True)
class Leaf:
    """One array of a dataset: its path through Dicts (keys) and Tuples (indices), and its space."""

    path: tuple[str | int, ...]
    space: gymnasium.Space[Any]

    def __str__(self) -> str:
        return "/".join(map(str, self.path))


def observed_leaves(space: gymnasium.Space[Any], request: Request) -> dict[str, Leaf]:
    """The arrays that are observed, by the policy's key.

    Args:
        space: the observation space.
        request: the user's request; by default every array of a fixed size.

    Raises:
        ValueError: nothing in the space can be observed, or not what is requested.
    """
    leaves = dict[str, Leaf]()
    for leaf in _leaves(space, ()):
        name = "/".join(map(str, leaf.path[1:])) or ("image" if _is_picture(space) else "state")
        if name in leaves:
            raise ValueError(f"two of its observations are called {name!r}")
        leaves[name] = leaf
    usable = [name for name, leaf in leaves.items() if _is_usable(leaf.space)]
    if not usable:
        raise ValueError(f"none of its observations is an array of a fixed size; its observation space is {space}")
    chosen = request.observations(leaves, usable)
    if refused := [name for name in chosen.values() if name not in usable]:
        raise ValueError(
            f"observation {refused[0]!r} is {leaves[refused[0]].space}, which is not an array of a fixed size; usable:"
            f" {', '.join(usable)}"
        )
    return {key: leaves[name] for key, name in chosen.items()}


def _leaves(space: gymnasium.Space[Any], path: tuple[str | int, ...]) -> Iterator[Leaf]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        children = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for name, child in children:
            yield from _leaves(child, (*path, name))
    else:
        yield Leaf((OBSERVATIONS, *path), space)


def _is_picture(space: gymnasium.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and is_image(space.shape)


def _is_usable(space: gymnasium.Space[Any]) -> bool:
    if isinstance(space, spaces.Box):
        return True
    choices = spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    return isinstance(space, choices) and spaces.utils.flatdim(space) <= MAX_CHOICES


def shape_of(space: gymnasium.Space[Any]) -> tuple[int, ...]:
    """The shape of one row of `values_of`."""
    return space.shape or () if isinstance(space, spaces.Box) else (spaces.utils.flatdim(space),)


def values_of(rows: Rows, leaf: Leaf) -> NDArray[Any]:
    """Convert stored rows to vectors (T, D) or pictures (T, H, W, C)."""
    space = leaf.space
    values = _pictures(rows, leaf) if isinstance(rows, list) else rows
    if values.shape[1:] != space.shape:
        raise ValueError(f"'{leaf}' holds arrays of shape {values.shape[1:]}; its space is {space}")
    if _is_picture(space):
        return values
    flat = values.reshape(len(values), math.prod(space.shape))
    return flat if isinstance(space, spaces.Box) else _zeros_and_ones(flat, leaf)


def may_be_jpeg(space: gymnasium.Space[Any]) -> bool:
    """Whether Minari may have stored arrays of a space as JPEGs."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


def _pictures(rows: Sequence[bytes], leaf: Leaf) -> NDArray[np.uint8]:
    shape = leaf.space.shape or ()
    pictures = np.empty((len(rows), *shape), np.uint8)
    for number, row in enumerate(rows):
        try:
            with Image.open(io.BytesIO(row), formats=["JPEG"]) as image:
                if (*image.size[::-1], *((3,) if image.mode == "RGB" else ())) != shape:
                    raise ValueError(f"it is {image.mode}, {image.width} x {image.height} pixels; its space is {shape}")
                pictures[number] = np.asarray(image)
        except Exception as error:  # Pillow's exceptions have no common class
            raise ValueError(f"'{leaf}' cannot be read at transition {number} ({error})") from error
    return pictures


def _counts(space: gymnasium.Space[Any]) -> Any:
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec
    return space.n if isinstance(space, spaces.Discrete) else 2


def _zeros_and_ones(values: NDArray[Any], leaf: Leaf) -> NDArray[np.float32]:
    """Encode choices (T, C) as `gymnasium.spaces.utils.flatten` does."""
    space: Any = leaf.space
    if values.dtype.kind not in "biu":
        raise ValueError(f"'{leaf}' must hold whole numbers; it holds {values.dtype}")
    start = np.ravel(getattr(space, "start", 0))
    counts = np.ravel(_counts(space))
    choices = values.astype(np.int64) - start
    wrong = np.argwhere((choices < 0) | (choices >= counts))
    if len(wrong):
        transition, index = wrong[0]
        raise ValueError(f"'{leaf}' is {values[transition, index]} at transition {transition}; its space is {space}")
    if isinstance(space, spaces.MultiBinary):
        return choices.astype(np.float32)
    encoded = np.zeros((len(choices), counts.sum()), np.float32)
    np.put_along_axis(encoded, choices + np.cumsum(counts) - counts, 1, axis=1)
    return encoded
