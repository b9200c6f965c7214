"""All numbers of the state vectors of a batch, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from policy.common.observations import Observations


def joined_numbers(observations: Observations, widths: Mapping[str, int]) -> Tensor:
    """All numbers (B, H, D) of the state vectors, a new tensor.

    Args:
        observations: (B, H, *) under each key.
        widths: how many numbers each state vector holds, in the order in which they are counted.
    """
    return torch.cat([observations[key] for key in widths], dim=-1)


def split_numbers(numbers: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The state vectors that `joined_numbers` has joined, as views of all numbers (B, H, D)."""
    return dict(zip(widths, numbers.split([*widths.values()], dim=-1), strict=True))
