"""Denoising Diffusion Implicit Models (Song, Meng and Ermon, ICLR 2021, arXiv 2010.02502) as pure functions.

`predict_fn(noisy_actions, timestep, observations)` is any callable. It takes noisy actions (B, H, A), timestep (B,)
int64 and observations (B, obs_size), and returns (B, H, A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from policy.common.arguments import check_choice
from policy.diffusion.coefficients import ddim_coefficients, ddim_sigma, reverse_process, scaled_table
from policy.diffusion.schedule import NoiseSchedule

Spacing = Literal["trailing", "leading", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)

PredictFn = Callable[[Tensor, Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


def check_ddim_steps(ddim_steps: int, num_steps: int, name: str = "ddim_steps") -> None:
    """Reject a number of denoising steps that the schedule does not allow.

    Args:
        ddim_steps: K, the number of denoising steps.
        num_steps: T, the number of timesteps of the schedule.
        name: name of the setting, for the message.

    Raises:
        ValueError: `ddim_steps` is not a whole number within 1..`num_steps`.
    """
    if isinstance(ddim_steps, bool) or not isinstance(ddim_steps, int) or not 1 <= ddim_steps <= num_steps:
        raise ValueError(
            f"{name} must be a whole number within 1..{num_steps} (the schedule's num_steps); got {ddim_steps!r}"
        )


def check_eta(eta: float) -> None:
    """Reject an `eta` outside the range from 0 (deterministic DDIM) to 1 (DDPM).

    Raises:
        ValueError: `eta` is outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie within 0 (deterministic DDIM) and 1 (DDPM); got {eta!r}")


def check_clip(clip: float | None) -> None:
    """Reject a bound on the clean estimate that is not positive.

    Raises:
        ValueError: `clip` is neither None nor above 0.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clipping; got {clip!r}")


def check_spacing(spacing: str) -> None:
    """Reject an unknown timestep spacing.

    Raises:
        ValueError: an unknown name; the message lists the allowed ones.
    """
    check_choice("spacing", spacing, SPACINGS)


def ddim_timesteps(num_steps: int, ddim_steps: int, spacing: str = "trailing") -> Tensor:
    """Return the timesteps that a sampler visits, from most to least noise.

    There are exactly `ddim_steps` distinct timesteps for every 1 <= K <= T, also where K does not divide T.

    Args:
        num_steps: T of the schedule.
        ddim_steps: K, within 1..T.
        spacing: `trailing` counts back from T - 1 in equal strides (it always starts at full noise); `leading`
            counts up from 0 in whole strides of T // K (it ends at 0, and starts short of T - 1);
            `linspace` runs from T - 1 to 0, both included. (Lin et al. 2023, table 2.)

    Returns:
        (ddim_steps,) int64, strictly decreasing.

    Raises:
        ValueError: `ddim_steps` outside 1..`num_steps`, or an unknown spacing.

    Example:
        >>> ddim_timesteps(100, 8).tolist()
        [99, 87, 74, 61, 49, 37, 24, 11]
        >>> ddim_timesteps(100, 8, "leading").tolist()
        [84, 72, 60, 48, 36, 24, 12, 0]
    """
    check_ddim_steps(ddim_steps, num_steps)
    check_spacing(spacing)
    steps = torch.arange(ddim_steps, dtype=torch.float64)
    if spacing == "trailing":
        # `round` rounds halves to even, as numpy and the public implementations do.
        return (num_steps - steps * num_steps / ddim_steps).round().long() - 1
    if spacing == "leading":
        return (steps * (num_steps // ddim_steps)).long().flip(0)
    if ddim_steps == 1:
        return torch.tensor([num_steps - 1])
    return (steps * (num_steps - 1) / (ddim_steps - 1)).round().long().flip(0)


def check_generators(generator: Generators | None, rows: int) -> None:
    """Reject a sequence of generators that does not hold one generator per row.

    Raises:
        ValueError: the numbers differ; the message gives both.
    """
    if isinstance(generator, Sequence) and len(generator) != rows:
        raise ValueError(f"pass one generator per row: got {len(generator)} for a batch of {rows}")


def ddim_step(
    x_t: Tensor,
    predicted: Tensor,
    timestep: int,
    prev_timestep: int,
    schedule: NoiseSchedule,
    eta: float = 0.0,
    *,
    prediction_type: str = "epsilon",
    clip: float | None = 1.0,
    noise: Tensor | None = None,
    known: Tensor | None = None,
    keep: Tensor | float = 0.0,
) -> Tensor:
    """Take one reverse step from `timestep` to `prev_timestep` (DDIM, eq. 12 and 16).

    The step is x_prev = √ᾱ_prev x̂_0 + √(1 - ᾱ_prev - σ²) ε̂ + σ z. x̂_0 is the clipped estimate, and ε̂ is re-derived
    from it, so that both terms are consistent with the same x_0. With `clip=None`, ε̂ is the network's own estimate.

    Inpainting: where `keep` is 1, `known` replaces x̂_0. That part of x_prev is then the known data with the noise that
    x_t contains, like the noised data that the network saw in training (the replacement step of RePaint, Lugmayr et al.
    2022, adapted to DDIM).

    Args:
        x_t: (B, ...) noised data at `timestep`.
        predicted: (B, ...) the network's output for it.
        timestep: t, within 0..T - 1.
        prev_timestep: the timestep to reach, -1 <= prev_timestep < timestep; -1 is the clean end, ᾱ = 1.
        schedule: the noise schedule.
        eta: 0 deterministic, 1 the DDPM posterior.
        prediction_type: type of `predicted`: `epsilon`, `sample` or `v_prediction`.
        clip: bound on |x̂_0|, or None for no clipping.
        noise: (B, ...) standard normal z; required when eta > 0.
        known: (B, ...) known clean data, or None.
        keep: weight of `known` against x̂_0, in [0, 1], broadcast over x_t.

    Returns:
        (B, ...) data at `prev_timestep`.

    Raises:
        ValueError: timesteps out of order or range, `eta` outside 0..1, eta > 0 without `noise`, `clip` not positive,
            an unknown prediction type, or shapes that differ.
    """
    check_eta(eta)
    if not -1 <= prev_timestep < timestep < schedule.num_steps:
        raise ValueError(
            f"timesteps must satisfy -1 <= prev_timestep < timestep <= {schedule.num_steps - 1};"
            f" got prev_timestep={prev_timestep}, timestep={timestep}"
        )
    check_clip(clip)
    if eta > 0 and noise is None:
        raise ValueError(f"eta={eta} adds noise at every step: pass noise of shape {tuple(x_t.shape)}, or eta=0")
    if noise is not None and noise.shape != x_t.shape:
        raise ValueError(f"noise must have shape {tuple(x_t.shape)}, like x_t; got {tuple(noise.shape)}")
    if predicted.shape != x_t.shape:
        raise ValueError(f"the network returned {tuple(predicted.shape)} for noisy actions {tuple(x_t.shape)}")

    x_0 = schedule.to_sample(predicted, x_t, timestep, prediction_type)
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    if known is not None:
        x_0 = keep * known + (1 - keep) * x_0
    epsilon = schedule.to_epsilon(x_0, x_t, timestep)

    # Scalars stay in float64 until they are combined with the data.
    clean = torch.ones((), dtype=torch.float64)
    alpha_cumprod = schedule.alphas_cumprod[timestep]
    alpha_cumprod_prev = schedule.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else clean
    sigma = ddim_sigma(alpha_cumprod, alpha_cumprod_prev, eta)
    # At the clean end both terms vanish; the clamp only removes a rounding error below zero.
    direction = (1 - alpha_cumprod_prev - sigma**2).clamp(min=0).sqrt()

    x_prev = alpha_cumprod_prev.sqrt().item() * x_0 + direction.item() * epsilon
    if eta > 0 and noise is not None:
        x_prev = x_prev + sigma.item() * noise
    return x_prev


def ddim_sample(
    predict_fn: PredictFn,
    observations: Tensor,
    noise: Tensor,
    *,
    schedule: NoiseSchedule,
    ddim_steps: int = 50,
    eta: float = 0.0,
    spacing: str = "trailing",
    prediction_type: str = "epsilon",
    clip: float | None = 1.0,
    generator: Generators | None = None,
    known: Tensor | None = None,
    keep: Tensor | float = 0.0,
) -> Tensor:
    """Sample chunks by the reverse process, in exactly `ddim_steps` network calls (DDIM, sec. 4.2).

    The last step always ends at ᾱ = 1, so the result is an x_0 without residual noise.

    Args:
        predict_fn: `(noisy_actions (B, H, A), timestep (B,) int64, observations) -> (B, H, A)`.
        observations: (B, obs_size) observation embedding, passed to `predict_fn` unchanged.
        noise: (B, H, A) standard normal starting point x_T; its dtype and device are those of the result.
        schedule: the schedule the network was trained with.
        ddim_steps: K, within 1..T.
        eta: 0 deterministic given `noise`, 1 DDPM.
        spacing: `trailing`, `leading` or `linspace`; see `ddim_timesteps`.
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        clip: bound on |x̂_0| at every step, or None.
        generator: source of the noise added at each step when eta > 0, on the device of `noise`: one for the batch, or
            one per row, so that a row's result does not depend on the rest of the batch. None draws from
            torch's global generator.
        known: (B, H, A) known actions, such as those already committed to, or None; see `ddim_step`.
        keep: weight of `known`, in [0, 1], broadcast over (B, H, A): 1 fixes an action, 0 leaves it free.

    Returns:
        (B, H, A) sampled chunks.

    Raises:
        ValueError: `ddim_steps` outside 1..T, `eta` outside 0..1, `clip` not positive, an unknown name, a sequence of
            generators whose length is not B, or a network output whose shape is not that of `noise`.

    Example:
        >>> import torch
        >>> from policy import ddim
        >>> network = ddim.build(obs_size=287, action_dim=2, num_steps=100)
        >>> schedule = ddim.make_schedule(num_steps=100)
        >>> noise = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
        >>> with torch.no_grad():
        ...     actions = ddim.ddim_sample(network, torch.zeros(1, 287), noise, schedule=schedule, ddim_steps=8)
        >>> actions.shape
        torch.Size([1, 8, 2])
    """
    check_eta(eta)
    check_clip(clip)
    check_generators(generator, len(noise))
    timesteps = ddim_timesteps(schedule.num_steps, ddim_steps, spacing)

    def predict(step: int, x: Tensor) -> Tensor:
        timestep = torch.full((len(x),), int(timesteps[step]), dtype=torch.int64, device=x.device)
        return predict_fn(x, timestep, observations)

    scales = schedule.input_scales[timesteps]
    return reverse_process(
        predict,
        scales[0].item() * noise,
        scaled_table(ddim_coefficients(schedule, timesteps, eta, prediction_type), scales).to(noise),
        predicts_clean=prediction_type == "sample",
        clip=clip,
        step_noise=(lambda step: randn_like(noise, generator)) if eta > 0 else None,
        known=known,
        keep=keep,
    )


def randn_like(x: Tensor, generator: Generators | None) -> Tensor:
    """Draw standard normal noise of `x`'s shape, from one generator or from one per row.

    Args:
        x: (B, ...) tensor that gives shape, dtype and device.
        generator: one generator, one per row, or None for torch's global generator.

    Returns:
        (B, ...) noise.

    Raises:
        ValueError: a sequence of generators whose length is not B.
    """
    check_generators(generator, len(x))
    if isinstance(generator, Sequence):
        rows = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in generator]
        return torch.stack(rows).to(x.device)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
