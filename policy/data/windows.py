"""Training windows over episodes, gathered without a Python loop."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from policy.data.demonstrations import Arrays, Augment, Demonstrations
from policy.data.groups import Groups

if TYPE_CHECKING:
    from policy.common.observations import Batch

# Transitions in one block of `Windows.blocks`: a symmetry gets copies of them, pictures too.
BLOCK_ROWS = 1024
# The mark of a counterpart, of which nothing is known.
UNMARKED = -1
# Takes rows (B, n) of an array of observations.
Take = Callable[[NDArray[np.int64]], NDArray[Any]]


def split_episodes(
    originals: NDArray[np.int64], val_fraction: float, seed: int, held_out: Sequence[int] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split episodes into training and validation episodes; the same seed gives the same split.

    Whatever was made from one episode stays on its side, and is trained on alone: validation is of whole episodes.

    Args:
        originals: the number of the episode that each one was made from, see `Demonstrations`.
        val_fraction: fraction of the episodes for validation, 0 <= val_fraction < 1. Their number is rounded, and at
            least one episode remains for training.
        seed: seed of the permutation.
        held_out: episodes that the file itself sets aside; if there are any, they are the validation episodes.

    Returns:
        Sorted episode numbers for training and for validation.

    Raises:
        ValueError: the fraction is outside [0, 1), or no episode is left to train on.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1; got {val_fraction}")
    recorded = np.unique(originals)
    if len(held_out):
        validation = np.unique(np.asarray(held_out, np.int64))
        if len(validation) == len(recorded):
            raise ValueError(
                f"all {len(recorded)} episodes are set aside for validation: raise dataset.max_episodes, or choose a"
                " dataset.subset"
            )
    else:
        order = np.random.default_rng(seed).permutation(recorded)
        validation = np.sort(order[: min(round(len(recorded) * val_fraction), len(recorded) - 1)])
    return np.flatnonzero(~np.isin(originals, validation)), validation


class Windows:
    """The training windows of some episodes, one for each transition.

    The window of transition t holds, for obs_horizon 2 and action_horizon 8:

        observations   t-1  t                 (before its start, the episode's first observation is repeated)
        actions             t  t+1 ... t+7    (after its end, the episode's last action is repeated and masked)

    With past_actions 1, the actions begin at t-1; before the episode's start, its first action is repeated and masked.

    Windows never cross episodes; every transition of every episode, the last included, has a window. With a symmetry of
    the task, the windows are followed by their images under it, called counterparts.

    Args:
        demonstrations: the episodes.
        episodes: numbers of the episodes to use.
        obs_horizon: number of observations in a window, the newest included.
        action_horizon: number of actions in a chunk.
        past_actions: number of actions before the chunk.
        augment: a symmetry of the task. It is applied to gathered windows, so the counterparts take no memory.
        mask_padding: leave repeated actions, which lie outside the episode, out of the loss.
    """

    def __init__(
        self,
        demonstrations: Demonstrations,
        episodes: NDArray[np.int64],
        *,
        obs_horizon: int,
        action_horizon: int,
        past_actions: int = 0,
        augment: Augment | None = None,
        mask_padding: bool = True,
    ) -> None:
        self.demonstrations = demonstrations
        self.episodes = episodes
        self._starts = demonstrations.episode_starts[episodes]
        self._ends = demonstrations.episode_ends[episodes]
        # The number of the first window after each episode. Nothing is stored per window.
        self._window_ends: NDArray[np.int64] = np.cumsum(self._ends - self._starts)
        self._augment = augment
        self._mask_padding = mask_padding
        self._marks: Mapping[str, NDArray[np.int64]] = {}
        # The newest epoch's permutation is kept, because drawing it takes longer than gathering a batch.
        self._epoch_key: tuple[int, int] | None = None
        self._order: NDArray[Any] = np.empty(0, np.int64)
        self._past = np.arange(1 - obs_horizon, 1)
        self._future = np.arange(-past_actions, action_horizon)
        # Where pictures are in videos, the groups of windows that are decoded together.
        frame_bytes = sum(values.row_bytes for values in demonstrations.frames.values())
        self._groups = Groups(self._starts, self._ends, obs_horizon, frame_bytes) if frame_bytes else None

    @property
    def num_transitions(self) -> int:
        """The number of transitions of the episodes, without counterparts."""
        return int(self._window_ends[-1]) if len(self._window_ends) else 0

    def __len__(self) -> int:
        return self.num_transitions * (1 if self._augment is None else 2)

    def gather(self, windows: NDArray[np.int64]) -> Batch:
        """Collect windows into one batch, without a Python loop.

        Args:
            windows: (B,) window numbers, 0..len - 1.

        Returns:
            The batch, see `Batch`, as CPU tensors in the data's own dtypes.

        Raises:
            ValueError: a frame of a video cannot be decoded; the message names file, episode and frame.
        """
        return self._gathered(windows, {})

    def _gathered(self, windows: NDArray[np.int64], decoded: Mapping[str, Take]) -> Batch:
        """See `gather`; `decoded` takes the rows of some observations from elsewhere."""
        import torch  # here, so that a command can import this module without it

        start, now, end = self._places(windows)
        past = np.maximum(now + self._past, start)
        future = now + self._future
        observations: Arrays = {
            key: decoded[key](past) if key in decoded else values.take(past, axis=0)
            for key, values in self.demonstrations.observations.items()
        }
        actions = self.demonstrations.actions.take(np.clip(future, start, end - 1), axis=0)
        mirrored = windows >= self.num_transitions
        if self._augment is not None and mirrored.any():  # a symmetry need not take arrays without rows
            observations, actions = _with_counterparts(self._augment, observations, actions, mirrored)
        batch: Batch = {
            "observations": {key: torch.from_numpy(values) for key, values in observations.items()},
            "actions": torch.from_numpy(actions),
            "mask": torch.from_numpy(self.inside(windows)),
        }
        for name, marks in self._marks.items():
            found = marks[now[:, 0]]
            found[mirrored] = UNMARKED
            batch[name] = torch.from_numpy(found)  # type: ignore[literal-required]
        return batch

    def inside(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which actions of windows count in the loss: (B, denoised_horizon), see `Batch.mask`."""
        start, now, end = self._places(windows)
        future = now + self._future
        return (start <= future) & (future < end) if self._mask_padding else np.ones_like(future, dtype=np.bool_)

    def _places(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(B, 1) transitions of windows: where their episode starts, the newest observation, where the episode ends."""
        originals, place = self._locate(windows)
        start, end = self._starts[place, None], self._ends[place, None]
        return start, end - (self._window_ends[place, None] - originals[:, None]), end

    def batches(self, numbers: Iterable[NDArray[np.int64]]) -> Generator[tuple[NDArray[np.int64], Batch], None, None]:
        """Collect one batch after the other; frames of videos are decoded ahead, see `Demonstrations.decode_workers`.

        Args:
            numbers: the window numbers of each batch, in the order of `batch_at` and all of one size.

        Yields:
            The window numbers of each batch, and the batch that `gather` would return.

        Raises:
            ValueError: see `gather`.
            WorkerError: a process that decodes has ended.
        """
        coming = iter(numbers)
        first = None if self._groups is None else next(coming, None)
        if self._groups is None or first is None:
            yield from ((windows, self.gather(windows)) for windows in coming)
            return
        from policy.data.stream import decoded_groups  # here, because few trainings need it

        data = self.demonstrations
        with decoded_groups(data.frames, self._groups, len(first), data.decode_workers) as decoded:
            for windows, groups in decoded.ahead((some, self._groups_of(some)) for some in chain([first], coming)):
                pictures = {key: partial(decoded.take, key, groups) for key in data.frames}
                yield windows, self._gathered(windows, pictures)

    def episodes_of(self, windows: NDArray[np.int64]) -> list[int]:
        """The sorted numbers of the episodes that windows come from, without repetition."""
        return np.unique(self.episodes[self._locate(windows)[1]]).tolist()

    def showing(self, keys: Sequence[str]) -> Windows:
        """Return the same windows with some of their observations only, and without counterparts."""
        shown = copy.copy(self)
        observations = {key: self.demonstrations.observations[key] for key in keys}
        shown.demonstrations = dataclasses.replace(self.demonstrations, observations=observations)
        shown._augment = None
        return shown

    def marking(self, **marks: NDArray[np.int64]) -> Windows:
        """Return the same windows whose batches have further whole numbers of their newest transitions.

        Args:
            **marks: (N, *) by their names in `Batch`; all numbers of a counterpart are -1.
        """
        marked = copy.copy(self)
        marked._marks = marks
        return marked

    def _groups_of(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The group of each window, or of the window whose counterpart it is."""
        assert self._groups is not None
        originals, place = self._locate(windows)
        return self._groups.of(place, self._ends[place] - (self._window_ends[place] - originals))

    def _locate(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each window, or the window whose counterpart it is, and the index of its episode in `episodes`."""
        originals = windows % max(self.num_transitions, 1)
        return originals, np.searchsorted(self._window_ends, originals, side="right")

    def blocks(self) -> Iterator[tuple[Arrays, NDArray[np.float32]]]:
        """Walk through all transitions in blocks of consecutive ones, each block followed by its counterpart.

        Frames of videos are not decoded: black pictures are in their place.

        Yields:
            Observations (N, *shape) by key and actions (N, action_dim).
        """
        for start, end in _spans(self._starts, self._ends):
            for low in range(start, end, BLOCK_ROWS):
                rows = slice(low, min(low + BLOCK_ROWS, end))
                observations = {
                    key: _black(values.shape[1:], rows) if key in self.demonstrations.frames else values[rows]
                    for key, values in self.demonstrations.observations.items()
                }
                actions = self.demonstrations.actions[rows]
                yield observations, actions
                if self._augment is not None:
                    copies = {key: np.array(values) for key, values in observations.items()}
                    everything = np.ones(len(actions), np.bool_)
                    yield _with_counterparts(self._augment, copies, np.array(actions), everything)

    def last_observations(self, keys: Sequence[str]) -> Arrays:
        """The last observation of each episode under some keys, (E, D) each."""
        return {key: self.demonstrations.observations[key][self._ends - 1] for key in keys}

    def batch_at(self, step: int, batch_size: int, seed: int) -> NDArray[np.int64]:
        """Window numbers of training step `step`; each epoch has a permutation of its own, drawn from (seed, epoch).

        The order has no state: the batch of a step is the same whether or not the training was interrupted before it.
        Where pictures are in videos, it is one in which neighbouring windows come close together, see `Groups`.

        Args:
            step: number of the training step, 0 or more.
            batch_size: windows per step; if there are fewer windows, each batch holds all of them.
            seed: seed of the training.

        Returns:
            (min(batch_size, len(self)),) int64; the incomplete batch at the end of an epoch is left out.
        """
        size = min(batch_size, len(self))
        epoch, position = divmod(step, len(self) // size)
        if self._epoch_key != (seed, epoch):
            self._order = np.arange(len(self), dtype=np.uint32 if len(self) < 2**32 else np.int64)  # half the memory
            generator = np.random.default_rng((seed, epoch))
            if self._groups is None:
                generator.shuffle(self._order)
            else:
                self._order = self._order[self._groups.shuffled(self._groups_of(self._order), generator)]
            self._epoch_key = (seed, epoch)
        return self._order[position * size : (position + 1) * size].astype(np.int64)


def _black(shape: Sequence[int], rows: slice) -> NDArray[np.uint8]:
    """Black pictures for rows, all in the memory of one pixel."""
    return np.broadcast_to(np.uint8(0), (rows.stop - rows.start, *shape))


def _with_counterparts(
    augment: Augment, observations: Arrays, actions: NDArray[np.float32], where: NDArray[np.bool_]
) -> tuple[Arrays, NDArray[np.float32]]:
    """Replace the rows of a batch that `where` marks with their counterparts."""
    mirrored, mirrored_actions = augment({key: values[where] for key, values in observations.items()}, actions[where])
    for key, values in observations.items():
        values[where] = mirrored[key]
    actions[where] = mirrored_actions
    return observations, actions


def _spans(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Join neighbouring episodes into spans of consecutive transitions, and yield each span's start and end."""
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    for span in np.split(np.arange(len(starts)), breaks):
        if len(span):
            yield int(starts[span[0]]), int(ends[span[-1]])
