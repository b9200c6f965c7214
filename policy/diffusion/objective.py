"""Objectives: what a network is trained for, and the way of sampling that follows from it.

Training shows the network a chunk x_0 under noise, signal x_0 + noise z, and samplers lead from noise to a chunk by the
table of coefficients of `policy.diffusion.coefficients`. The objectives differ in the two factors, in what the network
predicts, and in the table:

    diffusion    denoise at every timestep of the schedule; `sampler.solver` chooses the table (Ho et al. 2020)
    flow         the velocity of a straight line from noise to data, followed by Euler's method (Liu et al. 2022,
                 "Flow Straight and Fast", arXiv 2209.03003)
    regression   the mean of the chunks, from the observation alone, in one call
    mip          two calls, each a regression: the second improves on the first one's chunk, and learns to from the
                 demonstrated chunk under a little noise (the minimal iterative policy of Pan et al. 2025, "Much Ado
                 About Noising", arXiv 2512.01809)

The last two are the controls beside which an advantage of diffusion is shown. The rest of the code asks this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from policy.common.arguments import check_choice
from policy.diffusion.coefficients import SOLVERS, TO_CLEAN, Solver
from policy.diffusion.schedule import NoiseSchedule

DEFAULT_OBJECTIVE = "diffusion"
# The share of the signal in the input of the second call of `mip`, t* of the paper.
SECOND_SIGNAL = 0.9


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a network is trained for.

    Attributes:
        levels: maps (schedule, timesteps (N,)) to the factors of x_0 and of the noise z in the network's input, (N,)
            float64 each.
        target: maps (x_0, z) to the network's target; None for that of the schedule and the prediction type.
        output: what the network predicts, in the terms of `prediction_type`; None for an objective that leaves this to
            the setting `prediction_type`.
        solvers: the ways of sampling by name, the default first.
        calls: for a fixed number of calls of the network the noise share of each, of which 1 is the last timestep; None
            where `ddim_steps` chooses.
        initial_noise: factor of the noise that a chunk begins from, before `sampler.noise_scale`.
        lacks: settings of the sampler that have no meaning here.
    """

    levels: Callable[[NoiseSchedule, Tensor], tuple[Tensor, Tensor]]
    solvers: Mapping[str, Solver]
    target: Callable[[Tensor, Tensor], Tensor] | None = None
    output: str | None = None
    calls: tuple[float, ...] | None = None
    initial_noise: float = 1.0
    lacks: frozenset[str] = field(default_factory=frozenset)

    def has(self, setting: str, value: Any) -> bool:
        """Whether a setting of the sampler may have this value.

        Args:
            setting: its name, such as `eta`.
            value: its value.
        """
        if setting == "solver":
            return value in self.solvers
        if setting == "ddim_steps" and self.calls is not None:
            return bool(value == len(self.calls))
        return setting not in self.lacks

    @property
    def calls_in_words(self) -> str:
        """What a fixed number of calls means to a user; empty where `ddim_steps` chooses."""
        count = len(self.calls or ())
        return f"always takes {count} call{'s' * (count > 1)} of its network" if count else ""

    def fixed_timesteps(self, num_steps: int) -> Tensor:
        """The (len(calls),) int64 timesteps of the calls, strictly decreasing.

        Raises:
            ValueError: the schedule has too few timesteps for the calls to have one each.
        """
        assert self.calls is not None
        timesteps = torch.tensor([max(round(share * num_steps), 1) - 1 for share in self.calls])
        if len(timesteps.unique()) < len(timesteps):
            raise ValueError(
                f"{len(timesteps)} calls need a timestep each: raise schedule.num_steps, which is {num_steps}"
            )
        return timesteps

    def training_timesteps(
        self, num_steps: int, chunks: int, times: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Choose the timesteps at which chunks are learnt; those of one chunk follow one another.

        Args:
            num_steps: T of the schedule.
            chunks: the number of chunks.
            times: uniformly drawn timesteps of each chunk; with fixed calls a chunk is learnt at each of them once.
            generator: source of the draws.

        Returns:
            (N,) int64, N a multiple of `chunks`.
        """
        if self.calls is None:
            return torch.randint(num_steps, (chunks * times,), generator=generator)
        return self.fixed_timesteps(num_steps).repeat(chunks)


def _diffusion_levels(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    scales = schedule.input_scales[timesteps]
    signal, noise = schedule.sqrt_alphas_cumprod[timesteps], schedule.sqrt_one_minus_alphas_cumprod[timesteps]
    return scales * signal, scales * noise


def _flow_levels(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    time = (timesteps.double() + 1) / schedule.num_steps
    return 1 - time, time


def _no_levels(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(len(timesteps), dtype=torch.float64)
    return zeros, zeros


def _mip_levels(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    second = (timesteps < schedule.num_steps - 1).double()
    return SECOND_SIGNAL * second, (1 - SECOND_SIGNAL) * second


def euler_coefficients(schedule: NoiseSchedule, timesteps: Tensor, eta: float, prediction_type: str) -> Tensor:
    """Compute the coefficient table of Euler's method on a rectified flow (Liu et al. 2022, sec. 2).

    With x_t = (1 - t) x_0 + t z the network's output is v = z - x_0, so that x̂_0 = x_t - t v, and the step from t to t'
    is x_t + (t' - t) v = (t' / t) x_t + (1 - t' / t) x̂_0. Timestep n is t = (n + 1) / T, and the last step ends at 0.

    Args:
        schedule: it gives T; a flow has no betas.
        timesteps: (K,) int64 timesteps to visit, strictly decreasing.
        eta: 0; a flow adds no noise.
        prediction_type: `velocity`.

    Returns:
        (K, 5) float64 coefficients, in the order of the steps.
    """
    time = _flow_levels(schedule, timesteps)[1]
    kept = torch.cat([time[1:] / time[:-1], torch.zeros(1, dtype=torch.float64)])
    return torch.stack([torch.ones_like(time), -time, kept, 1 - kept, torch.zeros_like(time)], dim=1)


def direct_coefficients(schedule: NoiseSchedule, timesteps: Tensor, eta: float, prediction_type: str) -> Tensor:
    """Compute the coefficient table of regression: the network's output is the chunk, and no step depends on x.

    Of several calls, each but the last is followed by an input of which the chunk is `SECOND_SIGNAL`.

    Args:
        schedule: not used.
        timesteps: (K,) timesteps of the calls.
        eta: 0; the chunk has no noise.
        prediction_type: `sample`.

    Returns:
        (K, 5) float64 coefficients, in the order of the calls.
    """
    table = torch.tensor([0.0, 1.0, 0.0, SECOND_SIGNAL, 0.0], dtype=torch.float64).repeat(len(timesteps), 1)
    table[-1, TO_CLEAN] = 1.0
    return table


_NO_NOISE = frozenset({"ddim_steps", "eta", "spacing", "warm_start", "start", "noise_scale"})

OBJECTIVES: dict[str, Objective] = {
    "diffusion": Objective(levels=_diffusion_levels, solvers=SOLVERS),
    "flow": Objective(
        levels=_flow_levels,
        target=lambda x_0, noise: noise - x_0,
        output="velocity",
        solvers={"euler": euler_coefficients},
        lacks=frozenset({"eta"}),
    ),
    "regression": Objective(
        levels=_no_levels,
        target=lambda x_0, noise: x_0,
        output="sample",
        solvers={"one_call": direct_coefficients},
        calls=(1.0,),
        initial_noise=0.0,
        lacks=_NO_NOISE,
    ),
    "mip": Objective(
        levels=_mip_levels,
        target=lambda x_0, noise: x_0,
        output="sample",
        solvers={"two_calls": direct_coefficients},
        calls=(1.0, 1 - SECOND_SIGNAL),
        initial_noise=0.0,
        lacks=_NO_NOISE,
    ),
}


def check_objective(objective: str) -> None:
    """Reject an unknown objective.

    Raises:
        ValueError: an unknown name; the message gives the nearest one.
    """
    check_choice("objective", objective, OBJECTIVES)


def check_of_diffusion(objective: str, **given: tuple[Any, Any]) -> None:
    """Reject settings that only `diffusion` has.

    Args:
        objective: name of the objective.
        **given: by the name of the setting, its value and its default.

    Raises:
        ValueError: another objective, and a setting that is not at its default.
    """
    for name, (value, default) in given.items():
        if objective != DEFAULT_OBJECTIVE and value != default:
            raise ValueError(
                f"objective={objective} has no {name}, which is a setting of objective={DEFAULT_OBJECTIVE}; got"
                f" {name}={value}: leave {name} out, or use objective={DEFAULT_OBJECTIVE}"
            )
