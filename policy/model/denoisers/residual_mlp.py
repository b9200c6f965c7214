"""The source document's denoiser: a residual MLP over the flattened chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.timestep import TimestepEmbedding
from policy.model.sizes import check_sizes


class ResidualBlock(nn.Module):
    """Residual block x + W₂ SiLU(W₁ LayerNorm(x)) with a hidden layer of 4 * width."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (B, width) to (B, width)."""
        h = nn.functional.silu(self.expand(self.norm(x)))
        return x + self.contract(self.dropout(h))


class ResidualMLP(Denoiser):
    """A residual MLP that joins noisy chunk, timestep and observation embedding once, in its first layer.

    Args:
        obs_size: width of the observation embedding.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        hidden_size: width of the residual blocks (even).
        num_layers: number of residual blocks.
        num_steps: T of the schedule.
        dropout: dropout probability inside the blocks.

    Raises:
        ValueError: a size below 1, or an odd `hidden_size`.
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
        """Join all three inputs in one layer, as in the source document; see `Denoiser.forward` for the shapes."""
        parts = [
            noisy_actions.flatten(1),
            self.embed_timestep(timestep),
            self.project_observation(obs_embedding),
        ]
        x = nn.functional.silu(self.enter(torch.cat(parts, dim=1)))
        return self.leave(self.blocks(x)).unflatten(1, noisy_actions.shape[1:])

    def conditions(self, embedded_timestep: Tensor, obs_embedding: Tensor) -> tuple[Tensor, ...]:
        """Return the contribution of timestep and observation to the first layer, one tensor (..., B, hidden_size)."""
        _, for_timestep, for_observation = self._entry_weights()
        observed = nn.functional.linear(self.project_observation(obs_embedding), for_observation)
        return (nn.functional.linear(embedded_timestep, for_timestep, self.enter.bias) + observed,)

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Predict as `forward` does, up to rounding: the sum in the first layer is computed in parts."""
        (condition,) = conditions
        for_actions, _, _ = self._entry_weights()
        x = nn.functional.silu(nn.functional.linear(noisy_actions.flatten(1), for_actions) + condition)
        return self.leave(self.blocks(x)).unflatten(1, noisy_actions.shape[1:])

    def _entry_weights(self) -> tuple[Tensor, ...]:
        width = self.project_observation.out_features
        return self.enter.weight.split((self.enter.in_features - 2 * width, width, width), dim=1)
