"""Actions that are counted from what is observed: a target position from the robot's own position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class ActionReference:
    """Where the numbers of an action are counted from: some from numbers of the newest observation, the others from 0.

    Where an action is the position to go to, most of it is the position that the robot has. A network that predicts it
    whole must pass the robot's position through to the digit. Counted from there, what is left is how far to go.

    Args:
        pairs: places (i, j) of a number of the action, and of the observed number that it is counted from in the vector
            of all numbers, the keys in sorted order.
        shapes: shape of one observation under each key; images have no part in it.
        action_dim: width of an action.

    Raises:
        ValueError: a place that does not exist, or a number of the action that is there twice.
    """

    def __init__(self, pairs: Sequence[Sequence[int]], shapes: Mapping[str, Sequence[int]], action_dim: int) -> None:
        self.keys = sorted(key for key, shape in shapes.items() if len(shape) == 1)
        width = sum(shapes[key][0] for key in self.keys)
        for pair in pairs:
            if len(pair) != 2 or not (0 <= pair[0] < action_dim and 0 <= pair[1] < width):
                raise ValueError(
                    f"relative_actions must be pairs of a place within 0..{action_dim - 1} in the action and of one"
                    f" within 0..{width - 1}, counted through the state vectors {self.keys}; got {list(pair)}"
                )
        self._places = {int(action): int(observed) for action, observed in pairs}
        if len(self._places) < len(pairs):
            raise ValueError(f"relative_actions names a number of the action twice; got {[list(p) for p in pairs]}")
        self._action_dim = action_dim

    def __call__(self, newest: Mapping[str, Tensor]) -> Tensor:
        """Return the references (B, 1, action_dim) of chunks, from their newest observations (B, D) under each key."""
        numbers = torch.cat([newest[key] for key in self.keys], dim=-1).to(torch.float32)
        zero = torch.zeros_like(numbers[:, 0])
        places = [self._places.get(action) for action in range(self._action_dim)]
        return torch.stack([zero if place is None else numbers[:, place] for place in places], dim=-1)[:, None]
