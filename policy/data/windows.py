"""Training windows over episodes, gathered without a Python loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policy.data.demonstrations import Arrays, Augment, Demonstrations
from policy.model.diffusion_policy import Batch

BLOCK_ROWS = 65_536


def split_episodes(
    num_episodes: int, val_fraction: float, seed: int, held_out: Sequence[int] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split episodes into training and validation, the same way for the same seed.

    Args:
        num_episodes: E.
        val_fraction: share of episodes for validation, 0 <= share < 1; rounded, and at least one episode trains.
        seed: of the permutation.
        held_out: episodes that the file itself sets aside; with any, they are the validation episodes.

    Returns:
        Sorted episode numbers for training and for validation.

    Raises:
        ValueError: a share outside [0, 1), or no episode left to train on.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1; got {val_fraction}")
    if len(held_out):
        validation = np.unique(np.asarray(held_out, np.int64))
        if len(validation) == num_episodes:
            raise ValueError(
                f"all {num_episodes} episodes are set aside for validation: raise dataset.max_episodes, or choose a"
                " dataset.subset"
            )
        return np.setdiff1d(np.arange(num_episodes), validation), validation
    order = np.random.default_rng(seed).permutation(num_episodes)
    count = min(round(num_episodes * val_fraction), num_episodes - 1)
    return np.sort(order[count:]), np.sort(order[:count])


class Windows:
    """Every transition of some episodes as a training window.

    Window of transition t, for obs_horizon 2 and action_horizon 8:

        observations   t-1  t                 (the episode's first one repeated before its start)
        actions             t  t+1 ... t+7    (its last one repeated after its end, and masked)

    Windows never cross episodes; every transition of every episode, the last included, has one. With a symmetry of the
    task, the windows are followed by their counterparts under it.

    Args:
        demonstrations: the episodes.
        episodes: which of them, by number.
        obs_horizon: observations looked back on, the newest included.
        action_horizon: actions in a chunk.
        augment: a symmetry of the task, applied to gathered windows: the data exists once.
        mask_padding: leave repeated actions after an episode's end out of the loss.
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        episodes: NDArray[np.int64],
        *,
        obs_horizon: int,
        action_horizon: int,
        augment: Augment | None = None,
        mask_padding: bool = True,
    ) -> None:
        self.demonstrations = demonstrations
        self.episodes = episodes
        self._starts = demonstrations.episode_starts[episodes]
        self._ends = demonstrations.episode_ends[episodes]
        # Number of the first window after each episode: all that is kept per episode, and nothing per window.
        self._window_ends = np.cumsum(self._ends - self._starts)
        self._augment = augment
        self._mask_padding = mask_padding
        # The newest epoch's permutation, kept because drawing it costs more than a batch.
        self._epoch_key: tuple[int, int] | None = None
        self._order: NDArray[Any] = np.empty(0, np.int64)
        self._past = np.arange(1 - obs_horizon, 1)
        self._future = np.arange(action_horizon)

    @property
    def num_transitions(self) -> int:
        """Transitions of the episodes, counterparts not counted."""
        return int(self._window_ends[-1]) if len(self._window_ends) else 0

    def __len__(self) -> int:
        return self.num_transitions * (1 if self._augment is None else 2)

    def gather(self, windows: NDArray[np.int64]) -> Batch:
        """Collect windows into one batch.

        Args:
            windows: (B,) window numbers, 0..len - 1.

        Returns:
            The batch, see `Batch`, as CPU tensors in the data's own dtypes.
        """
        originals, place = self._locate(windows)
        start, end = self._starts[place, None], self._ends[place, None]
        now = end - (self._window_ends[place, None] - originals[:, None])
        past = np.maximum(now + self._past, start)
        future = now + self._future
        observations: Arrays = {
            key: values.take(past, axis=0) for key, values in self.demonstrations.observations.items()
        }
        actions = self.demonstrations.actions.take(np.minimum(future, end - 1), axis=0)
        if self._augment is not None:
            observations, actions = _with_counterparts(
                self._augment, observations, actions, windows >= self.num_transitions
            )
        inside = future < end if self._mask_padding else np.ones_like(future, dtype=np.bool_)
        return {
            "observations": {key: torch.from_numpy(values) for key, values in observations.items()},
            "actions": torch.from_numpy(actions),
            "mask": torch.from_numpy(inside),
        }

    def episodes_of(self, windows: NDArray[np.int64]) -> list[int]:
        """The episodes that windows come from, by number, each once and in order."""
        return np.unique(self.episodes[self._locate(windows)[1]]).tolist()

    def _locate(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The windows, or those they are counterparts of, and the place in `episodes` of each one's episode."""
        originals = windows % max(self.num_transitions, 1)
        return originals, np.searchsorted(self._window_ends, originals, side="right")

    def blocks(self) -> Iterator[tuple[Arrays, NDArray[np.float32]]]:
        """All transitions of the episodes in blocks of consecutive ones, each followed by its counterpart.

        Yields:
            Observations (N, *shape) by key and actions (N, action_dim).
        """
        for start, end in _runs(self._starts, self._ends):
            for low in range(start, end, BLOCK_ROWS):
                rows = slice(low, min(low + BLOCK_ROWS, end))
                observations = {key: values[rows] for key, values in self.demonstrations.observations.items()}
                actions = self.demonstrations.actions[rows]
                yield observations, actions
                if self._augment is not None:
                    yield self._augment(observations, actions)

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
            self._order = np.arange(len(self), dtype=np.uint32 if len(self) < 2**32 else np.int64)  # half the memory
            np.random.default_rng((seed, epoch)).shuffle(self._order)
            self._epoch_key = (seed, epoch)
        return self._order[position * size : (position + 1) * size].astype(np.int64)


def _with_counterparts(
    augment: Augment, observations: Arrays, actions: NDArray[np.float32], where: NDArray[np.bool_]
) -> tuple[Arrays, NDArray[np.float32]]:
    """Replace the rows of a batch that `where` marks by their counterparts."""
    mirrored, mirrored_actions = augment({key: values[where] for key, values in observations.items()}, actions[where])
    for key, values in observations.items():
        values[where] = mirrored[key]
    actions[where] = mirrored_actions
    return observations, actions


def _runs(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Join neighbouring episodes into runs of consecutive transitions."""
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    for run in np.split(np.arange(len(starts)), breaks):
        if len(run):
            yield int(starts[run[0]]), int(ends[run[-1]])
