"""Training windows over episodes, gathered without a Python loop."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from policy.data.demonstrations import Demonstrations
from policy.diffusion_policy import Batch


def split_episodes(num_episodes: int, val_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split episodes into training and validation, the same way for the same seed.

    Args:
        num_episodes: E.
        val_fraction: share of episodes for validation, 0 <= share < 1; rounded, and at least one episode trains.
        seed: of the permutation.

    Returns:
        Sorted episode numbers for training and for validation.

    Raises:
        ValueError: a share outside [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1; got {val_fraction}")
    order = np.random.default_rng(seed).permutation(num_episodes)
    held_out = min(round(num_episodes * val_fraction), num_episodes - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class Windows:
    """Every transition of some episodes as a training window.

    Window of transition t, for obs_horizon 2 and action_horizon 8:

        observations   t-1  t                 (the episode's first one repeated before its start)
        actions             t  t+1 ... t+7    (its last one repeated after its end, and masked)

    Windows never cross episodes; every transition of every episode, the last included, has one.

    Args:
        demonstrations: the episodes.
        episodes: which of them, by number.
        obs_horizon: observations looked back on, the newest included.
        action_horizon: actions in a chunk.
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        episodes: NDArray[np.int64],
        *,
        obs_horizon: int,
        action_horizon: int,
    ) -> None:
        starts, ends = demonstrations.episode_starts[episodes], demonstrations.episode_ends[episodes]
        lengths = ends - starts
        self.demonstrations = demonstrations
        self.episodes = episodes
        self._start = np.repeat(starts, lengths)
        self._end = np.repeat(ends, lengths)
        self._now = self._start + np.arange(len(self._start)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        # The newest epoch's permutation, kept because drawing it costs more than a batch.
        self._epoch_key: tuple[int, int] | None = None
        self._order = np.empty(0, np.int64)
        self._past = np.arange(1 - obs_horizon, 1)
        self._future = np.arange(action_horizon)

    def __len__(self) -> int:
        return len(self._now)

    def gather(self, windows: NDArray[np.int64]) -> Batch:
        """Collect windows into one batch.

        Args:
            windows: (B,) window numbers, 0..len - 1.

        Returns:
            The batch, see `Batch`, as CPU tensors in the data's own dtypes.
        """
        now, start, end = self._now[windows, None], self._start[windows, None], self._end[windows, None]
        past = np.maximum(now + self._past, start)
        future = now + self._future
        inside = future < end
        return {
            "observations": {
                key: torch.from_numpy(values[past]) for key, values in self.demonstrations.observations.items()
            },
            "actions": torch.from_numpy(self.demonstrations.actions[np.minimum(future, end - 1)]),
            "mask": torch.from_numpy(inside),
        }

    def batch_at(self, step: int, batch_size: int, seed: int) -> NDArray[np.int64]:
        """Window numbers of training step `step`: each epoch is a fresh permutation, drawn from (seed, epoch).

        The order has no state: step n's batch is the same whether or not the run was interrupted before it.

        Args:
            step: 0 or more.
            batch_size: windows a step; with fewer windows than this, a batch holds all of them.
            seed: of the whole run.

        Returns:
            (min(batch_size, len(self)),) int64; the incomplete batch at the end of an epoch is left out.
        """
        size = min(batch_size, len(self))
        epoch, position = divmod(step, len(self) // size)
        if self._epoch_key != (seed, epoch):
            self._order = np.random.default_rng((seed, epoch)).permutation(len(self))
            self._epoch_key = (seed, epoch)
        return self._order[position * size : (position + 1) * size].copy()
