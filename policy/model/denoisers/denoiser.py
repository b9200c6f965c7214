"""The base class of all denoisers: a network in two parts, one of which does not depend on the actions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Denoiser(nn.Module):
    """Predicts the schedule's target from a noisy chunk, the timestep and the observation.

    `conditions` computes everything that depends on the timestep and the observation alone, so that a sampler can do it
    for all its timesteps at once. `denoise` computes the rest at each timestep.

    Attributes:
        embed_timestep: maps (B,) int64 timesteps, within 0..num_steps - 1, to (B, width).
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
        """Compute everything that depends on timestep and observation alone; leading axes hold several timesteps.

        Args:
            embedded_timestep: (..., B or 1, width) from `embed_timestep`.
            obs_embedding: (B, obs_size).

        Returns:
            Tensors (..., B, *), as `denoise` takes them.
        """
        raise NotImplementedError

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Predict the schedule's target at one timestep from the noisy actions and the conditions.

        Args:
            noisy_actions: (B, action_horizon, action_dim).
            conditions: conditions of this timestep, each (B, *).

        Returns:
            (B, action_horizon, action_dim).
        """
        raise NotImplementedError

    def check_past_actions(self, past_actions: int) -> None:
        """Reject a number of past actions after which an action does not depend on every observation.

        Args:
            past_actions: number of actions in front of the chunk that are denoised and cut off.

        Raises:
            ValueError: it is too small; a network whose actions all depend on every observation takes any.
        """


def check_denoiser(name: str, built: object) -> None:
    """Reject a part that trains as a denoiser and then cannot act as one.

    Args:
        name: its name, for the message.
        built: what the registered class or function returned.

    Raises:
        ValueError: it is not a `Denoiser` with the parts that sampling calls one by one.
    """
    missing = [part for part in ("embed_timestep", "conditions", "denoise") if not hasattr(built, part)]
    if missing or not isinstance(built, Denoiser):
        lacks = f", without {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"the denoiser {name!r} is a {type(built).__name__}{lacks}: derive it from"
            " policy.model.denoisers.denoiser.Denoiser, and set embed_timestep in its __init__"
        )
