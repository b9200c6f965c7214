"""The source document's denoiser: a residual MLP over the flattened chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.timestep import TimestepEmbedding, check_sizes


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


class ResidualMLP(Denoiser):
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
        action_horizon: int,
        num_steps: int,
        hidden_size: int = 256,
        num_layers: int = 4,
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
        """As the source document has it, all three joined in one layer; shapes as in `Denoiser.forward`."""
        parts = [
            noisy_actions.flatten(1),
            self.embed_timestep(timestep),
            self.project_observation(obs_embedding),
        ]
        x = nn.functional.silu(self.enter(torch.cat(parts, dim=1)))
        return self.leave(self.blocks(x)).unflatten(1, noisy_actions.shape[1:])

    def conditions(self, embedded_timestep: Tensor, obs_embedding: Tensor) -> tuple[Tensor, ...]:
        """The share of timestep and observation in the entry layer, one tensor (..., B, hidden_size)."""
        _, for_timestep, for_observation = self._entry_weights()
        observed = nn.functional.linear(self.project_observation(obs_embedding), for_observation)
        return (nn.functional.linear(embedded_timestep, for_timestep, self.enter.bias) + observed,)

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Equals `forward` up to rounding, as the entry's sum is taken in parts."""
        (condition,) = conditions
        for_actions, _, _ = self._entry_weights()
        x = nn.functional.silu(nn.functional.linear(noisy_actions.flatten(1), for_actions) + condition)
        return self.leave(self.blocks(x)).unflatten(1, noisy_actions.shape[1:])

    def _entry_weights(self) -> tuple[Tensor, ...]:
        width = self.project_observation.out_features
        return self.enter.weight.split((self.enter.in_features - 2 * width, width, width), dim=1)
