"""A residual MLP in which the timestep and the observation modulate every block (adaLN-Zero)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from policy.model.denoisers.modulated import ModulatedDenoiser, ModulatedFeedForward, zeroed
from policy.model.sizes import check_sizes


class ModulatedMLP(ModulatedDenoiser):
    """A residual MLP in which timestep and observation embedding modulate every block, instead of entering only once.

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
        check_sizes(
            obs_size=obs_size,
            action_dim=action_dim,
            action_horizon=action_horizon,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_steps=num_steps,
        )
        super().__init__(obs_size=obs_size, width=hidden_size, num_steps=num_steps)
        chunk_size = action_horizon * action_dim
        self.enter = nn.Linear(chunk_size, hidden_size)
        self.blocks = nn.ModuleList(ModulatedFeedForward(hidden_size, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.leave = zeroed(nn.Linear(hidden_size, chunk_size))

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Apply the blocks to the flattened chunk; see `Denoiser.denoise` for the shapes."""
        x = self.through_blocks(self.enter(noisy_actions.flatten(1)), conditions)
        return self.leave(self.norm(x)).unflatten(1, noisy_actions.shape[1:])
