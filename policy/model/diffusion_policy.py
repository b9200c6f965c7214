"""The diffusion policy: it maps an observation history to an action chunk, independent of environments and queues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policy.common.arguments import check_arguments
from policy.common.observations import Batch, Observations, check_observations, is_image
from policy.common.registry import construct
from policy.diffusion.coefficients import reverse_process
from policy.diffusion.ddim import Generators, check_ddim_steps, check_generators, randn_like
from policy.diffusion.objective import OBJECTIVES, Objective
from policy.diffusion.sampler import Sampler
from policy.diffusion.schedule import NoiseSchedule, check_signal, loss_weights, make_schedule
from policy.model.by_key import ModulesByKey
from policy.model.config import PolicyConfig, PolicySettings
from policy.model.denoisers import DENOISERS
from policy.model.denoisers.denoiser import check_denoiser
from policy.model.differences import DIFFERENCES, Differences
from policy.model.encoders import ENCODERS
from policy.model.normalizer import NORMALIZERS, AffineNormalizer, Normalizer
from policy.model.storage import SharedPolicy


class DiffusionPolicy(nn.Module, SharedPolicy):
    """Encode the last observations into one embedding, and sample an action chunk, as the policy's objective does.

    Args:
        config: sizes and parts of the policy.

    Raises:
        ValueError: a part that does not exist, a setting that a part does not take, or parts that are incompatible.

    Example:
        >>> import torch
        >>> from policy import DiffusionPolicy, PolicyConfig
        >>> policy = DiffusionPolicy(PolicyConfig(observation_shapes={"state": (5,)}, action_dim=2))
        >>> generator = torch.Generator().manual_seed(0)
        >>> policy.sample_actions({"state": torch.zeros(3, 2, 5)}, ddim_steps=4, generator=generator).shape
        torch.Size([3, 8, 2])
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule, self.loss_weights = schedule_of(config)
        normalizer = NORMALIZERS[config.normalizer]
        vectors: dict[str, Normalizer | AffineNormalizer] = {
            key: normalizer(shape) for key, shape in config.observation_shapes.items() if not is_image(shape)
        }
        self.observation_normalizers = ModulesByKey({**vectors, **_image_normalizers(config)})
        self.action_normalizer = normalizer((config.action_dim,))
        self.action_weights = torch.ones(config.action_dim)  # in the loss; training may set others
        self.auxiliary_normalizers = ModulesByKey(
            {key: normalizer(shape) for key, shape in config.auxiliary_shapes.items()}
        )
        self.differences = _differences(config)
        self.encoder = construct(
            ENCODERS,
            config.encoder,
            shapes=_encoded_shapes(config, self.differences),
            obs_horizon=config.obs_horizon,
            obs_size=config.obs_size,
        )
        self.denoiser = construct(
            DENOISERS,
            config.denoiser,
            obs_size=config.obs_size,
            action_dim=config.action_dim,
            action_horizon=config.denoised_horizon,
            num_steps=self.schedule.num_steps,
        )
        check_denoiser(config.denoiser["name"], self.denoiser)
        self.denoiser.check_past_actions(config.past_actions)
        # Built last, so that the initial weights of the other parts are the same with and without auxiliary heads.
        self.auxiliary_heads = ModulesByKey(
            {key: nn.Linear(config.obs_size, shape[0]) for key, shape in config.auxiliary_shapes.items()}
        )

    @property
    def objective(self) -> Objective:
        """What the network is trained for."""
        return OBJECTIVES[self.config.objective]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.action_normalizer.center.device

    @property
    def num_parameters(self) -> int:
        """The number of its trainable weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def settled(self, sampler: Sampler) -> Sampler:
        """Return a sampler with the settings that this policy's objective fixes.

        Raises:
            ValueError: a setting that the objective does not have, or more denoising steps than the schedule allows.
        """
        return sampler.settled(self.config.objective, self.schedule.num_steps)

    def embed(self, observations: Observations) -> Tensor:
        """Normalise and encode an observation history.

        Args:
            observations: (B, obs_horizon, *shape) under each key, in the data's units.

        Returns:
            (B, obs_size) embedding.

        Raises:
            ValueError: missing or unknown keys, or shapes other than the configured ones.
        """
        check_observations(observations, self.config.observation_shapes, (None, self.config.obs_horizon))
        encoded = {key: self._normalized(key, value) for key, value in observations.items()}
        if self.differences is not None:
            vectors = {key: observations[key].to(self.device, torch.float32) for key in self.differences.keys}
            encoded[DIFFERENCES] = self.differences(vectors)
        return self.encoder(encoded)

    def _normalized(self, key: str, value: Tensor) -> Tensor:
        on_device = value.to(self.device)  # before the conversion to float: images are transferred as bytes
        if key in self.observation_normalizers:
            return self.observation_normalizers[key].normalize(on_device.to(torch.float32))
        # The arithmetic is done in place on one copy: for a large batch of images, allocating memory for each operation
        # costs more than the operation.
        return on_device.to(torch.float32, copy=True).div_(127.5).sub_(1)

    def loss(self, batch: Batch, generator: torch.Generator | None = None, timesteps_per_chunk: int = 1) -> Tensor:
        """Compute the mean squared error of the denoiser on one batch (for diffusion: DDPM, eq. 14).

        The errors are weighted by timestep, and padding is left out. `auxiliary_loss` is added.

        Args:
            batch: see `Batch`.
            generator: source of timesteps and noise, on the CPU.
            timesteps_per_chunk: number of timesteps sampled for each chunk, unless the objective fixes them; its
                observations are encoded only once.

        Returns:
            () loss.

        Raises:
            ValueError: see `embed` and `squared_errors`.
        """
        chunks = len(batch["actions"])
        timestep = self.objective.training_timesteps(self.schedule.num_steps, chunks, timesteps_per_chunk, generator)
        shape = (len(timestep), self.config.denoised_horizon, self.config.action_dim)
        noise = torch.randn(shape, generator=generator)
        embedding = self.embed(observed(self.config, batch["observations"]))
        errors = self.squared_errors(batch, embedding, timestep, noise)
        times = len(timestep) // max(chunks, 1)
        mask = _repeated(batch["mask"], times).to(errors)
        counted = times * batch["counted"] if "counted" in batch else mask.sum().clamp(min=1)
        return (errors * mask).sum() / counted + self.auxiliary_loss(batch, embedding)

    def auxiliary_loss(self, batch: Batch, embedding: Tensor) -> Tensor:
        """Compute the weighted mean squared error of the auxiliary heads; it is 0 without auxiliary observations.

        Args:
            batch: B training samples, see `Batch`.
            embedding: (B, obs_size) embedding of their observations.

        Returns:
            () loss.
        """
        loss = embedding.new_zeros(())
        for key, head in self.auxiliary_heads.items():
            newest = batch["observations"][key][:, -1].to(self.device, torch.float32)
            told = head(embedding) - self.auxiliary_normalizers[key].normalize(newest)
            loss = loss + self.config.auxiliary_weight * told.square().mean()
        return loss

    def squared_errors(self, batch: Batch, embedding: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Compute the squared error of the denoiser at each action, padding included.

        It is weighted by timestep and by the action's dimensions.

        Args:
            batch: B training samples, see `Batch`.
            embedding: (B, obs_size) embedding of their observations.
            timestep: (N,) int64 on the CPU, N a multiple of B; the timesteps of one chunk follow one another.
            noise: (N, denoised_horizon, action_dim) standard normal, one sample for each timestep.

        Returns:
            (N, denoised_horizon) errors.

        Raises:
            ValueError: actions, mask or noise of another shape, or N not a multiple of B.
        """
        rows, chunk = len(batch["actions"]), (self.config.denoised_horizon, self.config.action_dim)
        given = (
            ("actions", batch["actions"], (rows, *chunk)),
            ("mask", batch["mask"], (rows, chunk[0])),
            ("noise", noise, (len(timestep), *chunk)),
        )
        for name, value, expected in given:
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}; got {tuple(value.shape)}")
        times, left = divmod(len(timestep), max(rows, 1))
        if left:
            raise ValueError(f"the number of timesteps must be a multiple of the {rows} chunks; got {len(timestep)}")
        x_0 = self.action_normalizer.normalize(_repeated(batch["actions"].to(self.device, torch.float32), times))
        noise = noise.to(self.device)
        target_of, levels = self.objective.target, self.objective.levels(self.schedule, timestep)
        signal, sigma = (level[:, None, None].to(x_0) for level in levels)
        x_t = signal * x_0 + sigma * noise
        target = (
            self.schedule.target(x_0, noise, timestep, self.config.prediction_type)
            if target_of is None
            else target_of(x_0, noise)
        )
        predicted = self.denoiser(x_t, timestep.to(self.device), _repeated(embedding, times))
        errors = ((predicted - target).square() * self.action_weights.to(target)).mean(dim=2)
        return self.loss_weights[timestep, None].to(errors) * errors

    @torch.no_grad()
    def sample_actions(
        self,
        observations: Mapping[str, Tensor | NDArray[Any]],
        *,
        ddim_steps: int = Sampler.ddim_steps,
        eta: float = Sampler.eta,
        spacing: str = Sampler.spacing,
        clip: float | None = Sampler.clip,
        generator: Generators | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample one action chunk per row.

        Args:
            observations: (B, obs_horizon, *shape) under each key, in the data's units; tensors or arrays.
            ddim_steps: denoising steps K, within 1..num_steps.
            eta: 0 deterministic given the noise, 1 DDPM.
            spacing: timestep spacing, see `ddim_timesteps`.
            clip: bound on the normalised estimate of the clean chunk, in units of `action_bound`, or None.
            generator: source of the initial noise (unless it is given) and of the noise added at each step: one
                generator, or one per row.
            noise: (B, denoised_horizon, action_dim) standard normal starting point.

        Returns:
            (B, action_horizon, action_dim) float32 in the data's units; the first action is for the newest observation.

        Raises:
            ValueError: a setting out of its range or that the policy's objective does not have, see `embed`, a sequence
                of generators whose length is not B, or noise of another shape.
        """
        if self.objective.calls is None:
            check_ddim_steps(ddim_steps, self.schedule.num_steps)
        sampler = self.settled(Sampler(ddim_steps=ddim_steps, eta=eta, spacing=spacing, clip=clip))
        course = sampler.cold_course(self.schedule, self.config.objective)
        embedding = self.embed({key: torch.as_tensor(value) for key, value in observations.items()})
        shape = (len(embedding), self.config.denoised_horizon, self.config.action_dim)
        check_generators(generator, len(embedding))
        if noise is None:
            on = generator.device if isinstance(generator, torch.Generator) else "cpu"
            noise = randn_like(torch.empty(shape, device=on), generator)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {shape}; got {tuple(noise.shape)}")
        noise = noise.to(self.device)
        return self.denoise(
            embedding,
            course.noise * noise,
            course.timesteps.tolist(),
            sampler.table(self.schedule, course, self.config.predicts, self.config.objective).to(noise),
            clip=sampler.clip,
            step_noise=(lambda step: randn_like(noise, generator)) if sampler.eta > 0 else None,
        )

    def denoise(
        self,
        embedding: Tensor,
        start: Tensor,
        timesteps: Sequence[int],
        table: Tensor,
        *,
        clip: float | None,
        step_noise: Callable[[int], Tensor] | None,
        known: Tensor | None = None,
        keep: Tensor | float = 0.0,
    ) -> Tensor:
        """Take all steps from a starting point to action chunks, one call of the denoiser each.

        Args:
            embedding: (B, obs_size) embedding of the observations.
            start: (B, denoised_horizon, action_dim) starting point.
            timesteps: K timesteps to visit.
            table: (K, 5) or (K, 6) coefficients of the solver, see `Sampler.table`, of `start`'s dtype and device.
            clip: see `sample_actions`.
            step_noise: see `reverse_process`.
            known: (B, denoised_horizon, action_dim) known actions, normalised; see `take_step`.
            keep: see `take_step`.

        Returns:
            (B, action_horizon, action_dim) float32 in the data's units.
        """
        chunk = reverse_process(
            lambda step, x: self.denoiser(x, torch.full((len(x),), timesteps[step], device=x.device), embedding),
            start,
            table,
            predicts_clean=self.config.predicts == "sample",
            clip=self.config.clip_at(clip),
            step_noise=step_noise,
            known=known,
            keep=keep,
        )
        return self.action_normalizer.unnormalize(chunk[:, self.config.past_actions :])


def _differences(config: PolicyConfig) -> Differences | None:
    if not (config.differences or config.direction_differences or config.end_differences):
        return None
    return Differences(
        config.differences, config.direction_differences, config.observation_shapes, config.end_differences
    )


def schedule_of(settings: PolicySettings) -> tuple[NoiseSchedule, Tensor]:
    """Build the noise schedule of a policy, and the weight of each of its timesteps in the loss.

    With fixed calls, the weights make a sum of the mean over the calls.

    Args:
        settings: the settings of the policy.

    Returns:
        The schedule, and (num_steps,) float64.

    Raises:
        ValueError: settings of the schedule that do not fit what the network sees, predicts or weighs.
    """
    betas = make_schedule(**check_arguments("schedule", make_schedule, settings.schedule)).betas
    schedule = NoiseSchedule(betas, settings.sigma_data)
    check_signal(schedule.alphas_cumprod, settings.prediction_type)
    calls = OBJECTIVES[settings.objective].calls
    if calls is not None:
        return schedule, torch.full((schedule.num_steps,), float(len(calls)), dtype=torch.float64)
    return schedule, loss_weights(schedule, settings.prediction_type, settings.loss_weighting, settings.min_snr_gamma)


def _encoded_shapes(config: PolicyConfig, differences: Differences | None) -> dict[str, tuple[int, ...]]:
    """The shapes that the encoder sees: those of the observations, and of their differences if there are any."""
    if differences is None:
        return config.observation_shapes
    if DIFFERENCES in config.observation_shapes:
        raise ValueError(
            f"the observation {DIFFERENCES!r} has the name of what the setting differences adds: give it another name"
            " with dataset.observation_keys={...}, or leave differences out"
        )
    return {**config.observation_shapes, DIFFERENCES: differences.shape}


def _image_normalizers(config: PolicyConfig) -> dict[str, AffineNormalizer]:
    """Normalisers of the images' channels: the affine ones start as [0, 255] to [-1, 1]; for `limits` this is fixed."""
    if config.normalizer != "affine":
        return {}
    images = {key: shape for key, shape in config.observation_shapes.items() if is_image(shape)}
    return {key: AffineNormalizer(shape[2:], center=127.5, gain=1 / 127.5) for key, shape in images.items()}


def _repeated(rows: Tensor, times: int) -> Tensor:
    """Repeat each row `times` times, the copies next to each other."""
    return rows.repeat_interleave(times, dim=0) if times > 1 else rows


def zero_observations(config: PolicyConfig, rows: int) -> dict[str, Tensor]:
    """Build observations for tracing or timing a network, where only shapes and types matter.

    Args:
        config: the policy's configuration.
        rows: the batch size B.

    Returns:
        (B, obs_horizon, *shape) zeros under each key: uint8 for an image, else float32.
    """
    return {
        key: torch.zeros(rows, config.obs_horizon, *shape, dtype=torch.uint8 if is_image(shape) else torch.float32)
        for key, shape in config.observation_shapes.items()
    }


def observed(config: PolicyConfig, observations: Observations) -> dict[str, Tensor]:
    """Return the observations without the auxiliary ones, which a policy never sees."""
    return {key: value for key, value in observations.items() if key not in config.auxiliary_shapes}
