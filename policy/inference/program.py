"""Sampling as a program: embed once, condition all K steps at once, then K times the rest of the network.

The observation embedding does not change between steps, and the timesteps are known beforehand. So whatever the
denoiser does with the two is one batch of K rows, whose weights are read once for a chunk and not once for a step;
and whatever depends on the timestep alone is a constant of (schedule, ddim_steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from policy.ddim import ddim_timesteps
from policy.diffusion_policy import DiffusionPolicy
from policy.inference.steps import FROM_PREDICTED, FROM_X, TO_CLEAN, TO_NOISE, TO_X, step_coefficients
from policy.sampler import Sampler


class Prepare(nn.Module):
    """All that happens before the first step: normalise, encode, condition all steps."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Mapping[str, Tensor], embedded_timesteps: Tensor) -> tuple[Tensor, ...]:
        """Observations (B, obs_horizon, *shape) and (K, 1, width) to the denoiser's conditions, each (K, B, ...)."""
        return self.policy.denoiser.conditions(embedded_timesteps, self.policy.embed(observations))  # type: ignore[operator]


class Step(nn.Module):
    """One step: what is left of the network, and the move to the next timestep.

    Args:
        policy: gives the denoiser.
        clip: bound on the estimate of the clean chunk, or None.
    """

    def __init__(self, policy: DiffusionPolicy, clip: float | None) -> None:
        super().__init__()
        self.denoiser, self.clip = policy.denoiser, clip
        self.predicts_clean = policy.config.prediction_type == "sample"

    def forward(
        self, x: Tensor, coefficients: Tensor, conditions: Sequence[Tensor], noise: Tensor | None = None
    ) -> Tensor:
        """One step.

        Args:
            x: (B, action_horizon, action_dim) at this timestep.
            coefficients: (5,) of this step, see `step_coefficients`.
            conditions: each (B, ...), see `Prepare`.
            noise: (B, action_horizon, action_dim), None for eta = 0.

        Returns:
            (B, action_horizon, action_dim) at the next one.
        """
        clean = self.denoiser.denoise(x, conditions)  # type: ignore[operator]
        if not self.predicts_clean:
            clean = coefficients[FROM_X] * x + coefficients[FROM_PREDICTED] * clean
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        moved = coefficients[TO_X] * x + coefficients[TO_CLEAN] * clean
        return moved if noise is None else moved + coefficients[TO_NOISE] * noise


class Program(nn.Module):
    """A policy's whole sampling with its settings fixed.

    Args:
        policy: in evaluation mode.
        sampler: the settings.

    Raises:
        ValueError: more denoising steps than the schedule has timesteps.
    """

    embedded_timesteps: Tensor
    coefficients: Tensor

    def __init__(self, policy: DiffusionPolicy, sampler: Sampler) -> None:
        super().__init__()
        self.policy, self.sampler = policy, sampler
        self.prepare, self.step = Prepare(policy), Step(policy, sampler.clip)
        device = policy.device
        timesteps = ddim_timesteps(policy.schedule.num_steps, sampler.ddim_steps, sampler.spacing).to(device)
        with torch.no_grad():
            embedded = policy.denoiser.embed_timestep(timesteps)[:, None]  # type: ignore[operator]
        coefficients = step_coefficients(policy.schedule, sampler, policy.config.prediction_type)
        self.register_buffer("embedded_timesteps", embedded, persistent=False)
        self.register_buffer("coefficients", coefficients.to(device, torch.float32), persistent=False)

    def forward(self, observations: Mapping[str, Tensor], noise: Tensor, step_noise: Tensor | None) -> Tensor:
        """Sample one chunk per row.

        Args:
            observations: (B, obs_horizon, *shape) under each key, in the data's units.
            noise: (B, action_horizon, action_dim) standard normal starting point.
            step_noise: (K, B, action_horizon, action_dim) standard normal; None for eta = 0.

        Returns:
            (B, action_horizon, action_dim) in the data's units.
        """
        steps = zip(*self.prepare(observations, self.embedded_timesteps), strict=True)
        x = noise
        for k, conditions in enumerate(steps):
            added = None if step_noise is None else step_noise[k]
            x = self.step(x, self.coefficients[k], conditions, added)
        return self.policy.action_normalizer.unnormalize(x)
