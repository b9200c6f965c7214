"""Sinusoidal embedding of diffusion timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from policy.model.sizes import made_for_shapes


def sinusoidal_table(num_steps: int, width: int, endpoint: bool = False) -> Tensor:
    """Compute the embeddings of timesteps 0..num_steps - 1 (Vaswani et al. 2017, sec. 3.5, with cosines after sines).

    Args:
        num_steps: T of the schedule.
        width: even width of one embedding.
        endpoint: whether the frequencies, which fall from 1 towards 1 / 10,000, include the latter.

    Returns:
        (num_steps, width) float32.
    """
    if made_for_shapes():
        return torch.empty(num_steps, width)
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / max(half - endpoint, 1))
    angles = torch.arange(num_steps, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class TimestepEmbedding(nn.Module):
    """A fixed table of sinusoids; it has no parameters and is not stored in checkpoints."""

    table: Tensor

    def __init__(self, num_steps: int, width: int, endpoint: bool = False) -> None:
        super().__init__()
        self.register_buffer("table", sinusoidal_table(num_steps, width, endpoint), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Look up the embeddings (B, width) of (B,) int64 timesteps."""
        return nn.functional.embedding(timestep, self.table)
