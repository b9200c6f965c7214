"""What every denoiser is: a network in two parts, one of which needs no actions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Denoiser(nn.Module):
    """Predicts the schedule's target from a noisy chunk, the timestep and the observation.

    What the network does with timestep and observation alone is kept apart in `conditions`, so that a sampler can do
    it for all its timesteps at once; `denoise` is what is left to do at each of them.

    Attributes:
        embed_timestep: (B,) int64 timesteps, within 0..num_steps - 1, to (B, width).
    """

    embed_timestep: nn.Module

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
        """All that the network does with timestep and observation, for one timestep or, with leading axes, for many.

        Args:
            embedded_timestep: (..., B or 1, width) from `embed_timestep`.
            obs_embedding: (B, obs_size).

        Returns:
            Tensors (..., B, *), as `denoise` wants them.
        """
        raise NotImplementedError

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """What is left to do at one timestep.

        Args:
            noisy_actions: (B, action_horizon, action_dim).
            conditions: of this timestep, each (B, *).

        Returns:
            (B, action_horizon, action_dim).
        """
        raise NotImplementedError
