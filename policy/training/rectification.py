"""Rectification: a policy learns from its own chunks, so that few denoising steps give what many do.

Where demonstrations allow several chunks, one denoising step gives their mean; more steps take a noise to one of them.
A rectified policy is trained on pairs instead: a noise, and the chunk that DDIM made of this very noise with the policy
as it was before. For a pair there is one answer at every timestep, so that one step can find it (reflow: Liu et al.
2022, "Flow Straight and Fast", arXiv:2209.03003; for diffusion and any prediction type: Wang et al. 2024, "Rectified
Diffusion", arXiv:2410.07303).

Between noises that lead to one chunk and those that lead to another there is an edge, which no network follows exactly.
There the square of the error asks for a chunk between the two, and the error itself for one of them: the loss here is a
pseudo-Huber one, nearly the root mean square error of each chunk (Lee et al. 2024, "Improving the Training of Rectified
Flows", arXiv:2405.20320).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from policy.common.observations import Batch
from policy.diffusion.sampler import Sampler
from policy.inference.backends import SamplerProgram, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy, observed
from policy.training.state import TrainState

# Timesteps sampled per (noise, chunk) pair: making a pair costs more than learning from it.
TIMESTEPS_A_PAIR = 4
# Of a chunk, in half ranges of the actions: smaller errors count by their square, so that the loss is smooth.
SMALL_ERROR = 0.003


class Rectified:
    """The phase on the policy's own chunks.

    Args:
        ddim_steps: denoising steps of the teacher.
        timesteps_per_chunk: timesteps at which a step on demonstrations looks at each chunk.
    """

    def __init__(self, ddim_steps: int, timesteps_per_chunk: int) -> None:
        self._ddim_steps, self._timesteps_per_chunk = ddim_steps, timesteps_per_chunk

    def begin(self, state: TrainState) -> None:
        """Make the averaged policy the teacher, unless the run was resumed within this phase."""
        self._teacher = start_rectification(state, self._ddim_steps)

    def examples(self, batch: Batch, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Pairs of a noise and the teacher's chunk for it, see `pairs`."""
        return pairs(self._teacher, batch, generator, self._timesteps_per_chunk)

    def loss(self, policy: DiffusionPolicy, examples: tuple[Batch, Tensor], generator: torch.Generator) -> Tensor:
        """() see `rectification_loss`."""
        return rectification_loss(policy, *examples, generator)


def start_rectification(state: TrainState, ddim_steps: int) -> SamplerProgram:
    """Make the averaged policy the teacher and the point from which training goes on, unless that was done before.

    Args:
        state: at the end of plain training, or resumed after it; changed in place.
        ddim_steps: denoising steps of the teacher.

    Returns:
        The teacher's deterministic sampling.
    """
    if state.teacher is None:
        state.teacher = copy.deepcopy(state.ema)
        state.policy.load_state_dict(state.ema.state_dict())
        state.optimizer.state.clear()
    return compile_sampler(state.teacher, Sampler(ddim_steps=ddim_steps), backend="fused")


def pairs(
    teacher: SamplerProgram, batch: Batch, generator: torch.Generator, timesteps_per_chunk: int
) -> tuple[Batch, Tensor]:
    """Noises and the chunks that the teacher makes of them, for a part of a batch's observations.

    Args:
        teacher: makes the chunks.
        batch: its observations are used, not its actions.
        generator: source of the noises.
        timesteps_per_chunk: at how many timesteps a step on demonstrations looks at each chunk.

    Returns:
        A batch of B pairs, as many as make a step at `TIMESTEPS_A_PAIR` timesteps each about as large as one on
        demonstrations, and its noises (B, action_horizon, action_dim).
    """
    rows = min(max(len(batch["actions"]) * timesteps_per_chunk // TIMESTEPS_A_PAIR, 1), len(batch["actions"]))
    observations = {key: values[:rows] for key, values in batch["observations"].items()}
    noise = torch.randn(batch["actions"][:rows].shape, generator=generator)
    made: Batch = {
        "observations": observations,
        "actions": teacher(observed(teacher.config, observations), noise),
        "mask": torch.ones(noise.shape[:2], dtype=torch.bool),
    }
    return made, noise


def rectification_loss(policy: DiffusionPolicy, batch: Batch, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Mean over chunks of the root mean square error, √(e² + c²) - c: see the module; auxiliary observations as before.

    Args:
        policy: learns.
        batch: see `pairs`.
        noise: as well.
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
    """Where each pair is looked at: most often where few denoising steps look.

    Args:
        num_steps: T of the schedule.
        rows: pairs.
        generator: source of all but the first.

    Returns:
        (rows, TIMESTEPS_A_PAIR) int64: the last timestep, where sampling begins; one that is often near it; the others
        anywhere.
    """
    timesteps = torch.randint(num_steps, (rows, TIMESTEPS_A_PAIR), generator=generator)
    timesteps[:, 0] = num_steps - 1
    timesteps[:, 1] = num_steps - 1 - (num_steps * torch.rand(rows, generator=generator) ** 2).long()
    return timesteps.clamp(min=0)
