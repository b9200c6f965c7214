"""What the encoders share: the joined state vectors, and the MLP that ends in the embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def join_vectors(observations: Mapping[str, Tensor], keys: Sequence[str], noise: float) -> Tensor:
    """The history of all state vectors, side by side.

    Args:
        observations: (B, obs_horizon, D) under each of the keys.
        keys: which observations, and their order; one or more.
        noise: standard deviation of Gaussian noise to add, from torch's global generator; at 0 nothing is drawn.

    Returns:
        (B, obs_horizon * sum of D).
    """
    x = torch.cat([observations[key].flatten(1) for key in keys], dim=1)
    return x + noise * torch.randn_like(x) if noise > 0 else x


def final_mlp(width: int, hidden_size: int, obs_size: int, dropout: float) -> nn.Sequential:
    """One hidden layer, dropped out in part while training: (B, width) to (B, obs_size).

    Raises:
        ValueError: a hidden layer of no width.
    """
    if hidden_size < 1:
        raise ValueError(f"encoder.hidden_size must be 1 or more; got {hidden_size}")
    return nn.Sequential(
        nn.Linear(width, hidden_size), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden_size, obs_size)
    )
