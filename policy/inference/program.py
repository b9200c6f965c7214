"""Sampling as a program: embed once, condition all K steps at once, then K times the rest of the network.

The observation embedding does not change between steps, and the timesteps are known beforehand. So whatever the
denoiser does with the two is one batch of K rows, whose weights are read once for a chunk and not once for a step;
and whatever depends on the timestep alone is a constant of (schedule, ddim_steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from policy.diffusion.coefficients import FROM_PREDICTED, FROM_X, TO_CLEAN, TO_NOISE, TO_X, Course, step_coefficients
from policy.diffusion.sampler import Sampler
from policy.model.diffusion_policy import DiffusionPolicy


class Prepare(nn.Module):
    """All that happens before the first step: normalise, encode, condition all steps, begin.

    Args:
        policy: gives normalisers, encoder and denoiser.
        course: where sampling begins.
    """

    def __init__(self, policy: DiffusionPolicy, course: Course) -> None:
        super().__init__()
        self.policy, self.signal, self.noise = policy, course.signal, course.noise

    def forward(
        self, observations: Mapping[str, Tensor], embedded_timesteps: Tensor, noise: Tensor, previous: Tensor
    ) -> tuple[Tensor, ...]:
        """Prepare all steps.

        Args:
            observations: (B, obs_horizon, *shape) under each key.
            embedded_timesteps: (K, 1, width).
            noise: (B, action_horizon, action_dim).
            previous: (B, action_horizon, action_dim) in the data's units.

        Returns:
            The starting point and the normalised previous chunk, each (B, action_horizon, action_dim), then the
            denoiser's conditions, each (K, B, ...).
        """
        known = self.policy.action_normalizer.normalize(previous)
        conditions = self.policy.denoiser.conditions(embedded_timesteps, self.policy.embed(observations))
        return self.signal * known + self.noise * noise, known, *conditions


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
        self,
        x: Tensor,
        known: Tensor,
        keep: Tensor,
        coefficients: Tensor,
        conditions: Sequence[Tensor],
        noise: Tensor | None = None,
    ) -> Tensor:
        """One step.

        Args:
            x: (B, action_horizon, action_dim) at this timestep.
            known: (B, action_horizon, action_dim) normalised, what to keep.
            keep: (B, action_horizon) how much of it, in [0, 1].
            coefficients: (5,) of this step, see `step_coefficients`.
            conditions: each (B, ...), see `Prepare`.
            noise: (B, action_horizon, action_dim), None for eta = 0.

        Returns:
            (B, action_horizon, action_dim) at the next one.
        """
        clean = self.denoiser.denoise(x, conditions)
        if not self.predicts_clean:
            clean = coefficients[FROM_X] * x + coefficients[FROM_PREDICTED] * clean
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        kept = keep[..., None]
        clean = kept * known + (1 - kept) * clean
        moved = coefficients[TO_X] * x + coefficients[TO_CLEAN] * clean
        return moved if noise is None else moved + coefficients[TO_NOISE] * noise


class Program(nn.Module):
    """A policy's whole sampling with its settings fixed.

    Args:
        policy: in evaluation mode.
        sampler: the settings.
        course: of its timesteps.
    """

    embedded_timesteps: Tensor
    coefficients: Tensor

    def __init__(self, policy: DiffusionPolicy, sampler: Sampler, course: Course) -> None:
        super().__init__()
        self.policy, self.sampler = policy, sampler
        self.prepare, self.step = Prepare(policy, course), Step(policy, sampler.clip)
        with torch.no_grad():
            embedded = policy.denoiser.embed_timestep(course.timesteps.to(policy.device))[:, None]
        coefficients = step_coefficients(policy.schedule, course.timesteps, sampler.eta, policy.config.prediction_type)
        self.register_buffer("embedded_timesteps", embedded, persistent=False)
        self.register_buffer("coefficients", coefficients.to(policy.device, torch.float32), persistent=False)

    def forward(
        self,
        observations: Mapping[str, Tensor],
        noise: Tensor,
        step_noise: Tensor | None,
        previous: Tensor,
        keep: Tensor,
    ) -> Tensor:
        """Sample one chunk per row.

        Args:
            observations: (B, obs_horizon, *shape) under each key, in the data's units.
            noise: (B, action_horizon, action_dim) standard normal.
            step_noise: (K, B, action_horizon, action_dim) standard normal; None for eta = 0.
            previous: (B, action_horizon, action_dim) in the data's units, the chunk before, shifted to now.
            keep: (B, action_horizon) how much of it to keep, in [0, 1].

        Returns:
            (B, action_horizon, action_dim) in the data's units.
        """
        x, known, *conditions = self.prepare(observations, self.embedded_timesteps, noise, previous)
        for k, condition in enumerate(zip(*conditions, strict=True)):
            added = None if step_noise is None else step_noise[k]
            x = self.step(x, known, keep, self.coefficients[k], condition, added)
        return self.policy.action_normalizer.unnormalize(x)
