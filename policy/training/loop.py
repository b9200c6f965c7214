"""Behaviour cloning: the training loop, its optimiser and its weight average."""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from policy.common.progress import progress
from policy.common.seeding import derive_generator, derive_seed
from policy.data.demonstrations import Augment, Demonstrations
from policy.data.windows import Windows, split_episodes
from policy.diffusion.ddim import check_ddim_steps
from policy.inference import SamplerProgram
from policy.model.diffusion_policy import Batch, DiffusionPolicy, PolicyConfig
from policy.model.normalizer import Limits, Normalizer
from policy.training.rectification import pairs, rectification_loss, start_rectification
from policy.training.state import TrainState

VALIDATION_WINDOWS = 1024
# Batches gathered ahead of the trainer, so that it does not wait for page faults.
BATCHES_AHEAD = 2
# The windows of a training step, and (2,) on its device: the loss and the gradient's norm.
Outcome = tuple[NDArray[np.int64], torch.Tensor]
# So many skipped steps in a row are no accident: the weights have gone where no batch helps.
MOST_SKIPPED_IN_A_ROW = 100


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of behaviour cloning.

    Attributes:
        steps: optimiser steps on the demonstrations.
        rectify_steps: optimiser steps after these on the policy's own chunks, with a warm-up and a cosine of their own,
            see `policy.training.rectification`; 0 for none.
        rectify_ddim_steps: denoising steps with which those chunks are made.
        batch_size: windows in a step.
        timesteps_per_chunk: at how many timesteps a step looks at each window's chunk. Its observations are encoded
            once: where that is what costs, with images, more timesteps are nearly free.
        learning_rate: peak, reached after the warm-up, then decayed to zero along a cosine.
        weight_decay: of AdamW, on weight matrices only.
        warmup_steps: linear warm-up.
        grad_clip: largest norm of the gradient.
        ema_decay: largest decay of the weight average; early on it is (1 + n) / (10 + n) at update n.
        mask_padding: leave the actions repeated after an episode's end out of the loss.
        val_fraction: share of episodes held out for the validation loss, where the data's file does not set some aside.
        log_every: steps between log entries.
        val_every: steps between validation losses.
        save_every: steps between checkpoints; there is one after each short rollout, too.
        keep_last: checkpoints kept besides the best, see `policy.checkpoint`.
        rollout_every: steps between short rollouts, where the environment is known; 0 for none.
        rollout_episodes: episodes in each.
        precision: `bfloat16` computes the loss and its gradient in it where that is safe (`torch.autocast`); weights,
            optimiser, average and validation stay float32.
        on_bad_loss: what a step does whose loss or gradient is not finite. It never reaches the weights; `stop` ends
            the run once it is seen, `skip` goes on without the step.
    """

    steps: int = 8_000
    rectify_steps: int = 0
    rectify_ddim_steps: int = 8
    batch_size: int = 256
    timesteps_per_chunk: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 300
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    mask_padding: bool = True
    val_fraction: float = 0.04
    log_every: int = 50
    val_every: int = 500
    save_every: int = 1_000
    keep_last: int = 3
    rollout_every: int = 2_000
    rollout_episodes: int = 10
    precision: Literal["float32", "bfloat16"] = "float32"
    on_bad_loss: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "rectify_ddim_steps",
            "batch_size",
            "timesteps_per_chunk",
            "log_every",
            "val_every",
            "save_every",
            "rollout_episodes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be 1 or more; got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be above 0; got {getattr(self, name)}")
        for name in ("rectify_steps", "weight_decay", "warmup_steps", "keep_last", "rollout_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} must be 0 or more; got {getattr(self, name)}")
        for name in ("ema_decay", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 0 and below 1; got {getattr(self, name)}")
        for name, options in (("precision", ("float32", "bfloat16")), ("on_bad_loss", ("stop", "skip"))):
            if getattr(self, name) not in options:
                raise ValueError(f"train.{name} must be one of {', '.join(options)}; got {getattr(self, name)!r}")

    @property
    def all_steps(self) -> int:
        """Optimiser steps in all."""
        return self.steps + self.rectify_steps


class Tracker(Protocol):
    """Where metrics go besides the checkpoint."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics of a training step."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run, ready to start or to be resumed.

    Attributes:
        state: what changes.
        training: windows of the training episodes.
        validation: windows of the held-out episodes; may be empty.
    """

    state: TrainState
    training: Windows
    validation: Windows


def prepare_run(
    config: PolicyConfig,
    demonstrations: Demonstrations,
    settings: TrainSettings,
    *,
    seed: int,
    device: str,
    augment: Augment | None = None,
) -> Run:
    """Split the episodes, fit the normalisers on the training ones, and initialise the policy from the seed.

    Args:
        config: of the policy.
        demonstrations: all episodes.
        settings: for the split and the optimiser.
        seed: of the split and of the initial weights.
        device: where to train.
        augment: a symmetry of the task: training windows are joined by their counterparts, validation windows are not.

    Returns:
        The run at step 0.

    Raises:
        ValueError: rectification with more denoising steps than the schedule has timesteps.
    """
    torch.manual_seed(derive_seed(seed, 0))  # initialisers draw from the global generator
    policy = DiffusionPolicy(config)
    if settings.rectify_steps:
        check_ddim_steps(settings.rectify_ddim_steps, policy.schedule.num_steps, "train.rectify_ddim_steps")
    layout: dict[str, Any] = {
        "obs_horizon": config.obs_horizon,
        "action_horizon": config.action_horizon,
        "mask_padding": settings.mask_padding,
    }
    train_episodes, val_episodes = split_episodes(
        demonstrations.num_episodes, settings.val_fraction, seed, demonstrations.held_out
    )
    training = Windows(demonstrations, train_episodes, augment=augment, **layout)
    validation = Windows(demonstrations, val_episodes, **layout)
    fit_normalizers(policy, training)
    return Run(state=start_training(policy.to(device), settings), training=training, validation=validation)


def start_training(policy: DiffusionPolicy, settings: TrainSettings) -> TrainState:
    """A state at step 0, around a policy whose normalisers are fitted.

    Args:
        policy: it is trained in place.
        settings: for the optimiser.

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
    """Fit the policy's normalisers on the training episodes, and on nothing else.

    Args:
        policy: its normalisers are set.
        training: the training windows.
    """
    by_key = {**policy.observation_normalizers, **policy.auxiliary_normalizers}
    limits = {key: Limits() for key in ("actions", *by_key)}
    for observations, actions in training.blocks():
        for key, found in limits.items():
            found.update(actions if key == "actions" else observations[key])
    policy.action_normalizer.fit(*limits.pop("actions"))
    for key, found in limits.items():
        normalizer = by_key[key]
        assert isinstance(normalizer, Normalizer)
        normalizer.fit(*found)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine from the peak to zero at the last step; rectification begins anew."""
    steps = settings.steps
    if settings.rectify_steps and step >= steps:
        step, steps = step - steps, settings.rectify_steps
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def update_ema(ema: DiffusionPolicy, policy: DiffusionPolicy, updates: int, max_decay: float) -> None:
    """Move the weight average towards the weights.

    Args:
        ema: changed in place.
        policy: the newest weights.
        updates: how many updates came before this one.
        max_decay: decay once warmed up; before, it is (1 + n) / (10 + n).
    """
    decay = min(max_decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(policy.parameters()), 1 - decay)


def train(
    run: Run,
    settings: TrainSettings,
    *,
    seed: int,
    tracker: Tracker,
    save: Callable[[TrainState], None],
    rollout: Callable[[DiffusionPolicy], dict[str, float]] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `settings.all_steps`, from wherever the state is.

    Step n draws its windows, timesteps, noise and dropout from (seed, n) alone, so that an interrupted and resumed
    run is the same run.

    A step whose loss or gradient is not finite leaves the weights as they were, on the device itself. The trainer
    learns of it when it next logs or saves: looking at each step's loss would make a GPU wait for the CPU.

    Args:
        run: its state is changed in place.
        settings: see `TrainSettings`.
        seed: of the whole run.
        tracker: receives the metrics as they come.
        save: called every `save_every` steps, after rollouts, and at the end, also when stopped.
        rollout: called with the averaged policy every `rollout_every` steps; gives metrics.
        should_stop: asked after every step; True saves and returns.

    Raises:
        FloatingPointError: a loss or gradient is not finite and `on_bad_loss` is `stop`, or that holds for a hundred
            steps in a row, or the weights are not finite. Nothing was saved since.
    """
    state, training, validation = run.state, run.training, run.validation
    unread: list[Outcome] = []
    teacher: SamplerProgram | None = None
    with progress(total=settings.all_steps, initial=state.step, desc="train", unit="step") as bar:
        for windows, batch in batches_ahead(training, range(state.step, settings.all_steps), settings.batch_size, seed):
            if teacher is None and state.step >= settings.steps:
                teacher = start_rectification(state, settings.rectify_ddim_steps)
            unread.append((windows, _train_step(state, batch, teacher, settings, seed)))
            state.step += 1
            bar.update()
            last = state.step == settings.all_steps
            metrics: dict[str, float] = {}
            if last or state.step % settings.log_every == 0:
                _read(unread, state, training, settings)
                metrics.update(_loss_metrics(state, settings))
                state.recent.clear()
                bar.set_postfix(loss=f"{metrics.get('train/loss', math.nan):.4f}", refresh=False)
            if len(validation) and (last or state.step % settings.val_every == 0):
                metrics["val/loss"] = validation_loss(state.ema, validation)
            if rollout and settings.rollout_every and state.step % settings.rollout_every == 0:
                metrics.update({f"rollout/{k}": v for k, v in rollout(state.ema).items()})
            if metrics:
                state.history.append({"step": state.step, **metrics})
                tracker.log(metrics, state.step)
            stopping = should_stop()
            rolled_out = any(key.startswith("rollout/") for key in metrics)  # it might be the best so far
            if last or stopping or rolled_out or state.step % settings.save_every == 0:
                _read(unread, state, training, settings)
                _check_weights(state)
                save(state)
            if stopping:
                break


def batches_ahead(
    training: Windows, steps: range, batch_size: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """The batches of training steps, gathered by a thread ahead of whoever takes them.

    Args:
        training: the windows.
        steps: whose batches.
        batch_size: windows in each.
        seed: of the run.

    Yields:
        One batch a step, after the numbers of its windows; see `Windows.batch_at`.
    """

    def gather(step: int) -> tuple[NDArray[np.int64], Batch]:
        windows = training.batch_at(step, batch_size, seed)
        return windows, training.gather(windows)

    waiting: deque[Future[tuple[NDArray[np.int64], Batch]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        for step in steps:
            waiting.append(thread.submit(gather, step))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _train_step(
    state: TrainState, batch: Batch, teacher: SamplerProgram | None, settings: TrainSettings, seed: int
) -> torch.Tensor:
    torch.manual_seed(derive_seed(seed, 1, state.step))  # the source of dropout and observation noise
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, settings)
    state.policy.train()
    generator, timesteps = derive_generator(seed, 2, state.step), settings.timesteps_per_chunk
    made = None if teacher is None else pairs(teacher, batch, generator, timesteps)
    with torch.autocast(state.policy.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        if made is None:
            loss = state.policy.loss(batch, generator, timesteps_per_chunk=timesteps)
        else:
            loss = rectification_loss(state.policy, *made, generator)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.policy.parameters(), settings.grad_clip)
    figures = torch.stack([loss.detach(), norm])
    # What `torch.amp.GradScaler` sets: where it is 1, the fused kernel touches neither weights nor its own memory.
    state.optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad()
    update_ema(state.ema, state.policy, state.step, settings.ema_decay)
    return figures


def _read(unread: list[Outcome], state: TrainState, training: Windows, settings: TrainSettings) -> None:
    """Bring the figures of the newest steps to the CPU, into the state, and deal with those that are not finite."""
    if not unread:
        return
    all_windows, figures = zip(*unread, strict=True)
    unread.clear()
    first = state.step - len(figures) + 1
    for step, windows, (loss, norm) in zip(count(first), all_windows, torch.stack(figures).tolist(), strict=False):
        if math.isfinite(loss) and math.isfinite(norm):
            state.recent.append(loss)
            continue
        episodes = training.episodes_of(windows)
        what = (
            f"step {step} has the loss {loss} and a gradient of norm {norm},"
            f" on a batch of the episodes {', '.join(map(str, episodes))}"
        )
        if settings.on_bad_loss == "stop":
            raise FloatingPointError(f"{what}: lower train.learning_rate, or leave it out with train.on_bad_loss=skip")
        warnings.warn(f"{what}: skipped", stacklevel=2)
        state.skipped.append(step)
        if state.skipped[-MOST_SKIPPED_IN_A_ROW:] == [*range(step - MOST_SKIPPED_IN_A_ROW + 1, step + 1)]:
            raise FloatingPointError(f"{what}, like {MOST_SKIPPED_IN_A_ROW - 1} before it: lower train.learning_rate")


def _loss_metrics(state: TrainState, settings: TrainSettings) -> dict[str, float]:
    """What is logged of the training steps since the newest log entry."""
    metrics = {"train/learning_rate": learning_rate(state.step, settings)}
    if state.recent:
        metrics["train/loss"] = fmean(state.recent)
    if settings.on_bad_loss == "skip":
        metrics["train/skipped_steps"] = len(state.skipped)
    return metrics


def _check_weights(state: TrainState) -> None:
    """A finite loss and gradient can still throw the weights out of float32, at an absurd learning rate."""
    if not torch.stack([p.isfinite().all() for p in state.policy.parameters()]).all():
        raise FloatingPointError(f"the weights are not finite after step {state.step}: lower train.learning_rate")


@torch.no_grad()
def validation_loss(policy: DiffusionPolicy, validation: Windows) -> float:
    """The loss over held-out episodes, with the same windows, timesteps and noise each time.

    Args:
        policy: in evaluation mode.
        validation: held-out windows, one or more.

    Returns:
        Mean loss over up to 1024 windows spread evenly over the episodes.
    """
    count = min(VALIDATION_WINDOWS, len(validation))
    windows = np.linspace(0, len(validation) - 1, count).round().astype(np.int64)
    return policy.loss(validation.gather(windows), derive_generator(0)).item()
