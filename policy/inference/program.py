"""Sampling as one program: embed once, compute the conditions of all K steps, then run the rest of the network K times.

The observation embedding does not change between steps, and the timesteps are known beforehand. The part of the
denoiser that depends on these two alone is therefore computed as one batch of K rows, which reads its weights once per
chunk instead of once per step. The part that depends on the timestep alone is a constant of the schedule and the
sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from policy.common.observations import Observations
from policy.diffusion.coefficients import TO_CLEAN_BEFORE, reverse_process, take_step
from policy.diffusion.sampler import Course, Sampler
from policy.model.diffusion_policy import DiffusionPolicy


class SamplingInputs(NamedTuple):
    """The inputs of one call of a sampling program.

    Attributes:
        observations: (B, obs_horizon, *shape) under each key, in the data's units.
        noise: (B, denoised_horizon, action_dim) standard normal.
        step_noise: (K, B, denoised_horizon, action_dim) standard normal; None for eta = 0.
        previous: (B, action_horizon, action_dim) the previous chunk in the data's units, shifted to now.
        keep: (B, action_horizon) weight of each previous action, in [0, 1].
    """

    observations: Observations
    noise: Tensor
    step_noise: Tensor | None
    previous: Tensor
    keep: Tensor


def with_past(previous: Tensor, past_actions: int) -> Tensor:
    """Put past actions in front of the previous chunk: its first action, repeated, as a first guess.

    Args:
        previous: (B, action_horizon, action_dim).
        past_actions: how many the network denoises.

    Returns:
        (B, past_actions + action_horizon, action_dim).
    """
    return torch.cat([previous[:, :1]] * past_actions + [previous], dim=1) if past_actions else previous


def keep_with_past(keep: Tensor, past_actions: int) -> Tensor:
    """Leave past actions free: (B, action_horizon) weights to (B, past_actions + action_horizon, 1)."""
    return nn.functional.pad(keep, (past_actions, 0))[..., None]


class Prepare(nn.Module):
    """The work before the first step: normalise, encode, compute the conditions of all steps and the starting point.

    Args:
        policy: the policy with its normalisers, encoder and denoiser.
    """

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        observations: Mapping[str, Tensor],
        embedded_timesteps: Tensor,
        start: Tensor,
        noise: Tensor,
        previous: Tensor,
    ) -> tuple[Tensor, ...]:
        """Prepare all steps.

        Args:
            observations: (B, obs_horizon, *shape) under each key.
            embedded_timesteps: (K, 1, width).
            start: (2,) factors of the previous chunk and of the noise in the starting point, see `Course`.
            noise: (B, denoised_horizon, action_dim).
            previous: (B, action_horizon, action_dim) in the data's units.

        Returns:
            The starting point and the normalised previous actions, each (B, denoised_horizon, action_dim), then the
            denoiser's conditions, each (K, B, ...).
        """
        known = self.policy.action_normalizer.normalize(with_past(previous, self.policy.config.past_actions))
        conditions = self.policy.denoiser.conditions(embedded_timesteps, self.policy.embed(observations))
        return start[0] * known + start[1] * noise, known, *conditions


class Step(nn.Module):
    """One denoising step: the rest of the network, and the move to the next timestep.

    Args:
        policy: the policy with its denoiser.
        clip: `Sampler.clip`.
    """

    def __init__(self, policy: DiffusionPolicy, clip: float | None) -> None:
        super().__init__()
        self.denoiser, self.clip = policy.denoiser, policy.config.clip_at(clip)
        self.past_actions = policy.config.past_actions
        self.predicts_clean = policy.config.predicts == "sample"

    def forward(
        self,
        x: Tensor,
        clean_before: Tensor | None,
        known: Tensor,
        keep: Tensor,
        coefficients: Tensor,
        conditions: Sequence[Tensor],
        noise: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Take the step.

        Args:
            x: (B, denoised_horizon, action_dim) noisy actions at this timestep.
            clean_before: (B, denoised_horizon, action_dim) clean estimate of the step before; None for a solver that
                is not multistep.
            known: (B, denoised_horizon, action_dim) normalised previous actions.
            keep: (B, action_horizon) weight of each previous action, in [0, 1].
            coefficients: (5,) or (6,) coefficients of this step, see `policy.diffusion.coefficients`.
            conditions: the denoiser's conditions of this step, each (B, ...), see `Prepare`.
            noise: (B, denoised_horizon, action_dim) standard normal; None for eta = 0.

        Returns:
            What the next step takes: (B, denoised_horizon, action_dim) actions at the next timestep and, for a
            multistep solver, the clean estimate of this step, of the same shape.
        """
        moved, clean = take_step(
            x,
            self.denoiser.denoise(x, conditions),
            coefficients,
            predicts_clean=self.predicts_clean,
            clip=self.clip,
            known=known,
            keep=keep_with_past(keep, self.past_actions),
            noise=noise,
            clean_before=clean_before,
        )
        return (moved,) if clean_before is None else (moved, clean)


class Program(nn.Module):
    """A policy's complete sampling with its settings fixed.

    Args:
        policy: the policy, in evaluation mode.
        sampler: settings of the sampler.
        course: starting point and timesteps of sampling.
    """

    embedded_timesteps: Tensor
    start: Tensor
    coefficients: Tensor

    def __init__(self, policy: DiffusionPolicy, sampler: Sampler, course: Course) -> None:
        super().__init__()
        self.policy, self.sampler = policy, sampler
        self.prepare, self.step = Prepare(policy), Step(policy, sampler.clip)
        with torch.no_grad():
            embedded = policy.denoiser.embed_timestep(course.timesteps.to(policy.device))[:, None]
        coefficients = sampler.table(policy.schedule, course, policy.config.predicts, policy.config.objective)
        start = torch.tensor([course.signal, course.noise], device=policy.device)
        self.register_buffer("embedded_timesteps", embedded, persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("coefficients", coefficients.to(policy.device, torch.float32), persistent=False)

    @property
    def is_multistep(self) -> bool:
        """Whether a step uses the clean estimate of the step before."""
        return self.coefficients.shape[1] > TO_CLEAN_BEFORE

    def forward(self, inputs: SamplingInputs) -> Tensor:
        """Sample one chunk per row: (B, action_horizon, action_dim) in the data's units."""
        x, known, *conditions = self.prepare(
            inputs.observations, self.embedded_timesteps, self.start, inputs.noise, inputs.previous
        )
        step_noise = inputs.step_noise
        chunk = reverse_process(
            lambda step, x: self.step.denoiser.denoise(x, [condition[step] for condition in conditions]),
            x,
            self.coefficients,
            predicts_clean=self.step.predicts_clean,
            clip=self.step.clip,
            step_noise=None if step_noise is None else step_noise.__getitem__,
            known=known,
            keep=keep_with_past(inputs.keep, self.step.past_actions),
        )
        return self.policy.action_normalizer.unnormalize(chunk[:, self.step.past_actions :])
