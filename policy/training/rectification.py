"""Rectification: a policy learns from chunks that a policy made, so that few denoising steps do as well as many.

Where demonstrations allow several chunks, one denoising step yields their mean, and more steps lead to one of them. A
rectified policy is trained on pairs instead: a noise, and the chunk that DDIM makes of this noise with the policy as it
was before. A pair has the same answer at every timestep, so that a single step can find it (reflow: Liu et al. 2022,
"Flow Straight and Fast", arXiv:2209.03003; for diffusion and any prediction type: Wang et al. 2024, "Rectified
Diffusion", arXiv:2410.07303).

Between noises that lead to one chunk and noises that lead to another, the target jumps, which no network can follow
exactly. There the squared error favours a chunk between the two, and the absolute error favours one of them. The loss
is therefore a pseudo-Huber loss, which is close to the root mean square error of each chunk (Lee et al. 2024,
"Improving the Training of Rectified Flows", arXiv:2405.20320).

The policy that makes the chunks is the teacher. In most runs it is the policy itself, as it was before this phase. It
can also be a policy of another size or prediction type, from which a new one learns (distillation): pairs do not depend
on what network made them. A policy that predicts the noise has to become one that predicts the chunk, because at the
last timestep, where sampling starts, the noise is all that the network sees: predicting it teaches nothing about the
chunk, and the smallest error of it is divided by √ᾱ.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from policy.common.observations import Batch
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, SamplerProgram, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy, observed
from policy.training.state import TrainState

# Timesteps sampled per (noise, chunk) pair; there are several, because making a pair costs more than learning from it.
TIMESTEPS_A_PAIR = 4
# The pseudo-Huber constant c, in half ranges of the actions: smaller root mean square errors of a chunk count
# quadratically, so that the loss is smooth.
SMALL_ERROR = 0.003


class Rectified:
    """The phase that trains on the teacher's chunks.

    Args:
        ddim_steps: denoising steps of the teacher.
        timesteps_per_chunk: timesteps per chunk in the phase on demonstrations, see `pairs_of`.
    """

    def __init__(self, ddim_steps: int, timesteps_per_chunk: int) -> None:
        self._ddim_steps, self._timesteps_per_chunk = ddim_steps, timesteps_per_chunk

    def begin(self, state: TrainState) -> None:
        """Make the averaged policy the teacher, unless the run has one already."""
        self._teacher = start_rectification(state, self._ddim_steps)

    def rows(self, windows: int) -> int:
        """How many of a batch's windows a pair is made for, see `pairs_of`."""
        return pairs_of(windows, self._timesteps_per_chunk)

    def examples(self, batch: Batch, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Make pairs of a noise and the teacher's chunk for it, see `pairs`."""
        return pairs(self._teacher, batch, generator)

    def loss(self, policy: DiffusionPolicy, examples: tuple[Batch, Tensor], generator: torch.Generator) -> Tensor:
        """Compute the loss (), see `rectification_loss`."""
        return rectification_loss(policy, *examples, generator)

    def validation_loss(self, policy: DiffusionPolicy, batch: Batch, generator: torch.Generator) -> Tensor:
        """Compute the loss () on pairs whose observations are held out."""
        return self.loss(policy, self.examples(batch, generator), generator)


def start_rectification(state: TrainState, ddim_steps: int) -> SamplerProgram:
    """Make the averaged policy the teacher and the starting point of this phase, unless there is a teacher already.

    Args:
        state: the state after the phase on demonstrations, of a run that was prepared with a teacher, or resumed within
            this phase; changed in place.
        ddim_steps: denoising steps of the teacher.

    Returns:
        The teacher's sampling, which is deterministic given the noise.
    """
    if state.teacher is None:
        state.teacher = copy.deepcopy(state.ema)
        state.policy.load_state_dict(state.ema.state_dict())
        state.optimizer.state.clear()
    return compile_sampler(uncut(state.teacher), Sampler(ddim_steps=ddim_steps), backend=PLAIN_BACKEND)


def uncut(policy: DiffusionPolicy) -> DiffusionPolicy:
    """Return the policy as one that gives out all actions that it denoises: past ones are learnt too."""
    config = policy.config
    if not config.past_actions:
        return policy
    whole = DiffusionPolicy(dataclasses.replace(config, past_actions=0, action_horizon=config.denoised_horizon))
    whole.load_state_dict(policy.state_dict())
    return whole.to(policy.device).eval().requires_grad_(False)


def pairs_of(windows: int, timesteps_per_chunk: int) -> int:
    """How many pairs a step learns from.

    Args:
        windows: windows in a step on demonstrations.
        timesteps_per_chunk: timesteps per chunk in such a step.

    Returns:
        As many that a step with `TIMESTEPS_A_PAIR` timesteps per pair is about as large as one on demonstrations.
    """
    return min(max(windows * timesteps_per_chunk // TIMESTEPS_A_PAIR, 1), windows)


def pairs(teacher: SamplerProgram, batch: Batch, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """Draw noises, and let the teacher make chunks of them, for the observations of a batch.

    Args:
        teacher: makes the chunks.
        batch: B windows; their observations are used, not their actions, which may be of another width.
        generator: source of the noises.

    Returns:
        A batch with the B chunks, and their noises (B, action_horizon, action_dim).
    """
    observations = batch["observations"]
    noise = torch.randn(
        len(batch["actions"]), teacher.config.action_horizon, teacher.config.action_dim, generator=generator
    )
    made: Batch = {
        "observations": observations,
        "actions": teacher({key: observations[key] for key in teacher.config.observation_shapes}, noise),
        "mask": torch.ones(noise.shape[:2], dtype=torch.bool),
    }
    return made, noise


def rectification_loss(policy: DiffusionPolicy, batch: Batch, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Pseudo-Huber loss: the mean of √(e² + c²) - c over chunks, plus the auxiliary loss.

    Here e is the root mean square error of a chunk at a timestep, weighted by timestep, and c is `SMALL_ERROR`. See the
    module's docstring for the source.

    Args:
        policy: the policy being trained.
        batch: the chunks of B pairs, see `pairs`.
        noise: (B, action_horizon, action_dim) their noises.
        generator: source of the timesteps.

    Returns:
        () loss.
    """
    timestep = pair_timesteps(policy.schedule.num_steps, len(noise), generator).flatten()
    repeated = noise.repeat_interleave(TIMESTEPS_A_PAIR, dim=0)
    embedding = policy.embed(observed(policy.config, batch["observations"]))
    squares = policy.squared_errors(batch, embedding, timestep, repeated).mean(dim=1)
    return ((squares + SMALL_ERROR**2).sqrt() - SMALL_ERROR).mean() + policy.auxiliary_loss(batch, embedding)


def pair_timesteps(num_steps: int, rows: int, generator: torch.Generator) -> Tensor:
    """Draw the timesteps of each pair, most often those that sampling with few denoising steps visits.

    Args:
        num_steps: T of the schedule.
        rows: number of pairs.
        generator: source of all timesteps but the first.

    Returns:
        (rows, TIMESTEPS_A_PAIR) int64: first the last timestep, where sampling starts; then one that is often close to
        it; the others are uniformly distributed.
    """
    timesteps = torch.randint(num_steps, (rows, TIMESTEPS_A_PAIR), generator=generator)
    timesteps[:, 0] = num_steps - 1
    timesteps[:, 1] = num_steps - 1 - (num_steps * torch.rand(rows, generator=generator) ** 2).long()
    return timesteps
