"""The arithmetic of DDIM's steps as one small table: all that depends on the timestep alone is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from policy.ddim import ddim_timesteps
from policy.sampler import Sampler
from policy.schedule import NoiseSchedule

# Columns of a step's coefficients.
FROM_X, FROM_PREDICTED, TO_X, TO_CLEAN, TO_NOISE = range(5)


def step_coefficients(schedule: NoiseSchedule, sampler: Sampler, prediction_type: str) -> Tensor:
    """Each step of `ddim_sample` as two sums of products.

        x̂_0 = clip(FROM_X x_t + FROM_PREDICTED network output)
        x_prev = TO_X x_t + TO_CLEAN x̂_0 + TO_NOISE z

    `ddim_step` says the same in the terms of the papers; here ε̂ is substituted: ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t).

    Args:
        schedule: of the policy.
        sampler: which timesteps, and eta.
        prediction_type: what the network predicts.

    Returns:
        (ddim_steps, 5) float64, in the order of the steps.

    Raises:
        ValueError: more denoising steps than the schedule has timesteps.
    """
    timesteps = ddim_timesteps(schedule.num_steps, sampler.ddim_steps, sampler.spacing)
    alpha_cumprod = schedule.alphas_cumprod[timesteps]
    alpha_cumprod_prev = torch.cat([alpha_cumprod[1:], torch.ones(1, dtype=torch.float64)])
    signal, noise = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    variance = (1 - alpha_cumprod_prev) / (1 - alpha_cumprod) * (1 - alpha_cumprod / alpha_cumprod_prev)
    sigma = sampler.eta * variance.sqrt()
    direction = (1 - alpha_cumprod_prev - sigma**2).clamp(min=0).sqrt()
    from_x, from_predicted = {
        "sample": (torch.zeros_like(signal), torch.ones_like(signal)),
        "epsilon": (1 / signal, -noise / signal),
        "v_prediction": (signal, -noise),
    }[prediction_type]
    to_clean = alpha_cumprod_prev.sqrt() - direction * signal / noise
    return torch.stack([from_x, from_predicted, direction / noise, to_clean, sigma], dim=1)
