"""Functions that the encoders share: joining state vectors and steps, and the layers that output the embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def join_vectors(observations: Mapping[str, Tensor], keys: Sequence[str], noise: float) -> Tensor:
    """Concatenate the histories of all state vectors.

    Args:
        observations: (B, obs_horizon, D) under each of the keys.
        keys: keys of the observations, in this order; one or more.
        noise: standard deviation of Gaussian noise to add, from torch's global generator; at 0 nothing is drawn.

    Returns:
        (B, obs_horizon * sum of D).
    """
    x = torch.cat([observations[key].flatten(1) for key in keys], dim=1)
    return x + noise * torch.randn_like(x) if noise > 0 else x


def join_steps(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate parts (B, obs_horizon, D) within each step, and then the steps: (B, obs_horizon * sum of D)."""
    return torch.cat(list(parts), dim=2).flatten(1)


def order_of(shapes: Mapping[str, tuple[int, ...]], order: Sequence[str]) -> tuple[str, ...]:
    """Return the keys in a given order, or sorted if none is given.

    Raises:
        ValueError: the order does not name every key once.
    """
    if order and sorted(order) != sorted(shapes):
        raise ValueError(f"encoder.order must name each observation once: {sorted(shapes)}; got {list(order)}")
    return tuple(order) or tuple(sorted(shapes))


def check_vectors(encoder: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Reject observations that are not vectors.

    Raises:
        ValueError: the message names the observation.
    """
    for key, shape in shapes.items():
        if len(shape) != 1:
            raise ValueError(
                f"the {encoder} encoder takes vectors; observation {key!r} has shape {tuple(shape)}: "
                "choose encoder=image, or leave the key out with dataset.observation_keys=[...]"
            )


def to_size(width: int, obs_size: int) -> nn.Module:
    """Return a linear layer to the width of the embedding, or the identity where the width fits."""
    return nn.Identity() if width == obs_size else nn.Linear(width, obs_size)


def check_noise(noise: float) -> None:
    """Reject a standard deviation below 0.

    Raises:
        ValueError: a negative number.
    """
    if not noise >= 0:
        raise ValueError(f"encoder.noise must be 0 or more; got {noise}")


def final_mlp(width: int, hidden_size: int, obs_size: int, dropout: float) -> nn.Sequential:
    """Build an MLP with one hidden layer and dropout, (B, width) to (B, obs_size).

    Raises:
        ValueError: `hidden_size` below 1.
    """
    if hidden_size < 1:
        raise ValueError(f"encoder.hidden_size must be 1 or more; got {hidden_size}")
    return nn.Sequential(
        nn.Linear(width, hidden_size), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden_size, obs_size)
    )
