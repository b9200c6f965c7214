"""The arithmetic of every solver: a table of five numbers a step, and the loop that applies it.

A denoising step of any solver here is two sums of products:

    x̂_0    = clip(FROM_X x_t + FROM_PREDICTED network output)
    x_prev = TO_X x_t + TO_CLEAN x̂_0 + TO_NOISE z

Everything in the table depends on the schedule and the timesteps alone, so it is computed once, in float64. A new
solver is a function that computes another table; `policy.diffusion.ddim.ddim_step` says what DDIM's table means in the
terms of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from policy.common.registry import Registry
from policy.diffusion.schedule import NoiseSchedule, check_prediction_type, check_signal

# Columns of the table.
FROM_X, FROM_PREDICTED, TO_X, TO_CLEAN, TO_NOISE = range(5)

# (schedule, timesteps (K,), eta, prediction_type) to a table (K, 5) in float64.
Solver: TypeAlias = Callable[[NoiseSchedule, Tensor, float, str], Tensor]

SOLVERS: Registry[Solver] = Registry("solver", {"ddim": "policy.diffusion.coefficients:ddim_coefficients"})


def ddim_coefficients(schedule: NoiseSchedule, timesteps: Tensor, eta: float, prediction_type: str) -> Tensor:
    """The table of DDIM (Song et al. 2021, eq. 12 and 16).

    `ddim_step` computes the same step by step; here ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t) is substituted.

    Args:
        schedule: the noise schedule.
        timesteps: (K,) int64 timesteps that are visited, strictly decreasing; the last step lands on the clean end.
        eta: 0 deterministic, 1 DDPM.
        prediction_type: what the network predicts: `epsilon`, `sample` or `v_prediction`.

    Returns:
        (K, 5) float64, in the order of the steps.

    Raises:
        ValueError: an unknown prediction type, or `epsilon` at a timestep without signal, ᾱ = 0.
    """
    check_prediction_type(prediction_type)
    alpha_cumprod = schedule.alphas_cumprod[timesteps]
    check_signal(alpha_cumprod, prediction_type)
    alpha_cumprod_prev = torch.cat([alpha_cumprod[1:], torch.ones(1, dtype=torch.float64)])
    signal, noise = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    sigma = ddim_sigma(alpha_cumprod, alpha_cumprod_prev, eta)
    # At the clean end both terms vanish; the clamp only removes a rounding error below zero.
    direction = (1 - alpha_cumprod_prev - sigma**2).clamp(min=0).sqrt()
    from_x, from_predicted = {
        "sample": (torch.zeros_like(signal), torch.ones_like(signal)),
        "epsilon": (1 / signal, -noise / signal),
        "v_prediction": (signal, -noise),
    }[prediction_type]
    to_clean = alpha_cumprod_prev.sqrt() - direction * signal / noise
    return torch.stack([from_x, from_predicted, direction / noise, to_clean, sigma], dim=1)


def ddim_sigma(alpha_cumprod: Tensor, alpha_cumprod_prev: Tensor, eta: float) -> Tensor:
    """σ of DDIM, eq. 16: η √((1 - ᾱ_prev) / (1 - ᾱ)) √(1 - ᾱ / ᾱ_prev)."""
    variance = (1 - alpha_cumprod_prev) / (1 - alpha_cumprod) * (1 - alpha_cumprod / alpha_cumprod_prev)
    return eta * variance.sqrt()


def take_step(
    x: Tensor,
    predicted: Tensor,
    coefficients: Tensor,
    *,
    predicts_clean: bool,
    clip: float | None,
    known: Tensor | None = None,
    keep: Tensor | float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step of the reverse process.

    Args:
        x: (B, ...) noised data at this timestep.
        predicted: (B, ...) the network's output for it.
        coefficients: (5,) this step's row of the table, of x's dtype and device.
        predicts_clean: whether the network predicts x_0 itself, so that nothing is to be converted.
        clip: bound on |x̂_0|, or None.
        known: (B, ...) clean data that is given, or None.
        keep: share of `known` that takes the place of x̂_0, in [0, 1], broadcast over x.
        noise: (B, ...) standard normal z, or None for a deterministic step.

    Returns:
        (B, ...) data at the next timestep.
    """
    clean = predicted if predicts_clean else coefficients[FROM_X] * x + coefficients[FROM_PREDICTED] * predicted
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    if known is not None:
        clean = keep * known + (1 - keep) * clean
    moved = coefficients[TO_X] * x + coefficients[TO_CLEAN] * clean
    return moved if noise is None else moved + coefficients[TO_NOISE] * noise


def reverse_process(
    predict: Callable[[int, Tensor], Tensor],
    x: Tensor,
    table: Tensor,
    *,
    predicts_clean: bool,
    clip: float | None,
    step_noise: Callable[[int], Tensor] | None,
    known: Tensor | None = None,
    keep: Tensor | float = 0.0,
) -> Tensor:
    """All steps of a table, in as many network calls: the one sampling loop.

    Args:
        predict: number of the step and x (B, ...) to the network's output (B, ...).
        x: (B, ...) starting point.
        table: (K, 5) of the solver, of x's dtype and device.
        predicts_clean: see `take_step`.
        clip: see `take_step`.
        step_noise: number of the step to standard normal noise (B, ...); None for a deterministic table.
        known: see `take_step`.
        keep: see `take_step`.

    Returns:
        (B, ...) clean data.

    Raises:
        ValueError: the network's output has another shape than x.
    """
    for step, coefficients in enumerate(table):
        predicted = predict(step, x)
        if predicted.shape != x.shape:
            raise ValueError(f"the network returned {tuple(predicted.shape)} for noisy actions {tuple(x.shape)}")
        x = take_step(
            x,
            predicted,
            coefficients,
            predicts_clean=predicts_clean,
            clip=clip,
            known=known,
            keep=keep,
            noise=None if step_noise is None else step_noise(step),
        )
    return x
