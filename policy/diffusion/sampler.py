"""Settings of a sampler: they are chosen at inference, whatever the policy was trained with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.common.arguments import settings_of
from policy.common.next_line import hydra_text
from policy.diffusion.coefficients import SOLVERS, TO_CLEAN_BEFORE, check_noiseless, scaled_table
from policy.diffusion.ddim import check_ddim_steps, check_eta, check_spacing, ddim_timesteps
from policy.diffusion.objective import OBJECTIVES
from policy.diffusion.schedule import NoiseSchedule

# Settings that were added after the first sweeps, with the value that those sweeps used implicitly. A record leaves out
# a setting with this value, so that the cells of an older ledger keep their names.
LATER_SETTINGS = {"solver": "ddim", "start": 1.0, "noise_scale": 1.0}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Settings of a sampler.

    A setting with its default value is one that the user leaves open: an objective that does not have it ignores it,
    see `settled`.

    Attributes:
        ddim_steps: denoising steps K, within 1..num_steps of the checkpoint's schedule.
        eta: 0 deterministic, 1 DDPM; 0 only for `dpmpp_2m`, which adds no noise.
        spacing: `trailing`, `leading` or `linspace`.
        clip: bound on the normalised estimate of the clean chunk, in units of the policy's `action_bound`, or None.
        warm_start: begin every chunk except an episode's first from the previous chunk, shifted to now and noised to
            this share of the schedule's timesteps, above 0 and at most 1; None begins from noise alone.
        solver: name of the solver: `ddim`, `dpmpp_2m`, or one that a plugin registers; policies of another objective
            than diffusion have one of their own.
        start: begin a chunk from noise at this share of the schedule's timesteps, above 0 and at most 1; the
            `ddim_steps` visit only what lies below.
        noise_scale: factor of the noise that a chunk begins from, 0 or more; 0 begins from zeros.

    Raises:
        ValueError: a value outside its range.
    """

    ddim_steps: int = 8
    eta: float = 0.0
    spacing: str = "trailing"
    clip: float | None = 1.0
    warm_start: float | None = None
    solver: str = "ddim"
    start: float = 1.0
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.ddim_steps < 1:
            raise ValueError(f"sampler.ddim_steps must be 1 or more; got {self.ddim_steps}")
        with settings_of("sampler", ("eta", "spacing")):
            check_eta(self.eta)
            check_spacing(self.spacing)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"sampler.clip must be positive, or null for no clipping; got {self.clip}")
        if self.warm_start is not None and not 0 < self.warm_start <= 1:
            raise ValueError(
                f"sampler.warm_start must be above 0 and at most 1, or null to begin from noise; got {self.warm_start}"
            )
        if self.solver not in (solvers := [name for one in OBJECTIVES.values() for name in one.solvers]):
            raise SOLVERS.unknown(self.solver, solvers)
        check_noiseless(self.solver, self.eta)
        if not 0 < self.start <= 1:
            raise ValueError(f"sampler.start must be above 0 and at most 1; got {self.start}")
        if not 0 <= self.noise_scale < math.inf:
            raise ValueError(f"sampler.noise_scale must be 0 or more, and finite; got {self.noise_scale}")

    def check(self, num_steps: int) -> None:
        """Reject more denoising steps than the schedule, or the share of it that is left, has timesteps.

        Args:
            num_steps: T of the checkpoint's schedule.

        Raises:
            ValueError: too many denoising steps; the message gives the limit.
        """
        check_ddim_steps(self.ddim_steps, num_steps)
        for name, share in (("start", self.start), ("warm_start", self.warm_start)):
            if share is not None and self.ddim_steps > (left := timesteps_within(share, num_steps)):
                raise ValueError(
                    f"sampler.{name}={share} leaves {left} of {num_steps} timesteps, fewer than"
                    f" ddim_steps={self.ddim_steps}: raise {name} or lower ddim_steps"
                )

    def settled(self, objective: str, num_steps: int) -> Sampler:
        """Return the sampler of a policy: the settings that its objective fixes have their values.

        Args:
            objective: name of the policy's objective.
            num_steps: T of its schedule.

        Raises:
            ValueError: a setting that the objective does not have, or see `check`.
        """
        one, given = OBJECTIVES[objective], self.given
        for name, value in given.items():
            if not one.has(name, value):
                raise ValueError(_refusal(objective, name, value))
        fixed = {} if one.calls is None else {"ddim_steps": len(one.fixed_timesteps(num_steps))}
        chosen = Sampler(**{"solver": next(iter(one.solvers)), **fixed, **given})
        chosen.check(num_steps)
        return chosen

    @property
    def given(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(Sampler, name)}

    @property
    def overrides(self) -> str:
        """The settings that differ from their defaults, as a command takes them, such as `sampler.eta=0.5`."""
        return " ".join(f"sampler.{name}={hydra_text(value)}" for name, value in self.given.items())

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON data, without those of `LATER_SETTINGS` that have their earlier value."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if LATER_SETTINGS.get(name, ...) != value}

    def cold_course(self, schedule: NoiseSchedule, objective: str) -> Course:
        """Return the course of a chunk that begins from noise.

        Args:
            schedule: the policy's schedule.
            objective: name of the policy's objective.

        Raises:
            ValueError: more denoising steps than the share `start` of the schedule has timesteps.
        """
        one = OBJECTIVES[objective]
        fixed = one.calls is not None
        timesteps = one.fixed_timesteps(schedule.num_steps) if fixed else self._timesteps(schedule, self.start)
        scale = schedule.input_scales[timesteps[0]].item()
        return Course(timesteps=timesteps, noise=scale * one.initial_noise * self.noise_scale)

    def warm_course(self, schedule: NoiseSchedule, objective: str) -> Course:
        """Return the course of a chunk that begins from the previous one, noised to `warm_start` of the schedule.

        Args:
            schedule: the policy's schedule.
            objective: name of the policy's objective, which has `warm_start`.

        Raises:
            ValueError: more denoising steps than that share has timesteps.
        """
        assert self.warm_start is not None
        timesteps = self._timesteps(schedule, self.warm_start)
        signal, noise = (level.item() for level in OBJECTIVES[objective].levels(schedule, timesteps[:1]))
        return Course(timesteps=timesteps, signal=signal, noise=self.noise_scale * noise)

    def table(self, schedule: NoiseSchedule, course: Course, prediction_type: str, objective: str) -> Tensor:
        """Return the solver's coefficients, (ddim_steps, 5 or 6) float64; see `policy.diffusion.coefficients`.

        They are for x_t times the schedule's `input_scales`, see `scaled_table`.

        Args:
            schedule: the policy's schedule.
            course: it gives the timesteps.
            prediction_type: what the policy's network predicts.
            objective: name of the policy's objective.

        Raises:
            ValueError: a solver of the user's own fails, or returns no such table.
        """
        try:
            table = OBJECTIVES[objective].solvers[self.solver](schedule, course.timesteps, self.eta, prediction_type)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"the solver {self.solver!r} failed with {type(error).__name__}: {error}") from error
        shapes = [(len(course.timesteps), columns) for columns in (TO_CLEAN_BEFORE, TO_CLEAN_BEFORE + 1)]
        if not isinstance(table, Tensor) or tuple(table.shape) not in shapes or table.dtype != torch.float64:
            found = f"{table.dtype} of shape {tuple(table.shape)}" if isinstance(table, Tensor) else repr(table)
            raise ValueError(
                f"the solver {self.solver!r} must return a table of shape {shapes[0]}, or {shapes[1]} for a multistep"
                f" solver, float64, one row for each denoising step; got {found}"
            )
        if not table.isfinite().all():
            raise ValueError(f"the table of the solver {self.solver!r} holds numbers that are not finite")
        return scaled_table(table, schedule.input_scales[course.timesteps])

    def _timesteps(self, schedule: NoiseSchedule, share: float) -> Tensor:
        return ddim_timesteps(timesteps_within(share, schedule.num_steps), self.ddim_steps, self.spacing)


def timesteps_within(share: float, num_steps: int) -> int:
    """The number of timesteps, 1 or more, in the lowest share of a schedule of `num_steps`."""
    return max(1, round(share * num_steps))


@dataclass(frozen=True, kw_only=True)
class Course:
    """The starting point of sampling and the timesteps that it visits.

    Attributes:
        timesteps: (ddim_steps,) int64, strictly decreasing; the last step ends at ᾱ = 1.
        signal: factor of the previous chunk in the starting point, √ᾱ of the first timestep; 0 begins from noise alone.
        noise: factor of the noise in the starting point: `noise_scale`, times √(1 - ᾱ) if there is a signal. Both are
            times the timestep's input scale, see `NoiseSchedule.input_scales`.
    """

    timesteps: Tensor
    signal: float = 0.0
    noise: float = 1.0


def steps_to_compare(steps: int) -> list[int]:
    """The powers of two below a number of steps, at most 16, and the number: how many does the policy really need?"""
    return [*(count for count in (1, 2, 4, 8, 16) if count < steps), steps]


def _refusal(objective: str, setting: str, value: Any) -> str:
    """Why an objective refuses a setting of the sampler, and what it has instead."""
    one = OBJECTIVES[objective]
    of = f"a policy with objective={objective}"
    if setting == "solver":
        return f"{of} has no sampler.solver={value}: leave it out, or use {', '.join(one.solvers)}"
    has = [field.name for field in dataclasses.fields(Sampler) if field.name not in one.lacks]
    unset = f"sampler.{setting}={hydra_text(getattr(Sampler, setting))}"
    instead = f"leave it out ({unset} where a preset sets it); it has {', '.join(f'sampler.{name}' for name in has)}"
    if setting == "ddim_steps" and one.calls:
        return f"{of} {one.calls_in_words}, which sampler.ddim_steps={value} cannot change: {instead}"
    return f"{of} has no sampler.{setting}; got {value}: {instead}"
