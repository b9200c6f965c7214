"""How to sample: free at inference, however the policy was trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from policy.diffusion.coefficients import SOLVERS
from policy.diffusion.ddim import check_ddim_steps, check_eta, check_spacing, ddim_timesteps
from policy.diffusion.schedule import NoiseSchedule

# Settings that came after the first sweeps, with what those sampled with: records name them only where they differ, so
# that the cells of an older ledger keep their names.
LATER_SETTINGS = {"solver": "ddim"}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Settings of sampling.

    Attributes:
        ddim_steps: denoising steps K, within 1..num_steps of the checkpoint's schedule.
        eta: 0 deterministic, 1 DDPM.
        spacing: `trailing`, `leading` or `linspace`.
        clip: bound on the normalised estimate of the clean chunk, or None.
        warm_start: begin every chunk but an episode's first from the one before, shifted to now and noised to this
            share of the schedule's timesteps, above 0 and up to 1; None begins from noise alone.
        solver: computes the steps: `ddim`, or one that a plugin registers.

    Raises:
        ValueError: a value outside its range.
    """

    ddim_steps: int = 8
    eta: float = 0.0
    spacing: str = "trailing"
    clip: float | None = 1.0
    warm_start: float | None = None
    solver: str = "ddim"

    def __post_init__(self) -> None:
        if self.ddim_steps < 1:
            raise ValueError(f"sampler.ddim_steps must be 1 or more; got {self.ddim_steps}")
        check_eta(self.eta)
        check_spacing(self.spacing)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"sampler.clip must be positive, or null for no clipping; got {self.clip}")
        if self.warm_start is not None and not 0 < self.warm_start <= 1:
            raise ValueError(
                f"sampler.warm_start must be above 0 and at most 1, or null to begin from noise; got {self.warm_start}"
            )
        if self.solver not in SOLVERS:
            raise SOLVERS.unknown(self.solver)

    def check(self, num_steps: int) -> None:
        """Reject more denoising steps than there are timesteps to visit.

        Args:
            num_steps: T of the checkpoint's schedule.

        Raises:
            ValueError: naming the range.
        """
        check_ddim_steps(self.ddim_steps, num_steps)
        if self.warm_start is not None and self.ddim_steps > (lowest := self._warm_range(num_steps)):
            raise ValueError(
                f"sampler.warm_start={self.warm_start} leaves {lowest} of {num_steps} timesteps, fewer than"
                f" ddim_steps={self.ddim_steps}: raise the one or lower the other"
            )

    def record(self) -> dict[str, Any]:
        """The settings as JSON data, without those later ones that have the value all samplers had before."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if LATER_SETTINGS.get(name, ...) != value}

    def cold_course(self, schedule: NoiseSchedule) -> Course:
        """The course of a chunk that begins from noise.

        Raises:
            ValueError: more denoising steps than the schedule has timesteps.
        """
        return Course(timesteps=ddim_timesteps(schedule.num_steps, self.ddim_steps, self.spacing))

    def warm_course(self, schedule: NoiseSchedule) -> Course:
        """The course of a chunk that begins from the previous one, noised to `warm_start` of the schedule.

        Raises:
            ValueError: more denoising steps than that share has timesteps.
        """
        timesteps = ddim_timesteps(self._warm_range(schedule.num_steps), self.ddim_steps, self.spacing)
        alpha_cumprod = schedule.alphas_cumprod[timesteps[0]].item()
        return Course(timesteps=timesteps, signal=alpha_cumprod**0.5, noise=(1 - alpha_cumprod) ** 0.5)

    def table(self, schedule: NoiseSchedule, course: Course, prediction_type: str) -> Tensor:
        """(ddim_steps, 5) float64, the solver's coefficients of each step, see `policy.diffusion.coefficients`."""
        return SOLVERS[self.solver](schedule, course.timesteps, self.eta, prediction_type)

    def _warm_range(self, num_steps: int) -> int:
        assert self.warm_start is not None
        return max(1, round(self.warm_start * num_steps))


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
