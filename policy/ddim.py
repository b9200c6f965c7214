"""Denoising Diffusion Implicit Models (Song, Meng and Ermon, ICLR 2021, arXiv 2010.02502) as seven functions.

The names and defaults are those of the source document. This module is the public interface to `policy.diffusion` and
to the document's network; no other module of the package imports it.
"""

from __future__ import annotations

import inspect

from torch import nn

from policy.diffusion.ddim import ddim_sample, ddim_step, ddim_timesteps
from policy.diffusion.schedule import make_schedule
from policy.model.denoisers.residual_mlp import ResidualMLP

__all__ = [
    "build",
    "ddim_sample",
    "ddim_step",
    "ddim_timesteps",
    "make_schedule",
    "output_size",
    "param_count",
    "recommended_defaults",
]


def build(
    *,
    obs_size: int,
    action_dim: int,
    action_horizon: int = 8,
    hidden_size: int = 256,
    num_layers: int = 4,
    num_steps: int = 1000,
) -> nn.Module:
    """Build the noise-prediction network of the source document; the same network serves DDPM.

    Args:
        obs_size: width of the observation embedding.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        hidden_size: width of the residual blocks.
        num_layers: number of residual blocks.
        num_steps: T of the schedule that it will be trained with; valid timesteps are 0..T - 1.

    Returns:
        A module `forward(noisy_actions (B, H, A), timestep (B,), observations (B, obs_size)) -> (B, H, A)`.

    Raises:
        ValueError: a size below 1, or an odd `hidden_size`.
    """
    return ResidualMLP(
        obs_size=obs_size,
        action_dim=action_dim,
        action_horizon=action_horizon,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_steps=num_steps,
    )


def output_size(*, action_dim: int = 64, action_horizon: int = 8) -> int:
    """Return the number of values in one chunk, `action_horizon * action_dim`.

    >>> output_size()
    512
    """
    return action_horizon * action_dim


def param_count(
    *, obs_size: int, action_dim: int, action_horizon: int = 8, hidden_size: int = 256, num_layers: int = 4
) -> int:
    """Return the exact number of parameters of `build(...)`, computed in closed form.

    Args:
        obs_size: width of the observation embedding.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        hidden_size: width h of the residual blocks.
        num_layers: number of residual blocks.

    Returns:
        The number of weights, biases and LayerNorm parameters.

    >>> param_count(obs_size=287, action_dim=64)
    2572032
    """
    h, chunk = hidden_size, output_size(action_dim=action_dim, action_horizon=action_horizon)
    observation = obs_size * h + h
    entry = (chunk + 2 * h) * h + h
    block = 2 * h + (h * 4 * h + 4 * h) + (4 * h * h + h)
    exit_ = h * chunk + chunk
    return observation + entry + num_layers * block + exit_


def recommended_defaults() -> dict[str, int | float]:
    """Return the source document's sizes and sampler settings, read from the defaults of the functions here.

    Returns:
        Keyword arguments; `build`, `make_schedule` and `ddim_sample` each take some of them.

    >>> recommended_defaults()["ddim_steps"]
    50
    """
    sizes = ("action_dim", "action_horizon", "hidden_size", "num_layers", "num_steps", "ddim_steps", "eta")
    parameters: dict[str, inspect.Parameter] = {}
    for function in (build, make_schedule, ddim_sample, output_size):
        parameters |= inspect.signature(function).parameters
    return {name: parameters[name].default for name in sizes}
