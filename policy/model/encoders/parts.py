"""Functions that the encoders share: joining the state vectors, and the MLP that outputs the embedding."""

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
