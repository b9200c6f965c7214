"""A residual MLP whose every block is modulated by the timestep and the observation (adaLN-Zero)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from policy.denoisers.timestep import TimestepEmbedding, check_sizes


class ModulatedBlock(nn.Module):
    """x + gate * W₂ SiLU(W₁ ((1 + scale) * LayerNorm(x) + shift)) (Peebles and Xie 2023, sec. 3.2)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 3 * width)
        self.expand = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(4 * width, width)
        # Each block starts as the identity: its gate is zero.
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., width) to 1 + scale, shift and gate, each (..., width)."""
        scale, shift, gate = self.modulate(condition).chunk(3, dim=-1)
        return 1 + scale, shift, gate

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        """(B, width) and its `modulation` to (B, width)."""
        h = self.norm(x) * scale + shift
        h = nn.functional.silu(self.expand(h))
        return x + gate * self.contract(self.dropout(h))


class ModulatedMLP(nn.Module):
    """Timestep and observation embedding steer every block, instead of entering once.

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
        self.embed_timestep = nn.Sequential(
            TimestepEmbedding(num_steps, hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.project_observation = nn.Linear(obs_size, hidden_size)
        self.enter = nn.Linear(chunk_size, hidden_size)
        self.blocks = nn.ModuleList(ModulatedBlock(hidden_size, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.leave = nn.Linear(hidden_size, chunk_size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, noisy_actions: Tensor, timestep: Tensor, obs_embedding: Tensor) -> Tensor:
        """Predict the schedule's target for a batch of noisy chunks.

        Args:
            noisy_actions: (B, action_horizon, action_dim).
            timestep: (B,) int64, within 0..num_steps - 1.
            obs_embedding: (B, obs_size).

        Returns:
            (B, action_horizon, action_dim).
        """
        return self.denoise(noisy_actions, self.conditions(self.embed_timestep(timestep), obs_embedding))

    def conditions(self, embedded_timestep: Tensor, obs_embedding: Tensor) -> tuple[Tensor, ...]:
        """All that the network does with timestep and observation: it needs no actions, so many timesteps go at once.

        Args:
            embedded_timestep: (..., B or 1, hidden_size) from `embed_timestep`.
            obs_embedding: (B, obs_size).

        Returns:
            Three tensors (..., B, hidden_size) for each block in turn: see `ModulatedBlock.modulation`.
        """
        condition = nn.functional.silu(embedded_timestep + self.project_observation(obs_embedding))
        return tuple(part for block in self.blocks for part in block.modulation(condition))  # type: ignore[operator]

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """What is left to do at each timestep.

        Args:
            noisy_actions: (B, action_horizon, action_dim).
            conditions: three tensors (B, hidden_size) for each block, see `conditions`.

        Returns:
            (B, action_horizon, action_dim).
        """
        x = self.enter(noisy_actions.flatten(1))
        for number, block in enumerate(self.blocks):
            x = block(x, *conditions[3 * number : 3 * number + 3])
        return self.leave(self.norm(x)).unflatten(1, noisy_actions.shape[1:])
