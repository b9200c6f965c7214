"""Differences of like quantities, positions or directions, which a policy observes beside the quantities themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from policy.common.observations import places_by_key, vector_widths

# The key under which an encoder finds the differences.
DIFFERENCES = "differences"
# Each difference is seen at these magnifications, beyond which it saturates: a centimetre matters near an object only.
MAGNIFICATIONS = (1.0, 4.0, 16.0)
# Cosine and sine of an angle, of its double and of its fourfold: a gripper takes a box from two or from four sides.
HARMONICS = 3


class Differences(nn.Module):
    """The differences of chosen pairs of numbers, of chosen pairs of directions, and of numbers from where they end.

    A network that observes two positions must learn at every place that only their difference counts; from few
    demonstrations it does not. The differences of numbers are scaled to [-1, 1] and magnified around zero, which stays
    zero, because it is where two things meet. A direction is a cosine and its sine, next to each other. Where all
    demonstrations end at one place, such as a target that never moves, how far a number is from its mean at their
    ends counts in the same way.

    Args:
        pairs: places (i, j) in the vector of all numbers, the keys in sorted order.
        directions: places (i, j) of two cosines in that vector, each followed by its sine.
        shapes: shape of one observation under each key; images have no part in it.
        ends: places of numbers whose difference from where the demonstrations end is seen.

    Raises:
        ValueError: a place that does not exist.
    """

    scale: Tensor
    ends: Tensor

    def __init__(
        self,
        pairs: Sequence[Sequence[int]],
        directions: Sequence[Sequence[int]],
        shapes: Mapping[str, Sequence[int]],
        ends: Sequence[int] = (),
    ) -> None:
        super().__init__()
        widths = vector_widths(shapes)
        self.keys, width = list(widths), sum(widths.values())
        for name, places, last in (("differences", pairs, width - 1), ("direction_differences", directions, width - 2)):
            for pair in places:
                if len(pair) != 2 or not all(0 <= place <= last for place in pair):
                    raise ValueError(
                        f"{name} must be pairs of places within 0..{last}, counted through the state vectors"
                        f" {self.keys}; got {list(pair)}"
                    )
        places_by_key("end_differences", ends, shapes)
        self.ending = list(ends)
        if self.ending:
            self.register_buffer("ends", torch.zeros(len(self.ending)))
        self.first, self.second = ([pair[side] for pair in pairs] for side in (0, 1))
        self.cosines = [[pair[side] for pair in directions] for side in (0, 1)]
        self.sines = [[place + 1 for place in places] for places in self.cosines]
        self.register_buffer("scale", torch.ones(len(self.ending) + len(pairs)))

    @property
    def shape(self) -> tuple[int]:
        """The shape of one observation under the key `DIFFERENCES`."""
        return (len(MAGNIFICATIONS) * len(self.scale) + 2 * HARMONICS * len(self.cosines[0]),)

    def raw(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Return the differences of numbers (..., P) in the data's units, from (..., D) under each key."""
        numbers = self._numbers(observations)
        apart = numbers[..., self.first] - numbers[..., self.second]
        return torch.cat([numbers[..., self.ending] - self.ends, apart], dim=-1) if self.ending else apart

    def fit_ends(self, last: Mapping[str, Tensor]) -> None:
        """Set where the demonstrations end, from their last observations, (E, D) under each key; before `fit`."""
        if self.ending:
            self.ends.copy_(self._numbers(last)[:, self.ending].double().mean(dim=0))

    def fit(self, low: ArrayLike, high: ArrayLike) -> None:
        """Set the scale from the smallest and largest differences (P,) of the training data."""
        largest = torch.maximum(torch.as_tensor(low).abs(), torch.as_tensor(high).abs())
        self.scale.copy_(torch.where(largest > 0, largest, 1.0))

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Return all differences (..., `shape`), from observations (..., D) under each key in the data's units."""
        scaled = (self.raw(observations) / self.scale).clamp(-2, 2)
        seen = [torch.tanh(scaled * by) for by in MAGNIFICATIONS]
        if self.cosines[0]:
            seen += self._turns(self._numbers(observations))
        return torch.cat(seen, dim=-1)

    def _turns(self, numbers: Tensor) -> list[Tensor]:
        """The cosine and the sine of each angle between two directions, of its double and of its fourfold."""
        numbers = numbers.clamp(-1, 1)
        (cos_a, cos_b), (sin_a, sin_b) = ([numbers[..., side] for side in both] for both in (self.cosines, self.sines))
        cos, sin = cos_a * cos_b + sin_a * sin_b, sin_a * cos_b - cos_a * sin_b
        turns = [cos, sin]
        for _ in range(HARMONICS - 1):
            cos, sin = cos * cos - sin * sin, 2 * cos * sin
            turns += [cos, sin]
        return turns

    def _numbers(self, observations: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([observations[key] for key in self.keys], dim=-1)
