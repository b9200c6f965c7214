"""The error of a policy on held-out episodes, by which recipes are compared before rollouts."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.inference.backends import PLAIN_BACKEND, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training.errors import sampled

# Windows that are measured, spread evenly over the held-out episodes, and chunks that are sampled for each.
WINDOWS = 512
SAMPLES = 4


def held_out_errors(
    policy: DiffusionPolicy, sampler: Sampler, validation: Windows, scale: NDArray[np.float64], windows: int = WINDOWS
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
        scale: (action_dim,) the standard deviation of each action; NaN for one that is constant and does not count.
        windows: number of windows to measure.

    Returns:
        The mean over the windows of each episode, in the order of the episodes; lower is better. Episodes without any
        of the windows are left out.
    """
    chosen = np.linspace(0, len(validation) - 1, min(windows, len(validation))).round().astype(np.int64)
    program = compile_sampler(policy, sampler, backend=PLAIN_BACKEND)
    past, unit = policy.config.past_actions, torch.from_numpy(scale)
    scores = np.concatenate(
        [
            energy_scores(samples, batch["actions"][:, past:], batch["mask"][:, past:], unit).numpy()
            for batch, samples in sampled(program, validation, chosen, SAMPLES)
        ]
    )
    owners = np.array([validation.episodes_of(chosen[number : number + 1])[0] for number in range(len(chosen))])
    return [float(scores[owners == episode].mean()) for episode in np.unique(owners)]


def energy_scores(samples: Tensor, target: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """The energy score of samples of chunks; see `held_out_errors`.

    Args:
        samples: (S, B, H, A), two or more of each chunk.
        target: (B, H, A) the demonstrated chunks.
        mask: (B, H) bool, the actions that count.
        scale: (A,) units of the actions; NaN for those that do not count.

    Returns:
        (B,) scores.
    """

    def distance(first: Tensor, second: Tensor) -> Tensor:
        squares = ((first - second) / scale).square().nanmean(-1)
        return (squares.where(mask, 0).sum(-1) / mask.sum(-1)).sqrt()

    to_target = sum(distance(sample, target) for sample in samples)
    between = sum(distance(first, second) for first, second in combinations(samples, 2))
    return torch.as_tensor(to_target / len(samples) - between / (2 * math.comb(len(samples), 2)))
