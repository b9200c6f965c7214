"""A symmetry of the task, a function of the user's: it is tried before a training that would stop at it."""

from __future__ import annotations

from typing import Any

import numpy as np

from policy.common.modules import failures_named
from policy.data.demonstrations import Arrays, Augment, Demonstrations
from policy.data.frames import Frames

CONTRACT = (
    "it takes the observations by key, each (..., *shape), and the actions (..., action_dim), and returns the images of"
    " both under the symmetry, with the same keys and shapes"
)


def check_symmetry(augment: Augment, demonstrations: Demonstrations) -> None:
    """Try a symmetry on the first transition: once as a transition, (1, *shape), and once as a window, (1, 1, *shape).

    Frames of videos are not decoded: black pictures are in their place.

    Args:
        augment: the symmetry.
        demonstrations: the demonstrations.

    Raises:
        ValueError: the function fails, or returns something else; the message says what it takes and returns.
    """
    first: dict[str, Any] = {
        key: np.zeros(values.shape[1:], np.uint8) if isinstance(values, Frames) else values[0]
        for key, values in demonstrations.observations.items()
    }
    for axes in ((1,), (1, 1)):
        observations = {key: np.array(value).reshape(*axes, *value.shape) for key, value in first.items()}
        actions = np.array(demonstrations.actions[0]).reshape(*axes, -1)
        expected = _shapes(observations, actions)  # before the function, which may write into what it is given
        with failures_named("augment", f": {CONTRACT}"):
            images, image_actions = augment(observations, actions)
            found = _shapes({key: images[key] for key in first}, image_actions)
        if found != expected:
            raise ValueError(f"augment returned the shapes {found} for {expected}: {CONTRACT}")


def _shapes(observations: Arrays, actions: Any) -> dict[str, tuple[int, ...]]:
    return {**{key: np.shape(values) for key, values in observations.items()}, "actions": np.shape(actions)}
