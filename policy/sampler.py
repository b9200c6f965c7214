"""How to sample: free at inference, whatever the training was."""

from __future__ import annotations

from dataclasses import dataclass

from policy.ddim import check_ddim_steps, check_eta, check_spacing


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Settings of DDIM sampling.

    Attributes:
        ddim_steps: denoising steps K, within 1..num_steps of the checkpoint's schedule.
        eta: 0 deterministic, 1 DDPM.
        spacing: `trailing`, `leading` or `linspace`.
        clip: bound on the normalised estimate of the clean chunk, or None.

    Raises:
        ValueError: a value outside its range.
    """

    ddim_steps: int = 8
    eta: float = 0.0
    spacing: str = "trailing"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.ddim_steps < 1:
            raise ValueError(f"sampler.ddim_steps must be 1 or more; got {self.ddim_steps}")
        check_eta(self.eta)
        check_spacing(self.spacing)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"sampler.clip must be positive, or null for no clipping; got {self.clip}")

    def check(self, num_steps: int) -> None:
        """Refuse more denoising steps than the schedule has timesteps.

        Args:
            num_steps: T of the checkpoint's schedule.

        Raises:
            ValueError: naming the range.
        """
        check_ddim_steps(self.ddim_steps, num_steps)
