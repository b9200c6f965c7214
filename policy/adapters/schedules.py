"""The noise schedules of diffusers, as settings of ours."""

from __future__ import annotations

import math
from typing import Any

from policy.diffusion.schedule import MAX_FINAL_ALPHA_CUMPROD

# The most timesteps that are read: far more than policies have, and few enough for a table of them.
MOST_TIMESTEPS = 100_000


def schedule_settings(source: object, name: str, num_steps: int, beta_start: float, beta_end: float) -> dict[str, Any]:
    """Return the settings of `make_schedule` that give the betas of a scheduler of diffusers.

    Args:
        source: where the scheduler is from, for messages.
        name: `squaredcos_cap_v2` or `linear`.
        num_steps: number of timesteps.
        beta_start: first beta of the linear schedule, at that number of timesteps.
        beta_end: last beta.

    Raises:
        ValueError: another schedule, one that leaves signal at its last timestep, or one without a timestep or with
            too many.
    """
    if not 1 <= num_steps <= MOST_TIMESTEPS:
        raise ValueError(f"{source} has {num_steps} timesteps; 1 to {MOST_TIMESTEPS} can be imported")
    if name == "squaredcos_cap_v2":
        return {"num_steps": num_steps, "beta_schedule": name}
    if name != "linear":
        raise ValueError(f"{source} has beta_schedule={name!r}; 'squaredcos_cap_v2' and 'linear' can be imported")
    steps = range(num_steps)
    betas = [beta_start + (beta_end - beta_start) * step / max(num_steps - 1, 1) for step in steps]
    left = math.prod(1 - beta for beta in betas)
    if left > MAX_FINAL_ALPHA_CUMPROD:
        raise ValueError(
            f"{source} adds noise in {num_steps} linear steps, which leave {left:.2f} of the signal (ᾱ) at the last"
            " timestep: sampling from a standard normal does not match what it was trained on, so it is not imported;"
            " train it with beta_schedule=squaredcos_cap_v2"
        )
    # Our endpoints refer to 1000 timesteps.
    scale = num_steps / 1000
    return {
        "num_steps": num_steps,
        "beta_schedule": name,
        "beta_start": beta_start * scale,
        "beta_end": beta_end * scale,
    }
