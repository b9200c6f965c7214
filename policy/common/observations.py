"""The types of observations and training batches, and the check that observations fit a policy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

# One observation as an environment returns it: a vector, an image, or arrays by key.
Observation: TypeAlias = NDArray[Any] | Mapping[str, NDArray[Any]]
# One observation, or a history of them, as arrays by key.
ByKey: TypeAlias = dict[str, NDArray[Any]]
# A batch of observation histories, (B, obs_horizon, *shape) under each key.
Observations: TypeAlias = "Mapping[str, Tensor]"
# Shape of one observation under each key, without batch and time.
Shapes: TypeAlias = Mapping[str, Sequence[int]]


class Batch(TypedDict):
    """One training batch, in the data's units.

    Keys:
        observations: (B, obs_horizon, *shape) under each key, privileged ones included.
        actions: (B, denoised_horizon, action_dim): past actions, if the policy has them, and the chunk.
        mask: (B, denoised_horizon) bool, False where the actions lie outside their episode.
        counted: where this is one of the equal parts of a larger batch, the number of actions in a part whose mask is
            True, on average over the parts; left out in a whole batch.
        held: (B,) int64, what the robot holds at the newest observation, where that was asked for: 0 where nothing but
            the robot moves, k where the k-th thing goes with it, -1 where more moves or it is not known.
        groups: (B, things) int64, the poses in which each thing may be shown, where that was asked for, see
            `policy.data.exchange`; -1 where it stays.
    """

    observations: dict[str, Tensor]
    actions: Tensor
    mask: Tensor
    counted: NotRequired[float]
    held: NotRequired[Tensor]
    groups: NotRequired[Tensor]


def is_image(shape: Sequence[int]) -> bool:
    """Return whether one observation of this shape is an image, (height, width, channels)."""
    return len(shape) == 3


def plain_key(shape: Sequence[int]) -> str:
    """Return the key for an observation that has none: `image` for an image, else `state`."""
    return "image" if is_image(shape) else "state"


def as_dict(observation: Observation) -> ByKey:
    """Return an observation as arrays by key."""
    if isinstance(observation, Mapping):
        return dict(observation)
    return {plain_key(np.shape(observation)): observation}


def vector_widths(shapes: Shapes) -> dict[str, int]:
    """Return how many numbers each state vector has, in the order in which all numbers are counted: by sorted key."""
    return {key: shape[0] for key, shape in sorted(shapes.items()) if len(shape) == 1}


def places_by_key(name: str, places: Sequence[int], shapes: Shapes) -> dict[str, list[int]]:
    """Find numbers of the state vectors, given as places in the vector of all of them, the keys in sorted order.

    Args:
        name: the setting that gives the places, for the message.
        places: the places.
        shapes: shape of one observation under each key; images have no part in it.

    Returns:
        The places within each vector, in the given order.

    Raises:
        ValueError: a place that does not exist.

    >>> places_by_key("ignored", [3, 0], {"hand": (2,), "block": (3,)})
    {'block': [0], 'hand': [0]}
    """
    widths = vector_widths(shapes)
    total = sum(widths.values())
    if wrong := [place for place in places if not 0 <= place < total]:
        allowed = f"places within 0..{total - 1}, counted through the state vectors {[*widths]}"
        raise ValueError(f"{name} must be {allowed if widths else 'empty without state vectors'}; got {wrong[0]}")
    firsts = itertools.accumulate(widths.values(), initial=0)
    return {
        key: [place - first for place in places if first <= place < first + width]
        for (key, width), first in zip(widths.items(), firsts, strict=False)
    }


def fitting_keys(wanted: Shapes, offered: Shapes) -> dict[str, str] | None:
    """Pair the observations that an environment offers with those that a policy wants, one to one, by their shapes.

    Those that agree in key and shape belong together. Each of the others fits if it alone has its shape on both sides.

    Args:
        wanted: the policy's shapes.
        offered: the environment's shapes.

    Returns:
        The policy's key for each of the environment's, or None if there is no such pairing or more than one.

    >>> fitting_keys({"observation.state": (2,), "box": (16,)}, {"agent_pos": (2,), "corners": (16,)})
    {'agent_pos': 'observation.state', 'corners': 'box'}
    """
    same = {key for key, shape in wanted.items() if key in offered and tuple(offered[key]) == tuple(shape)}
    theirs = {tuple(shape): key for key, shape in wanted.items() if key not in same}
    ours = {tuple(shape): key for key, shape in offered.items() if key not in same}
    unique = len(theirs) == len(wanted) - len(same) and len(ours) == len(offered) - len(same)
    if not unique or theirs.keys() != ours.keys():
        return None
    return {key: key if key in same else theirs[tuple(shape)] for key, shape in offered.items()}


def describe_keys(keys: Mapping[str, str]) -> str:
    """Write a mapping of keys as it is typed on a command line.

    >>> describe_keys({"agent_pos": "observation.state", "corners": "box"})
    '{agent_pos: observation.state, corners: box}'
    """
    return f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in keys.items())}}}"


def check_observations(observations: Mapping[str, Any], shapes: Shapes, leading: Sequence[int | None] = ()) -> None:
    """Reject observations whose keys or shapes differ from those that a policy was made for.

    Args:
        observations: arrays or tensors, (*leading, *shape) under each key.
        shapes: the policy's shapes.
        leading: sizes of the leading axes; None allows any size. The size of such an axis is never read, because a
            traced program that reads its batch size holds for that size alone.

    Raises:
        ValueError: missing or unknown keys, or another shape.
    """
    if observations.keys() != shapes.keys():
        raise ValueError(f"observations must have the keys {sorted(shapes)}; got {sorted(observations)}")
    for key, value in observations.items():
        expected = (*leading, *shapes[key])
        fits = len(value.shape) == len(expected) and all(
            size is None or value.shape[axis] == size for axis, size in enumerate(expected)
        )
        if not fits:
            wanted = ", ".join("B" if size is None else str(size) for size in expected)
            raise ValueError(f"observation {key!r} must have shape ({wanted}); got {tuple(value.shape)}")
