"""Preparation of a training run: split the episodes, and initialise the policy, anew or from one that is trained."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from policy.common.observations import Batch, is_image, places_by_key
from policy.common.seeding import derive_seed
from policy.data.corrections import find_corrections
from policy.data.demonstrations import Augment, Demonstrations
from policy.data.exchange import find_exchange
from policy.data.windows import Windows, split_episodes
from policy.diffusion.ddim import check_ddim_steps
from policy.diffusion.objective import OBJECTIVES
from policy.diffusion.schedule import NoiseSchedule
from policy.model.config import PolicyConfig, PolicySettings
from policy.model.diffusion_policy import DiffusionPolicy, schedule_of
from policy.model.encoders.resnet import ResNetEncoder
from policy.model.normalizer import AffineNormalizer, Limits, Normalizer
from policy.training.action_weights import weights_by_spread
from policy.training.corrective_noise import CorrectiveNoise
from policy.training.exchanged_things import ExchangedThings
from policy.training.pretrained import read_weights
from policy.training.settings import TrainSettings
from policy.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run, ready to start or to be resumed.

    Attributes:
        state: everything that training changes.
        training: windows of the training episodes.
        validation: windows of the held-out episodes; may be empty.
        exchanged: shows things elsewhere in batches of training windows; None for none.
        noise: corrective noise for these batches; None for none.
    """

    state: TrainState
    training: Windows
    validation: Windows
    exchanged: ExchangedThings | None = None
    noise: CorrectiveNoise | None = None

    def varied(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return a batch of training windows with things elsewhere and corrective noise, where there is to be any.

        Args:
            batch: from `training`, on the CPU.
            generator: source of what is drawn.
        """
        for change in (self.exchanged, self.noise):
            batch = change(batch, generator) if change else batch
        return batch


def prepare_run(
    config: PolicyConfig,
    demonstrations: Demonstrations,
    settings: TrainSettings,
    *,
    seed: int,
    device: str,
    augment: Augment | None = None,
    init: DiffusionPolicy | None = None,
    teacher: DiffusionPolicy | None = None,
    refit: bool = False,
) -> Run:
    """Split the episodes, and initialise the policy: from the seed and the training episodes, or from a trained one.

    Args:
        config: the policy's configuration.
        demonstrations: all episodes.
        settings: settings of the split and the optimiser.
        seed: seed of the split and of the initial weights.
        device: the device to train on.
        augment: a symmetry of the task. It adds a counterpart to every training window, and none to validation windows.
        init: whose weights and normalisers it starts from; its configuration differs in settings of the loss at most.
        teacher: the policy whose chunks it learns from, and whose normalisers it has; see `Rectified`.
        refit: whether the normalisers of `init` are fitted again, to the training episodes.

    Returns:
        The run at step 0.

    Raises:
        ValueError: rectification with more denoising steps than the schedule has timesteps, or with `sigma_data`; see
            also `DiffusionPolicy` and `split_episodes`.
    """
    torch.manual_seed(derive_seed(seed, 0))  # initialisers draw from torch's global generator
    policy = DiffusionPolicy(config)
    _check_rectification(policy, teacher, settings)
    _check_changes(config, settings)
    if init is None and isinstance(policy.encoder, ResNetEncoder) and policy.encoder.pretrained:
        policy.encoder.load_pretrained(read_weights(policy.encoder.pretrained))
    training, validation = split_windows(
        config,
        demonstrations,
        val_fraction=settings.val_fraction,
        mask_padding=settings.mask_padding,
        seed=seed,
        augment=augment,
    )
    if init is not None:
        policy.load_state_dict(init.state_dict())
    elif teacher is not None:
        _copy_normalizers(policy, teacher)
    if refit or (init is None and teacher is None):
        fit_normalizers(policy, training)
    if settings.action_weights == "spread":
        policy.action_weights = weights_by_spread(training, policy.action_normalizer)
    state = start_training(policy.to(device), settings)
    if teacher is not None:
        state.teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
    return _with_changes(Run(state=state, training=training, validation=validation), settings)


def _check_rectification(policy: DiffusionPolicy, teacher: DiffusionPolicy | None, settings: TrainSettings) -> None:
    """Reject rectification of, or with, a policy that cannot be rectified."""
    if not settings.rectify_steps:
        return
    _check_learns_pairs(policy.config)
    if teacher:
        check_rectifiable(teacher.config.objective)
    if teacher or settings.steps:  # a run that goes on may have its teacher stored
        num_steps = (teacher or policy).schedule.num_steps
        check_ddim_steps(settings.rectify_ddim_steps, num_steps, "train.rectify_ddim_steps")


def _check_changes(config: PolicyConfig, settings: TrainSettings) -> None:
    """Reject changed observations beside privileged ones, which would be as they were."""
    changing = {"exchange": (settings.exchange, "things"), "corrective_noise": (settings.corrective_noise, "the robot")}
    for name, (amount, what) in changing.items():
        if amount and config.auxiliary_shapes:
            raise ValueError(
                f"train.{name} shows {what} elsewhere, and the privileged observations"
                f" {sorted(config.auxiliary_shapes)} would be of where it was: leave one of the two out"
            )


def _with_changes(run: Run, settings: TrainSettings) -> Run:
    """The run with what its settings change in batches of training windows."""
    if not (settings.corrective_noise or settings.exchange):
        return run
    config, training = run.state.policy.config, run.training
    demonstrations, episodes = training.demonstrations, training.episodes
    found = find_corrections(demonstrations, episodes, config.observation_shapes, config.action_horizon)
    marks, exchanged, noise = {"held": found.held}, None, None
    if settings.exchange:
        around = max(config.obs_horizon - 1, config.past_actions), config.action_horizon
        exchange = find_exchange(demonstrations, episodes, found, around)
        exchanged, marks["groups"] = ExchangedThings(exchange, found.widths, settings.exchange), exchange.groups
    if settings.corrective_noise:
        noise = CorrectiveNoise(found, settings.corrective_noise, config.past_actions)
    return dataclasses.replace(run, training=training.marking(**marks), exchanged=exchanged, noise=noise)


def check_settings(settings: PolicySettings, train: TrainSettings) -> NoiseSchedule:
    """Reject settings of a policy that do not fit each other or its training, before any data is there to build it.

    Args:
        settings: settings of the policy.
        train: settings of its training.

    Returns:
        The policy's schedule.

    Raises:
        ValueError: see `schedule_of`, or rectification cannot teach such a policy.
    """
    schedule, _ = schedule_of(settings)
    if train.rectify_steps:
        _check_learns_pairs(settings)
    return schedule


def _check_learns_pairs(settings: PolicySettings) -> None:
    """Reject a policy that rectification cannot teach which chunk belongs to which noise."""
    if settings.sigma_data is not None:
        raise ValueError(
            "rectification teaches a policy which chunk belongs to which noise, and sigma_data="
            f"{settings.sigma_data} hides the noise that sampling begins from: rectify a policy without it, of"
            " which one that has it may be the teacher="
        )
    check_rectifiable(settings.objective)


def check_rectifiable(objective: str) -> None:
    """Reject an objective whose chunks do not depend on a noise, so that there are no pairs to learn from.

    Raises:
        ValueError: the objective has a fixed number of calls.
    """
    if OBJECTIVES[objective].calls is not None:
        raise ValueError(
            f"rectification learns pairs of a noise and a chunk, and a policy with objective={objective} has no noise:"
            " leave train.rectify_steps out, or use objective=diffusion or objective=flow"
        )


def split_windows(
    config: PolicyConfig,
    demonstrations: Demonstrations,
    *,
    val_fraction: float,
    mask_padding: bool,
    seed: int,
    augment: Augment | None = None,
) -> tuple[Windows, Windows]:
    """Split the episodes as a training does, and return the windows of the training and of the held-out episodes.

    Args:
        config: the policy's configuration.
        demonstrations: all episodes.
        val_fraction: see `split_episodes`.
        mask_padding: see `Windows`.
        seed: the run's seed.
        augment: see `prepare_run`.

    Returns:
        The windows of both; those of held-out episodes may be none.

    Raises:
        ValueError: see `split_episodes`.
    """
    layout: dict[str, Any] = {
        "obs_horizon": config.obs_horizon,
        "action_horizon": config.action_horizon,
        "past_actions": config.past_actions,
        "mask_padding": mask_padding,
    }
    train_episodes, val_episodes = split_episodes(demonstrations.originals, val_fraction, seed, demonstrations.held_out)
    training = Windows(demonstrations, train_episodes, augment=augment, **layout)
    return training, Windows(demonstrations, val_episodes, **layout)


def start_training(policy: DiffusionPolicy, settings: TrainSettings) -> TrainState:
    """Make the training state at step 0.

    Args:
        policy: the policy to train in place; its normalisers are fitted.
        settings: settings of the optimiser.

    Returns:
        The state.
    """
    matrices = [p for p in policy.parameters() if p.ndim > 1]
    vectors = [p for p in policy.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        fused=True,
    )
    ema = copy.deepcopy(policy).eval().requires_grad_(False)
    return TrainState(policy=policy, ema=ema, optimizer=optimizer)


def fit_normalizers(policy: DiffusionPolicy, training: Windows) -> None:
    """Fit the policy's normalisers on the training episodes alone.

    Numbers that the policy ignores are normalised as constant ones are, to 0.

    Args:
        policy: its normalisers are changed in place.
        training: the training windows.
    """
    by_key = {**policy.observation_normalizers, **policy.auxiliary_normalizers}
    by_key = {key: one for key, one in by_key.items() if not is_image(policy.config.observation_shapes.get(key, ()))}
    limits = {key: Limits() for key in ("actions", *by_key)}
    apart = Limits()
    if policy.differences is not None:
        policy.differences.fit_ends(_tensors(training.last_observations(policy.differences.keys)))
    for observations, actions in training.blocks():
        for key, found in limits.items():
            found.update(actions if key == "actions" else observations[key])
        if policy.differences is not None:
            vectors = {key: observations[key] for key in policy.differences.keys}
            apart.update(policy.differences.raw(_tensors(vectors)).numpy())
    if policy.differences is not None:
        policy.differences.fit(*apart)
    policy.action_normalizer.fit(*limits.pop("actions"))
    ignored = places_by_key("ignored", policy.config.ignored, policy.config.observation_shapes)
    for key, (low, high) in limits.items():
        normalizer = by_key[key]
        assert isinstance(normalizer, Normalizer | AffineNormalizer)
        unseen = ignored.get(key, [])
        high[unseen] = low[unseen]
        normalizer.fit(low, high)


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """Copy arrays, which may be read-only, into tensors."""
    return {key: torch.tensor(values) for key, values in arrays.items()}


def _copy_normalizers(policy: DiffusionPolicy, teacher: DiffusionPolicy) -> None:
    """Normalise observations and actions as the teacher does, whose chunks may lie anywhere in its range."""
    policy.action_normalizer.load_state_dict(teacher.action_normalizer.state_dict())
    policy.observation_normalizers.load_state_dict(teacher.observation_normalizers.state_dict())
    if policy.differences is not None and teacher.differences is not None:
        policy.differences.load_state_dict(teacher.differences.state_dict())
