"""Differences of like quantities, which a policy observes beside the quantities themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

# The key under which an encoder finds the differences.
DIFFERENCES = "differences"
# Each difference is seen at these magnifications, beyond which it saturates: a centimetre matters near an object only.
MAGNIFICATIONS = (1.0, 4.0, 16.0)


class Differences(nn.Module):
    """The differences of chosen pairs of numbers, in the data's units, scaled to [-1, 1] and magnified around zero.

    A network that observes two positions must learn at every place that only their difference counts; from few
    demonstrations it does not. Zero stays zero, because it is where two things meet.

    Args:
        pairs: places (i, j) in the vector of all numbers, the keys in sorted order.
        shapes: shape of one observation under each key; images have no part in it.

    Raises:
        ValueError: a place that does not exist.
    """

    scale: Tensor

    def __init__(self, pairs: Sequence[Sequence[int]], shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.keys = sorted(key for key, shape in shapes.items() if len(shape) == 1)
        width = sum(shapes[key][0] for key in self.keys)
        for pair in pairs:
            if len(pair) != 2 or not all(0 <= place < width for place in pair):
                raise ValueError(
                    f"differences must be pairs of places within 0..{width - 1}, counted through the state vectors"
                    f" {self.keys}; got {list(pair)}"
                )
        self.first, self.second = ([pair[side] for pair in pairs] for side in (0, 1))
        self.register_buffer("scale", torch.ones(len(pairs)))

    @property
    def shape(self) -> tuple[int]:
        """The shape of one observation under the key `DIFFERENCES`."""
        return (len(MAGNIFICATIONS) * len(self.first),)

    def raw(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Return the differences (..., P) in the data's units, from (..., D) under each key."""
        numbers = torch.cat([observations[key] for key in self.keys], dim=-1)
        return numbers[..., self.first] - numbers[..., self.second]

    def fit(self, low: ArrayLike, high: ArrayLike) -> None:
        """Set the scale from the smallest and largest differences (P,) of the training data."""
        largest = torch.maximum(torch.as_tensor(low).abs(), torch.as_tensor(high).abs())
        self.scale.copy_(torch.where(largest > 0, largest, 1.0))

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Return the scaled differences (..., 3 * P), from observations (..., D) under each key in the data's units."""
        scaled = (self.raw(observations) / self.scale).clamp(-2, 2)
        return torch.cat([torch.tanh(scaled * by) for by in MAGNIFICATIONS], dim=-1)
