"""The source document's denoiser: a residual MLP over the flattened chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy.denoisers.timestep import TimestepEmbedding, check_sizes


class ResidualBlock(nn.Module):
    """x + W₂ SiLU(W₁ LayerNorm(x)), four times wider inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B, width)."""
        h = nn.functional.silu(self.expand(self.norm(x)))
        return x + self.contract(self.dropout(h))


class ResidualMLP(nn.Module):
    """Noisy chunk, timestep and observation embedding are joined once, at the entry.

    Args:
        obs_size: width of the observation embedding.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        hidden_size: width of the residual blocks (even).
        num_layers: number of residual blocks.
        num_steps: T of the schedule.
        dropout: dropped share inside the blocks while training.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        *,
        obs_size: int,
        action_dim: int,
        action_horizon: int = 8,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_steps: int = 1000,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            obs_size=obs_size,
            action_dim=action_dim,
            action_horizon=action_horizon,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_steps=num_steps,
        )
        chunk_size = action_horizon * action_dim
        self.embed_timestep = TimestepEmbedding(num_steps, hidden_size)
        self.project_observation = nn.Linear(obs_size, hidden_size)
        self.enter = nn.Linear(chunk_size + 2 * hidden_size, hidden_size)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden_size, dropout) for _ in range(num_layers)))
        self.leave = nn.Linear(hidden_size, chunk_size)

    def forward(self, noisy_actions: Tensor, timestep: Tensor, obs_embedding: Tensor) -> Tensor:
        """Predict the schedule's target for a batch of noisy chunks.

        Args:
            noisy_actions: (B, action_horizon, action_dim).
            timestep: (B,) int64, within 0..num_steps - 1.
            obs_embedding: (B, obs_size).

        Returns:
            (B, action_horizon, action_dim).
        """
        parts = [
            noisy_actions.flatten(1),
            self.embed_timestep(timestep),
            self.project_observation(obs_embedding),
        ]
        x = nn.functional.silu(self.enter(torch.cat(parts, dim=1)))
        return self.leave(self.blocks(x)).unflatten(1, noisy_actions.shape[1:])
