"""Settings of a sampler: they are chosen at inference, whatever the policy was trained with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.diffusion.coefficients import SOLVERS
from policy.diffusion.ddim import check_ddim_steps, check_eta, check_spacing, ddim_timesteps
from policy.diffusion.schedule import NoiseSchedule

# Settings that were added after the first sweeps, with the value that those sweeps used implicitly. A record leaves out
# a setting with this value, so that the cells of an older ledger keep their names.
LATER_SETTINGS = {"solver": "ddim"}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Settings of a sampler.

    Attributes:
        ddim_steps: denoising steps K, within 1..num_steps of the checkpoint's schedule.
        eta: 0 deterministic, 1 DDPM.
        spacing: `trailing`, `leading` or `linspace`.
        clip: bound on the normalised estimate of the clean chunk, in units of the policy's `action_bound`, or None.
        warm_start: begin every chunk except an episode's first from the previous chunk, shifted to now and noised to
            this share of the schedule's timesteps, above 0 and at most 1; None begins from noise alone.
        solver: name of the solver: `ddim`, or one that a plugin registers.

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
        """Reject more denoising steps than the schedule, or the share of it that `warm_start` leaves, has timesteps.

        Args:
            num_steps: T of the checkpoint's schedule.

        Raises:
            ValueError: too many denoising steps; the message gives the limit.
        """
        check_ddim_steps(self.ddim_steps, num_steps)
        if self.warm_start is not None and self.ddim_steps > (lowest := self._warm_range(num_steps)):
            raise ValueError(
                f"sampler.warm_start={self.warm_start} leaves {lowest} of {num_steps} timesteps, fewer than"
                f" ddim_steps={self.ddim_steps}: raise warm_start or lower ddim_steps"
            )

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON data, without those of `LATER_SETTINGS` that have their earlier value."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if LATER_SETTINGS.get(name, ...) != value}

    def cold_course(self, schedule: NoiseSchedule) -> Course:
        """Return the course of a chunk that begins from noise.

        Raises:
            ValueError: more denoising steps than the schedule has timesteps.
        """
        return Course(timesteps=ddim_timesteps(schedule.num_steps, self.ddim_steps, self.spacing))

    def warm_course(self, schedule: NoiseSchedule) -> Course:
        """Return the course of a chunk that begins from the previous one, noised to `warm_start` of the schedule.

        Raises:
            ValueError: more denoising steps than that share has timesteps.
        """
        timesteps = ddim_timesteps(self._warm_range(schedule.num_steps), self.ddim_steps, self.spacing)
        alpha_cumprod = schedule.alphas_cumprod[timesteps[0]].item()
        return Course(timesteps=timesteps, signal=alpha_cumprod**0.5, noise=(1 - alpha_cumprod) ** 0.5)

    def table(self, schedule: NoiseSchedule, course: Course, prediction_type: str) -> Tensor:
        """Return the solver's coefficients, (ddim_steps, 5) float64; see `policy.diffusion.coefficients`.

        Raises:
            ValueError: a solver of the user's own fails, or returns no such table.
        """
        try:
            table = SOLVERS[self.solver](schedule, course.timesteps, self.eta, prediction_type)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"the solver {self.solver!r} failed with {type(error).__name__}: {error}") from error
        shape = (len(course.timesteps), 5)
        if not isinstance(table, Tensor) or table.shape != shape or table.dtype != torch.float64:
            found = f"{table.dtype} of shape {tuple(table.shape)}" if isinstance(table, Tensor) else repr(table)
            raise ValueError(
                f"the solver {self.solver!r} must return a table of shape {shape}, float64, one row for each denoising"
                f" step; got {found}"
            )
        if not table.isfinite().all():
            raise ValueError(f"the table of the solver {self.solver!r} holds numbers that are not finite")
        return table

    def _warm_range(self, num_steps: int) -> int:
        assert self.warm_start is not None
        return max(1, round(self.warm_start * num_steps))


@dataclass(frozen=True, kw_only=True)
class Course:
    """The starting point of sampling and the timesteps that it visits.

    Attributes:
        timesteps: (ddim_steps,) int64, strictly decreasing; the last step ends at ᾱ = 1.
        signal: factor of the previous chunk in the starting point, √ᾱ of the first timestep; 0 begins from noise alone.
        noise: factor of the noise in the starting point, √(1 - ᾱ); 1 begins from noise alone.
    """

    timesteps: Tensor
    signal: float = 0.0
    noise: float = 1.0
