"""The error of a policy on held-out episodes, by which recipes are compared before rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.common.seeding import derive_generator
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, SamplerProgram, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy, observed

# Windows that are measured, spread evenly over the held-out episodes, and chunks that are sampled for each.
WINDOWS = 512
SAMPLES = 4
ROWS_AT_ONCE = 128


def held_out_errors(
    policy: DiffusionPolicy, sampler: Sampler, validation: Windows, scale: NDArray[Any], windows: int = WINDOWS
) -> list[float]:
    """The energy score of the sampled chunks on each held-out episode, in standard deviations of the actions.

    For samples X, X' and the demonstrated chunk y it is E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007), with the
    root of the mean square over the chunk as the norm. It is proper: no other distribution of chunks has a smaller one
    than that of the demonstrations. The error of one sample alone would prefer the mean of the demonstrations, which is
    the wrong action where they disagree.

    Args:
        policy: in evaluation mode.
        sampler: how chunks are sampled; the same noise is used for every policy.
        validation: the windows of the held-out episodes.
        scale: (action_dim,) the standard deviation of each action.
        windows: number of windows to measure.

    Returns:
        The mean over the windows of each episode, in the order of the episodes; lower is better. Episodes without any
        of the windows are left out.
    """
    chosen = np.linspace(0, len(validation) - 1, min(windows, len(validation))).round().astype(np.int64)
    program = compile_sampler(policy, sampler, backend=PLAIN_BACKEND)
    blocks = [chosen[first : first + ROWS_AT_ONCE] for first in range(0, len(chosen), ROWS_AT_ONCE)]
    scores = np.concatenate([_scores(program, policy, validation, scale, block) for block in blocks])
    owners = np.array([validation.episodes_of(chosen[number : number + 1])[0] for number in range(len(chosen))])
    return [float(scores[owners == episode].mean()) for episode in np.unique(owners)]


@torch.no_grad()
def _scores(
    program: SamplerProgram, policy: DiffusionPolicy, validation: Windows, scale: NDArray[Any], block: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The energy score of each window of a block, (B,)."""
    batch = validation.gather(block)
    seen = observed(policy.config, batch["observations"])
    generators = [derive_generator(int(block[0]), number) for number in range(SAMPLES)]
    chunks = [program.sample_actions(seen, generator=source).cpu() for source in generators]
    past = policy.config.past_actions
    target, mask = batch["actions"][:, past:], batch["mask"][:, past:]
    return energy_scores(chunks, target, mask, torch.from_numpy(np.asarray(scale, np.float32))).double().numpy()


def energy_scores(samples: Sequence[Tensor], target: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """The energy score of samples of chunks; see `held_out_errors`.

    Args:
        samples: two or more, (B, H, A) each.
        target: (B, H, A) the demonstrated chunks.
        mask: (B, H) bool, the actions that count.
        scale: (A,) units of the actions.

    Returns:
        (B,) scores.
    """

    def distance(first: Tensor, second: Tensor) -> Tensor:
        squares = ((first - second) / scale).square().mean(-1)
        return (squares.where(mask, 0).sum(-1) / mask.sum(-1)).sqrt()

    to_target = sum(distance(sample, target) for sample in samples)
    between = sum(distance(first, second) for first, second in combinations(samples, 2))
    return torch.as_tensor(to_target / len(samples) - between / (2 * math.comb(len(samples), 2)))
