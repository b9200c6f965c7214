"""How to sample: free at inference, whatever the training was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from policy.diffusion.ddim import check_ddim_steps, check_eta, check_spacing, ddim_timesteps


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Settings of DDIM sampling.

    Attributes:
        ddim_steps: denoising steps K, within 1..num_steps of the checkpoint's schedule.
        eta: 0 deterministic, 1 DDPM.
        spacing: `trailing`, `leading` or `linspace`.
        clip: bound on the normalised estimate of the clean chunk, or None.
        warm_start: begin every chunk but an episode's first from the one before, shifted to now and noised to this
            share of the schedule's timesteps, above 0 and up to 1; None begins from noise alone.

    Raises:
        ValueError: a value outside its range.
    """

    ddim_steps: int = 8
    eta: float = 0.0
    spacing: str = "trailing"
    clip: float | None = 1.0
    warm_start: float | None = None

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

    def check(self, num_steps: int) -> None:
        """Refuse more denoising steps than there are timesteps to visit.

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

    def timesteps(self, num_steps: int) -> Tensor:
        """(ddim_steps,) int64 timesteps of a chunk that begins from noise, see `ddim_timesteps`."""
        return ddim_timesteps(num_steps, self.ddim_steps, self.spacing)

    def warm_timesteps(self, num_steps: int) -> Tensor:
        """(ddim_steps,) int64 timesteps of a chunk that begins from the last one: the lowest share of the schedule."""
        return ddim_timesteps(self._warm_range(num_steps), self.ddim_steps, self.spacing)

    def _warm_range(self, num_steps: int) -> int:
        assert self.warm_start is not None
        return max(1, round(self.warm_start * num_steps))
