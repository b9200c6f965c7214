"""Training settings, and the learning rate that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from policy.common.arguments import check_choice


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of behaviour cloning.

    Attributes:
        steps: optimiser steps on the demonstrations; 0 for a run that only rectifies or distils a trained policy.
        rectify_steps: further optimiser steps on chunks that a policy makes, with a warm-up and a cosine of their own,
            see `policy.training.rectification`; 0 for none.
        rectify_ddim_steps: denoising steps with which those chunks are sampled.
        batch_size: windows in a step, of all processes together where torchrun starts several.
        timesteps_per_chunk: timesteps sampled for each window's chunk in a step. The observations are encoded once, so
            that more timesteps cost little where encoding dominates, as with images.
        learning_rate: peak, reached after the warm-up, then decayed to zero along a cosine.
        weight_decay: of AdamW, on weight matrices only.
        warmup_steps: linear warm-up.
        grad_clip: a gradient with a larger norm is scaled down to it.
        ema_decay: upper bound of the weight average's decay, which is (1 + n) / (10 + n) at update n.
        corrective_noise: noise on where the robot is, with the actions that lead it back: the standard deviation, as a
            share of what each number moves within a chunk; 0 for none. Any other amount also blurs how fast the robot
            moves. It needs actions that are displacements. See `policy.training.corrective_noise`.
        exchange: share of the windows in which a thing with which the robot has nothing to do at the moment is shown
            where another demonstration had it; 0 for none. It needs actions that are displacements. See
            `policy.training.exchanged_things`.
        action_weights: of the action's dimensions in the loss: `equal`, or by `spread`, where a dimension whose values
            lie in a small part of their range counts up to 20 times, see `policy.training.action_weights`.
        mask_padding: leave the actions repeated after an episode's end out of the loss.
        val_fraction: share of episodes held out for the validation loss, unless the data's file sets some aside.
        log_every: steps between log entries.
        val_every: steps between validation losses.
        save_every: steps between checkpoints; one is also saved after each short rollout.
        keep_last: number of recent checkpoints kept besides the best, see `policy.checkpoint`.
        rollout_every: steps between short rollouts, if the environment is known; 0 for none.
        rollout_episodes: episodes in each.
        precision: `bfloat16` computes the loss and its gradient in bfloat16 where that is safe (`torch.autocast`);
            weights, optimiser, average and validation stay float32.
        on_bad_loss: reaction to a step whose loss or gradient is not finite. Such a step never changes the weights;
            `stop` ends the run once it is noticed, `skip` continues without the step.

    Raises:
        ValueError: a value outside its range.
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
    corrective_noise: float = 0.0
    exchange: float = 0.0
    action_weights: Literal["equal", "spread"] = "equal"
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
        for name in ("steps", "rectify_steps", "weight_decay", "warmup_steps", "keep_last", "rollout_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} must be 0 or more; got {getattr(self, name)}")
        if not 0 <= self.corrective_noise <= 1:
            raise ValueError(
                f"train.corrective_noise is a share of what the robot moves within a chunk, 0 to 1; got"
                f" {self.corrective_noise}"
            )
        if not 0 <= self.exchange <= 1:
            raise ValueError(f"train.exchange is a share of the windows, 0 to 1; got {self.exchange}")
        if not self.all_steps:
            raise ValueError("train.steps=0 and train.rectify_steps=0 leave nothing to train: give one of them steps")
        for name in ("ema_decay", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 0 and below 1; got {getattr(self, name)}")
        for name, options in (
            ("action_weights", ("equal", "spread")),
            ("precision", ("float32", "bfloat16")),
            ("on_bad_loss", ("stop", "skip")),
        ):
            check_choice(f"train.{name}", getattr(self, name), options)

    @property
    def phase_lengths(self) -> list[int]:
        """Optimiser steps of each phase that there is: demonstrations, then rectification."""
        return [steps for steps in (self.steps, self.rectify_steps) if steps]

    @property
    def all_steps(self) -> int:
        """Optimiser steps in all."""
        return sum(self.phase_lengths)

    def place(self, step: int) -> tuple[int, int]:
        """Index of a step's phase, and the step's number within it; the end of training is part of the last phase."""
        phase, lengths = 0, self.phase_lengths
        while phase + 1 < len(lengths) and step >= lengths[phase]:
            step -= lengths[phase]
            phase += 1
        return phase, step


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine from the peak to zero, anew in each phase."""
    phase, place = settings.place(step)
    warmup = min(1.0, (place + 1) / (settings.warmup_steps + 1))
    decay = 0.5 * (1 + math.cos(math.pi * place / settings.phase_lengths[phase]))
    return settings.learning_rate * warmup * decay
