"""The arithmetic of DDIM's steps as one small table: all that depends on the timestep alone is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from policy.diffusion.sampler import Sampler
from policy.diffusion.schedule import NoiseSchedule

# Columns of a step's coefficients.
FROM_X, FROM_PREDICTED, TO_X, TO_CLEAN, TO_NOISE = range(5)


@dataclass(frozen=True, kw_only=True)
class Course:
    """Where sampling begins, and the timesteps it visits.

    Attributes:
        timesteps: (ddim_steps,) int64, strictly decreasing; the last step lands on the clean end.
        signal: share of the previous chunk in the starting point, √ᾱ of the first timestep; 0 begins from noise alone.
        noise: share of noise in the starting point, √(1 - ᾱ); 1 begins from noise alone.
    """

    timesteps: Tensor
    signal: float = 0.0
    noise: float = 1.0


def cold_course(schedule: NoiseSchedule, sampler: Sampler) -> Course:
    """From noise.

    Raises:
        ValueError: more denoising steps than the schedule has timesteps.
    """
    return Course(timesteps=sampler.timesteps(schedule.num_steps))


def warm_course(schedule: NoiseSchedule, sampler: Sampler) -> Course:
    """From the previous chunk, noised to `sampler.warm_start` of the schedule.

    Raises:
        ValueError: more denoising steps than that share has timesteps.
    """
    timesteps = sampler.warm_timesteps(schedule.num_steps)
    alpha_cumprod = schedule.alphas_cumprod[timesteps[0]].item()
    return Course(timesteps=timesteps, signal=alpha_cumprod**0.5, noise=(1 - alpha_cumprod) ** 0.5)


def step_coefficients(schedule: NoiseSchedule, timesteps: Tensor, eta: float, prediction_type: str) -> Tensor:
    """Each step of `ddim_sample` as two sums of products.

        x̂_0 = clip(FROM_X x_t + FROM_PREDICTED network output)
        x_prev = TO_X x_t + TO_CLEAN x̂_0 + TO_NOISE z

    `ddim_step` says the same in the terms of the papers; here ε̂ is substituted: ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t).

    Args:
        schedule: of the policy.
        timesteps: (ddim_steps,) int64 that are visited, strictly decreasing; the last step lands on the clean end.
        eta: 0 deterministic, 1 DDPM.
        prediction_type: what the network predicts.

    Returns:
        (ddim_steps, 5) float64, in the order of the steps.
    """
    alpha_cumprod = schedule.alphas_cumprod[timesteps]
    alpha_cumprod_prev = torch.cat([alpha_cumprod[1:], torch.ones(1, dtype=torch.float64)])
    signal, noise = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    variance = (1 - alpha_cumprod_prev) / (1 - alpha_cumprod) * (1 - alpha_cumprod / alpha_cumprod_prev)
    sigma = eta * variance.sqrt()
    direction = (1 - alpha_cumprod_prev - sigma**2).clamp(min=0).sqrt()
    from_x, from_predicted = {
        "sample": (torch.zeros_like(signal), torch.ones_like(signal)),
        "epsilon": (1 / signal, -noise / signal),
        "v_prediction": (signal, -noise),
    }[prediction_type]
    to_clean = alpha_cumprod_prev.sqrt() - direction * signal / noise
    return torch.stack([from_x, from_predicted, direction / noise, to_clean, sigma], dim=1)
