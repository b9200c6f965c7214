"""The configuration of a policy: settings that the user chooses, and shapes that follow from the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policy.common.arguments import check_arguments, check_choice
from policy.common.observations import places_by_key
from policy.diffusion.objective import DEFAULT_OBJECTIVE, OBJECTIVES, check_objective, check_of_diffusion
from policy.diffusion.schedule import check_loss_weighting, check_prediction_type

# Names of the normalisers; `policy.model.normalizer` holds their classes. A command reads them here without torch.
NORMALIZERS = ("limits", "affine")


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """The settings of a policy that a user chooses. Each default is defined here and nowhere else.

    Attributes:
        auxiliary_weight: weight of the auxiliary loss, the mean squared error of privileged observations in half
            ranges, relative to the error of the actions; see `DataShapes.auxiliary_shapes`.
        obs_horizon: number of observations that the policy looks back on, the newest included.
        action_horizon: actions in one chunk; its first action belongs to the newest observation.
        past_actions: actions before the chunk that are denoised with it and then cut off, as other projects' policies
            do; see `denoised_horizon`.
        obs_size: width of the observation embedding.
        differences: pairs of numbers of the state vectors whose differences the policy observes too, as places in the
            vector of all of them, the keys in sorted order; see `Differences`.
        direction_differences: pairs of directions of the state vectors whose angle the policy observes too, as the
            places of their cosines, each of which is followed by its sine.
        end_differences: numbers of the state vectors whose distance from where the demonstrations end the policy
            observes too, as places in the vector of all of them.
        ignored: numbers of the state vectors that the policy does not see, unless in a difference, as such places.
        objective: what the denoiser is trained for: `diffusion`, `flow`, `regression` or `mip`; see
            `policy.diffusion.objective`.
        prediction_type: training target of the denoiser: `epsilon`, `sample` or `v_prediction`; of `diffusion` only.
        loss_weighting: weighting of the timesteps in the loss, `none` or `min_snr`, see `loss_weights`; `min_snr` is of
            `diffusion` only.
        min_snr_gamma: γ of `min_snr`.
        sigma_data: with a number, the network sees the best linear estimate of the chunk in place of the noisy chunk,
            for normalised actions of this standard deviation around 0, see `NoiseSchedule.input_scales`; of `diffusion`
            with `prediction_type=sample` only.
        normalizer: how observations and actions are normalised: `limits` maps the range of the training data onto
            [-1, 1] and bounds what lies far outside it; `affine` is the map alone, see `AffineNormalizer`.
        action_bound: largest magnitude of a normalised action, to which samplers clip; None for actions without a
            bound, which are never clipped. See `clip_at`.
        encoder: `{"name": a key of ENCODERS, **settings}`.
        denoiser: `{"name": a key of DENOISERS, **settings}`.
        schedule: settings of `make_schedule`.

    Raises:
        ValueError: a value outside its range.
    """

    auxiliary_weight: float = 1.0
    obs_horizon: int = 2
    action_horizon: int = 8
    past_actions: int = 0
    obs_size: int = 287
    differences: tuple[tuple[int, int], ...] = ()
    direction_differences: tuple[tuple[int, int], ...] = ()
    end_differences: tuple[int, ...] = ()
    ignored: tuple[int, ...] = ()
    objective: str = DEFAULT_OBJECTIVE
    prediction_type: str = "sample"
    loss_weighting: str = "none"
    min_snr_gamma: float = 5.0
    sigma_data: float | None = None
    normalizer: str = "limits"
    action_bound: float | None = 1.0
    encoder: dict[str, Any] = field(default_factory=lambda: {"name": "state"})
    denoiser: dict[str, Any] = field(default_factory=lambda: {"name": "modulated_mlp"})
    schedule: dict[str, Any] = field(default_factory=lambda: {"num_steps": 100, "beta_schedule": "squaredcos_cap_v2"})

    def __post_init__(self) -> None:
        check_objective(self.objective)
        check_prediction_type(self.prediction_type)
        check_loss_weighting(self.loss_weighting, self.min_snr_gamma)
        check_of_diffusion(
            self.objective,
            prediction_type=(self.prediction_type, PolicySettings.prediction_type),
            loss_weighting=(self.loss_weighting, PolicySettings.loss_weighting),
            sigma_data=(self.sigma_data, PolicySettings.sigma_data),
        )
        if self.sigma_data is not None and self.prediction_type != "sample":
            raise ValueError(
                f"sigma_data={self.sigma_data} hides noise from the network, so that it cannot predict it: use"
                f" prediction_type=sample; got prediction_type={self.prediction_type}"
            )
        check_choice("normalizer", self.normalizer, NORMALIZERS)
        for name, least in (("obs_horizon", 1), ("action_horizon", 1), ("past_actions", 0), ("obs_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more; got {getattr(self, name)}")
        if self.action_bound is not None and not self.action_bound > 0:
            raise ValueError(f"action_bound must be positive, or null for no bound; got {self.action_bound}")
        if not self.auxiliary_weight >= 0:
            raise ValueError(f"auxiliary_weight must be 0 or more; got {self.auxiliary_weight}")

    @property
    def predicts(self) -> str:
        """What the denoiser predicts: `epsilon`, `sample`, `v_prediction` or, of a flow, `velocity`."""
        return OBJECTIVES[self.objective].output or self.prediction_type

    @property
    def denoised_horizon(self) -> int:
        """The number of actions that the network denoises: past ones, and then the chunk that is given out."""
        return self.past_actions + self.action_horizon

    def clip_at(self, clip: float | None) -> float | None:
        """Return the bound on the normalised estimate of the clean chunk.

        Args:
            clip: bound in units of `action_bound`, or None for no clipping.
        """
        return None if clip is None or self.action_bound is None else clip * self.action_bound


@dataclass(frozen=True, kw_only=True)
class DataShapes:
    """The shapes that follow from the demonstrations.

    Attributes:
        observation_shapes: shape of one observation under each key; rank 1 is a vector, rank 3 a uint8 image (height,
            width, channels).
        action_dim: width of one action.
        auxiliary_shapes: shapes of privileged observations, vectors that only demonstrations have. The policy acts
            without them; in training, an auxiliary head learns to predict the newest one from the embedding.

    Raises:
        ValueError: a size below 1, no observation, a shape of another rank, or an auxiliary observation that the policy
            observes itself.
    """

    observation_shapes: dict[str, tuple[int, ...]]
    action_dim: int
    auxiliary_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.action_dim < 1:
            raise ValueError(f"action_dim must be 1 or more; got {self.action_dim}")
        if not self.observation_shapes:
            raise ValueError("a policy needs at least one observation key")
        for key, shape in self.observation_shapes.items():
            if len(shape) not in (1, 3) or min(shape) < 1:
                raise ValueError(
                    f"observation {key!r} must be a vector or an image (height, width, channels); got shape {shape}"
                )
        for key, shape in self.auxiliary_shapes.items():
            if len(shape) != 1 or min(shape) < 1 or key in self.observation_shapes:
                raise ValueError(
                    f"auxiliary {key!r} must be a vector that the policy does not observe itself; got shape {shape}"
                )


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(PolicySettings, DataShapes):
    """Everything needed to rebuild a policy: `PolicySettings` and `DataShapes`, stored as JSON in checkpoints."""

    def __post_init__(self) -> None:
        PolicySettings.__post_init__(self)
        DataShapes.__post_init__(self)
        ignored = places_by_key("ignored", self.ignored, self.observation_shapes)
        left = [key for key, shape in self.observation_shapes.items() if len({*ignored.get(key, ())}) < shape[0]]
        if not (left or self.differences or self.direction_differences or self.end_differences):
            raise ValueError(f"ignored={[*self.ignored]} leaves nothing that the policy sees: leave some of them out")


def config_to_json(config: PolicyConfig) -> dict[str, Any]:
    """Convert a policy's configuration to plain JSON data."""
    return dataclasses.asdict(config)


def config_from_json(data: Mapping[str, Any]) -> PolicyConfig:
    """Build a policy's configuration from JSON data and check every key and type.

    Raises:
        ValueError: an unknown key, or a value of the wrong type or outside its range.
    """
    return PolicyConfig(**check_arguments("policy", PolicyConfig, data))
