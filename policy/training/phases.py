"""The phases of a training: what a step learns from, and its loss."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from policy.common.observations import Batch
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training.rectification import Rectified
from policy.training.settings import TrainSettings
from policy.training.state import TrainState


class Phase(Protocol):
    """A part of training with an objective, a warm-up and a cosine of its own."""

    def begin(self, state: TrainState) -> None:
        """Prepare for the phase; called before its first step, and again when a run is resumed within it."""

    def rows(self, windows: int) -> int:
        """How many windows, the first ones of a batch of demonstrations, a step learns from."""
        ...

    def examples(self, batch: Batch, generator: torch.Generator) -> Any:
        """Make the examples that a step learns from out of a batch of demonstrations, in float32."""

    def loss(self, policy: DiffusionPolicy, examples: Any, generator: torch.Generator) -> torch.Tensor:
        """Compute the loss () on these examples, in `settings.precision`."""
        ...

    def validation_loss(self, policy: DiffusionPolicy, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Compute the loss () on held-out demonstrations, with which a policy is measured."""
        ...


class Demonstrated:
    """The first phase: learning the chunks of the demonstrations.

    Args:
        settings: the training settings.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self._timesteps_per_chunk = settings.timesteps_per_chunk

    def begin(self, state: TrainState) -> None:
        """Do nothing: the first phase needs no preparation."""

    def rows(self, windows: int) -> int:
        """Return the number of all windows: a step learns from each."""
        return windows

    def examples(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the demonstrations themselves."""
        return batch

    def loss(self, policy: DiffusionPolicy, examples: Batch, generator: torch.Generator) -> torch.Tensor:
        """Compute the denoising loss (), see `DiffusionPolicy.loss`."""
        return policy.loss(examples, generator, timesteps_per_chunk=self._timesteps_per_chunk)

    def validation_loss(self, policy: DiffusionPolicy, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Compute the denoising loss () at one timestep per chunk, whatever the number of them in training."""
        return policy.loss(batch, generator)


def phases_of(settings: TrainSettings) -> list[Phase]:
    """The phases of a training in order, one for each of `settings.phase_lengths`."""
    phases: list[Phase] = [Demonstrated(settings)] if settings.steps else []
    if settings.rectify_steps:
        phases.append(Rectified(settings.rectify_ddim_steps, settings.timesteps_per_chunk))
    return phases
