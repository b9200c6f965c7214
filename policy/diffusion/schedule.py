"""The forward diffusion process: noise levels, conversions between prediction types, and weights of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from policy.common.arguments import check_choice

PredictionType = Literal["epsilon", "sample", "v_prediction"]
LossWeighting = Literal["none", "min_snr"]

PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
LOSS_WEIGHTINGS: tuple[str, ...] = get_args(LossWeighting)

# Least and largest `sigma_data`: normalised actions lie within -1..1, and beyond these all noise vanishes, or none.
SIGMA_DATA = (0.01, 10.0)
# Largest allowed ᾱ at the last timestep: above it, a standard normal approximates the fully noised data poorly.
MAX_FINAL_ALPHA_CUMPROD = 0.01


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise levels of the forward process q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I).

    All levels are computed in float64 from the betas, and cast to the dtype of the data only where they are combined
    with it: a float32 cumulative product over 1000 timesteps loses digits where √(1 - ᾱ) is small.

    Attributes:
        betas: (num_steps,) float64, each in (0, 1); the last may be 1, which leaves no signal, ᾱ = 0.
        sigma_data: standard deviation that the data is taken to have for `input_scales`, around 0; None for scales of
            1. The methods are of x_t itself, without the scale.
        alphas_cumprod: (num_steps,) float64, ᾱ_t, derived from the betas.

    Raises:
        ValueError: `betas` is not a vector, is empty, or holds a value outside its range; `sigma_data` is outside its
            range, or a timestep has no signal that it could scale.
    """

    betas: Tensor
    sigma_data: float | None = None
    alphas_cumprod: Tensor = field(init=False)

    def __post_init__(self) -> None:
        betas = self.betas
        inside = (
            betas.ndim == 1 and len(betas) > 0 and bool(((betas > 0) & (betas <= 1)).all() & (betas[:-1] < 1).all())
        )
        if not inside:
            raise ValueError(
                f"betas must be a non-empty vector with every value inside (0, 1), the last up to 1; got {betas}"
            )
        object.__setattr__(self, "betas", betas.detach().to("cpu", torch.float64))
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1.0 - self.betas, dim=0))
        if self.sigma_data is None:
            return
        low, high = SIGMA_DATA
        if not low <= self.sigma_data <= high:
            raise ValueError(f"sigma_data must be within {low}..{high}, or null; got {self.sigma_data}")
        if bool((self.alphas_cumprod == 0).any()):
            raise ValueError(
                "sigma_data needs signal at every timestep, and with zero_terminal_snr the last one has none: leave one"
                " of the two out"
            )

    @property
    def num_steps(self) -> int:
        """T, the number of timesteps; timesteps run from 0 (least noise) to T - 1."""
        return len(self.betas)

    @property
    def alphas(self) -> Tensor:
        """(num_steps,) float64, 1 - betas."""
        return 1.0 - self.betas

    @property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """(num_steps,) float64, the signal's factor √ᾱ."""
        return self.alphas_cumprod.sqrt()

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """(num_steps,) float64, the noise's factor √(1 - ᾱ)."""
        return (1.0 - self.alphas_cumprod).sqrt()

    @property
    def input_scales(self) -> Tensor:
        """(num_steps,) float64, what x_t is multiplied by before the network sees it.

        With σ = `sigma_data` it is √ᾱ σ² / (ᾱ σ² + 1 - ᾱ). For data with this standard deviation around 0, the product
        is the best linear estimate of x_0, which EDM adds to its network's output (Karras et al. 2022, c_skip of
        table 1): towards the last timestep, where x_t is nothing but noise, the network sees almost 0.
        """
        if self.sigma_data is None:
            return torch.ones_like(self.alphas_cumprod)
        variance = self.sigma_data**2
        return self.sqrt_alphas_cumprod * variance / (self.alphas_cumprod * variance + 1.0 - self.alphas_cumprod)

    def signal_and_noise(self, timestep: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ and √(1 - ᾱ) at a timestep, shaped to broadcast against `like`.

        Args:
            timestep: an int, or (B,) int64 with one timestep per row of `like`; -1 is the clean end, ᾱ = 1.
            like: (B, ...) the tensor that they will multiply; it gives dtype and device.

        Returns:
            Two tensors, each () or (B, 1, ..., 1), of `like`'s dtype and device.

        Raises:
            ValueError: a timestep outside -1..num_steps - 1.
        """
        alpha_cumprod = self._alpha_cumprod(timestep)
        shape = (*alpha_cumprod.shape, *([1] * (like.ndim - 1))) if alpha_cumprod.ndim else ()
        signal = alpha_cumprod.sqrt().reshape(shape).to(like)
        noise = (1.0 - alpha_cumprod).sqrt().reshape(shape).to(like)
        return signal, noise

    def _alpha_cumprod(self, timestep: Tensor | int) -> Tensor:
        index = torch.as_tensor(timestep, dtype=torch.int64, device="cpu")
        if bool(((index < -1) | (index >= self.num_steps)).any()):
            raise ValueError(f"timestep must be within -1..{self.num_steps - 1}; got {timestep}")
        return torch.where(index < 0, 1.0, self.alphas_cumprod[index])

    def add_noise(self, x_0: Tensor, noise: Tensor, timestep: Tensor | int) -> Tensor:
        """Draw x_t from q(x_t | x_0): √ᾱ_t x_0 + √(1 - ᾱ_t) ε (DDPM, Ho et al. 2020, eq. 4).

        Args:
            x_0: (B, ...) clean data.
            noise: (B, ...) ε, standard normal.
            timestep: an int or (B,) int64.

        Returns:
            (B, ...) noised data.

        Raises:
            ValueError: see `signal_and_noise`.
        """
        signal, sigma = self.signal_and_noise(timestep, x_0)
        return signal * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, timestep: Tensor | int, prediction_type: str) -> Tensor:
        """Return the regression target of the network for a noised example.

        Args:
            x_0: (B, ...) clean data.
            noise: (B, ...) the ε that was added.
            timestep: an int or (B,) int64.
            prediction_type: `epsilon`, `sample` or `v_prediction` (v = √ᾱ ε - √(1 - ᾱ) x_0, Salimans and Ho 2022).

        Returns:
            (B, ...) the regression target.

        Raises:
            ValueError: an unknown prediction type; see also `signal_and_noise`.
        """
        check_prediction_type(prediction_type)
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_0
        signal, sigma = self.signal_and_noise(timestep, x_0)
        return signal * noise - sigma * x_0

    def to_sample(self, predicted: Tensor, x_t: Tensor, timestep: Tensor | int, prediction_type: str) -> Tensor:
        """Convert a network's output to its estimate of x_0, for any prediction type.

        Args:
            predicted: (B, ...) network output.
            x_t: (B, ...) the noised data that the network was given.
            timestep: an int or (B,) int64.
            prediction_type: `epsilon`, `sample` or `v_prediction`.

        Returns:
            (B, ...) the estimate of x_0.

        Raises:
            ValueError: an unknown prediction type, or `epsilon` at a timestep without signal, ᾱ = 0; see also
                `signal_and_noise`.
        """
        check_prediction_type(prediction_type)
        if prediction_type == "sample":
            return predicted
        check_signal(self._alpha_cumprod(timestep), prediction_type)
        signal, sigma = self.signal_and_noise(timestep, x_t)
        if prediction_type == "epsilon":
            return (x_t - sigma * predicted) / signal
        return signal * x_t - sigma * predicted

    def to_epsilon(self, x_0: Tensor, x_t: Tensor, timestep: Tensor | int) -> Tensor:
        """Return the ε that leads from x_0 to x_t: (x_t - √ᾱ_t x_0) / √(1 - ᾱ_t).

        Args:
            x_0: (B, ...) clean data, or an estimate of it.
            x_t: (B, ...) noised data.
            timestep: an int or (B,) int64, 0 or more.

        Returns:
            (B, ...) the implied noise.

        Raises:
            ValueError: see `signal_and_noise`.
        """
        signal, sigma = self.signal_and_noise(timestep, x_t)
        return (x_t - signal * x_0) / sigma


def check_prediction_type(prediction_type: str) -> None:
    """Reject an unknown prediction type.

    Raises:
        ValueError: an unknown name; the message lists the allowed ones.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)


def check_signal(alpha_cumprod: Tensor, prediction_type: str) -> None:
    """Reject ε prediction at timesteps without signal: at ᾱ = 0, x_t is ε and does not determine x_0.

    Args:
        alpha_cumprod: ᾱ of the timesteps to check, of any shape.
        prediction_type: type of the network's output at these timesteps.

    Raises:
        ValueError: `epsilon`, and a timestep with ᾱ = 0.
    """
    if prediction_type == "epsilon" and bool((alpha_cumprod == 0).any()):
        raise ValueError(
            "prediction_type=epsilon cannot be sampled from a timestep without signal, such as the first one with"
            " zero_terminal_snr: the noise there does not determine the data; use sample or v_prediction"
        )


def check_loss_weighting(loss_weighting: str, gamma: float) -> None:
    """Reject an unknown weighting or an invalid gamma.

    Raises:
        ValueError: an unknown name, or a gamma that is not positive and finite.
    """
    check_choice("loss_weighting", loss_weighting, LOSS_WEIGHTINGS)
    if not 0 < gamma < math.inf:
        raise ValueError(f"min_snr_gamma must be a number above 0; got {gamma}")


def loss_weights(schedule: NoiseSchedule, prediction_type: str, loss_weighting: str, gamma: float) -> Tensor:
    """Return the weight of the squared error at each timestep in the loss.

    `min_snr` (Hang et al. 2023, sec. 3.4) weights the squared error of x_0 by min(SNR, γ), with SNR = ᾱ / (1 - ᾱ), for
    every prediction type. An error of ε is √SNR times the error of x_0 that it causes, and an error of v √(SNR + 1)
    times. The weights are therefore

        sample        min(SNR, γ)
        epsilon       min(SNR, γ) / SNR
        v_prediction  min(SNR, γ) / (SNR + 1)

    Args:
        schedule: the noise schedule, which gives ᾱ.
        prediction_type: `epsilon`, `sample` or `v_prediction`.
        loss_weighting: `none` (1 everywhere) or `min_snr`.
        gamma: γ, above 0.

    Returns:
        (num_steps,) float64 weights.

    Raises:
        ValueError: an unknown name, γ out of range, or `min_snr` with a schedule whose last timestep has no signal: its
            weight would be 0, although sampling starts there.
    """
    check_prediction_type(prediction_type)
    check_loss_weighting(loss_weighting, gamma)
    if loss_weighting == "none":
        return torch.ones_like(schedule.alphas_cumprod)
    snr = schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod)
    if bool((snr == 0).any()):
        raise ValueError(
            "loss_weighting=min_snr gives no weight to the last timestep with zero_terminal_snr, where sampling starts:"
            " use loss_weighting=none, or a schedule without zero_terminal_snr"
        )
    per_error = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1.0}[prediction_type]
    return snr.clamp(max=gamma) / per_error


def _linear_betas(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    # The endpoints 1e-4..0.02 belong to T = 1000. With fewer timesteps the same endpoints leave a strong signal
    # at T (ᾱ_T = 0.36 at T = 100), so that sampling would start from a distribution the network never saw.
    # Scaling both by 1000 / T keeps the sum of the betas, and with it ᾱ_T, about the same (Improved DDPM, sec. 3.2).
    scale = 1000 / num_steps
    betas = torch.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=torch.float64, device="cpu")
    return betas.clamp(max=0.999)


def _squared_cosine_betas(num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    # Improved DDPM (Nichol and Dhariwal 2021), eq. 17, with their cap of 0.999. The endpoints are not used.
    def signal(fraction: Tensor) -> Tensor:
        return torch.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    edges = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    return (1.0 - signal(edges[1:]) / signal(edges[:-1])).clamp(max=0.999)


_BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear_betas,
    "squaredcos_cap_v2": _squared_cosine_betas,
}


def _without_terminal_signal(betas: Tensor) -> Tensor:
    """Return betas whose √ᾱ is shifted to end at 0 and scaled to start as before (Lin et al. 2023, alg. 1)."""
    signal = torch.cumprod(1.0 - betas, dim=0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = signal**2
    return 1.0 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def make_schedule(
    *,
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Precompute a noise schedule.

    The linear endpoints refer to 1000 timesteps. For another `num_steps` they are scaled by 1000 / `num_steps` (each
    beta at most 0.999), so that fewer timesteps still end in almost pure noise.

    Args:
        num_steps: T, the number of timesteps, 1 or more.
        beta_start: first beta of the linear schedule, at T = 1000.
        beta_end: last beta of the linear schedule, at T = 1000.
        beta_schedule: `linear` (DDPM) or `squaredcos_cap_v2` (Improved DDPM, eq. 17; it ignores the endpoints).
        zero_terminal_snr: rescale the betas so that no signal is left at T - 1, ᾱ = 0; training then sees the pure
            noise that sampling starts from (Lin et al. 2023, alg. 1). Not for networks that predict ε.

    Returns:
        The schedule, in float64.

    Raises:
        ValueError: an unknown `beta_schedule`, `num_steps` below 1, endpoints that violate 0 < start <= end < 1, a
            single timestep with `zero_terminal_snr`, or a schedule whose final ᾱ exceeds 0.01 (sampling starts from a
            standard normal, which would not match the fully noised data).

    Example:
        >>> schedule = make_schedule(num_steps=100, beta_schedule="squaredcos_cap_v2")
        >>> schedule.num_steps, schedule.alphas_cumprod[-1].item() < 1e-4
        (100, True)
    """
    check_choice("beta_schedule", beta_schedule, _BETAS)
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of 1 or more; got {num_steps!r}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1; got {beta_start} and {beta_end}")
    if zero_terminal_snr and num_steps == 1:
        raise ValueError(
            "zero_terminal_snr needs num_steps of 2 or more: a single timestep would contain no signal to learn from"
        )
    betas = _BETAS[beta_schedule](num_steps, beta_start, beta_end)
    schedule = NoiseSchedule(_without_terminal_signal(betas) if zero_terminal_snr else betas)
    final = schedule.alphas_cumprod[-1].item()
    if final > MAX_FINAL_ALPHA_CUMPROD:
        raise ValueError(
            f"this schedule ends at ᾱ = {final:.3f}, but sampling starts from pure noise and needs"
            f" {MAX_FINAL_ALPHA_CUMPROD} or less: raise beta_end (now {beta_end}) or num_steps (now {num_steps})"
        )
    return schedule
