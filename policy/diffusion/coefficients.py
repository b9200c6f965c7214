"""The arithmetic of every solver: a table of coefficients, one row per step, and the loop that applies it.

A denoising step of any solver consists of two linear combinations:

    x̂_0    = clip(FROM_X x_t + FROM_PREDICTED network output)
    x_prev = TO_X x_t + TO_CLEAN x̂_0 + TO_NOISE z + TO_CLEAN_BEFORE x̂_0 of the step before

The last term is that of a multistep solver; the tables of other solvers have no such column. The table follows from
the schedule, the timesteps, eta and the prediction type alone, so it is computed once, in float64. A new solver is a
function that computes another table. `policy.diffusion.ddim.ddim_step` performs DDIM's step in the terms of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from policy.common.registry import Registry
from policy.diffusion.schedule import NoiseSchedule, check_prediction_type, check_signal

# Columns of the table; only a multistep solver has the last one.
FROM_X, FROM_PREDICTED, TO_X, TO_CLEAN, TO_NOISE, TO_CLEAN_BEFORE = range(6)

# Maps (schedule, timesteps (K,), eta, prediction_type) to a (K, 5) table in float64, (K, 6) for a multistep solver.
Solver: TypeAlias = Callable[[NoiseSchedule, Tensor, float, str], Tensor]

SOLVERS: Registry[Solver] = Registry(
    "solver",
    {
        "ddim": "policy.diffusion.coefficients:ddim_coefficients",
        "dpmpp_2m": "policy.diffusion.coefficients:dpmpp_2m_coefficients",
    },
)

# Solvers that add no noise.
NOISELESS = ("dpmpp_2m",)


def takes_steps_of_ddim(solver: str, ddim_steps: int) -> bool:
    """Whether another solver is `ddim`, to the bit, with so few steps; see `dpmpp_2m_coefficients`."""
    return solver == "dpmpp_2m" and ddim_steps <= 2


def check_noiseless(solver: str, eta: float) -> None:
    """Reject noise for a solver that adds none.

    Raises:
        ValueError: the solver is one of `NOISELESS`, and `eta` is not 0.
    """
    if solver in NOISELESS and eta != 0:
        raise ValueError(
            f"sampler.solver={solver} adds no noise, so sampler.eta must be 0; got {eta}: leave sampler.eta out, or use"
            " sampler.solver=ddim"
        )


def ddim_coefficients(schedule: NoiseSchedule, timesteps: Tensor, eta: float, prediction_type: str) -> Tensor:
    """Compute the coefficient table of DDIM (Song et al. 2021, eq. 12 and 16).

    It is `ddim_step` with ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t) substituted.

    Args:
        schedule: the noise schedule.
        timesteps: (K,) int64 timesteps to visit, strictly decreasing; the last step ends at ᾱ = 1.
        eta: 0 deterministic, 1 DDPM.
        prediction_type: type of the network's output: `epsilon`, `sample` or `v_prediction`.

    Returns:
        (K, 5) float64 coefficients, in the order of the steps.

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


def dpmpp_2m_coefficients(schedule: NoiseSchedule, timesteps: Tensor, eta: float, prediction_type: str) -> Tensor:
    """Compute the coefficient table of DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    It integrates the same ordinary differential equation as DDIM with eta = 0. DDIM takes x̂_0 for constant during a
    step (order 1). This solver extrapolates x̂_0 linearly from the step before, in λ = log(√ᾱ / √(1 - ᾱ)) (order 2):
    D = (1 + s) x̂_0 - s x̂_0 of the step before, with s = h / 2 h_before and h the length of a step in λ.

    Two steps are DDIM's: the first has no step before it, and the last ends at ᾱ = 1, where h is infinite.

    Args:
        schedule: the noise schedule.
        timesteps: (K,) int64 timesteps to visit, strictly decreasing; the last step ends at ᾱ = 1.
        eta: 0; the solver adds no noise.
        prediction_type: type of the network's output: `epsilon`, `sample` or `v_prediction`.

    Returns:
        (K, 6) float64 coefficients, in the order of the steps.

    Raises:
        ValueError: eta is not 0, an unknown prediction type, or `epsilon` at a timestep without signal, ᾱ = 0.
    """
    check_noiseless("dpmpp_2m", eta)
    first_order = ddim_coefficients(schedule, timesteps, 0.0, prediction_type)
    alpha_cumprod = schedule.alphas_cumprod[timesteps]
    lengths = (alpha_cumprod.log() - (1 - alpha_cumprod).log()).diff() / 2
    share = torch.zeros(len(timesteps), dtype=torch.float64)
    share[1:-1] = lengths[1:] / (2 * lengths[:-1])
    to_clean = first_order[:, TO_CLEAN]
    table = torch.cat([first_order, (-share * to_clean)[:, None]], dim=1)
    table[:, TO_CLEAN] = (1 + share) * to_clean
    return table


def scaled_table(table: Tensor, scales: Tensor) -> Tensor:
    """Turn the table of a solver for x_t into that for x_t times a scale of each timestep.

    The network of a policy with `sigma_data` sees such a product, see `NoiseSchedule.input_scales`. Sampling keeps it
    in place of x_t: no step has more to compute.

    Args:
        table: (K, 5) or (K, 6) coefficients.
        scales: (K,) the scale of each timestep; that of the clean end is 1.

    Returns:
        The table, of the same shape.
    """
    after = torch.cat([scales[1:], torch.ones_like(scales[:1])])
    scaled = table.clone()
    scaled[:, [FROM_X, TO_X]] /= scales[:, None]
    scaled[:, TO_X:] *= after[:, None]
    return scaled


def ddim_sigma(alpha_cumprod: Tensor, alpha_cumprod_prev: Tensor, eta: float) -> Tensor:
    """Compute σ of DDIM (eq. 16): η √((1 - ᾱ_prev) / (1 - ᾱ)) √(1 - ᾱ / ᾱ_prev)."""
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
    clean_before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step of the reverse process.

    Args:
        x: (B, ...) noised data at this timestep.
        predicted: (B, ...) the network's output for it.
        coefficients: (5,) or (6,) this step's row of the table, of x's dtype and device.
        predicts_clean: whether the network predicts x_0, so that its output needs no conversion.
        clip: bound on |x̂_0|, or None.
        known: (B, ...) known clean data, or None.
        keep: weight of `known` against x̂_0, in [0, 1], broadcast over x; 1 replaces x̂_0 by `known`.
        noise: (B, ...) standard normal z, or None for a deterministic step.
        clean_before: (B, ...) x̂_0 of the step before, for a multistep solver; None for one that does not use it.

    Returns:
        (B, ...) data at the next timestep, and (B, ...) x̂_0 of this step, clipped and with `known` in it.
    """
    clean = predicted if predicts_clean else coefficients[FROM_X] * x + coefficients[FROM_PREDICTED] * predicted
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    if known is not None:
        clean = keep * known + (1 - keep) * clean
    moved = coefficients[TO_X] * x + coefficients[TO_CLEAN] * clean
    if clean_before is not None:
        moved = moved + coefficients[TO_CLEAN_BEFORE] * clean_before
    return moved if noise is None else moved + coefficients[TO_NOISE] * noise, clean


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
    """Take all steps of a table, with one network call per step. All sampling in PyTorch runs this loop.

    Args:
        predict: maps the index of the step and x (B, ...) to the network's output (B, ...).
        x: (B, ...) starting point.
        table: (K, 5) or (K, 6) coefficients of the solver, of x's dtype and device.
        predicts_clean: see `take_step`.
        clip: see `take_step`.
        step_noise: maps the index of the step to standard normal noise (B, ...); None for a deterministic table.
        known: see `take_step`.
        keep: see `take_step`.

    Returns:
        (B, ...) clean data.

    Raises:
        ValueError: the network's output has another shape than x.
    """
    is_multistep = table.shape[1] > TO_CLEAN_BEFORE
    clean = x  # stands in for the estimate before the first one
    for step, coefficients in enumerate(table):
        predicted = predict(step, x)
        if predicted.shape != x.shape:
            raise ValueError(f"the network returned {tuple(predicted.shape)} for noisy actions {tuple(x.shape)}")
        x, clean = take_step(
            x,
            predicted,
            coefficients,
            predicts_clean=predicts_clean,
            clip=clip,
            known=known,
            keep=keep,
            noise=None if step_noise is None else step_noise(step),
            clean_before=clean if is_multistep else None,
        )
    return x
