"""Sinusoidal embedding of diffusion timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def made_for_shapes() -> bool:
    """Return whether modules are being built for their shapes alone, under `torch.device("meta")`.

    Loading a checkpoint begins in this way. Arithmetic and random draws on that device would import torch's compiler,
    which takes longer than the rest of loading.
    """
    return torch.get_default_device().type == "meta"


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


def check_sizes(**sizes: int) -> None:
    """Reject sizes that are not whole numbers of 1 or more, and odd widths of a timestep embedding.

    Raises:
        ValueError: an invalid size; the message names it.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more; got {size!r}")
    for name in sizes.keys() & {"hidden_size", "timestep_size"}:
        if sizes[name] % 2:
            raise ValueError(f"{name} must be even, for sine and cosine pairs; got {sizes[name]}")
