"""The order in which windows with pictures in videos are trained on: shuffled, and decoded in runs.

A frame in a video can be decoded only after those since the last key frame. Windows in a random order would each decode
a run of frames for one or two of them. Here the windows of an episode are cut into groups of neighbours, whose frames
are decoded in one go and kept until the last of their windows was taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Windows in a group: the larger number where decoded frames are small. Both are whole numbers of the usual distances
# between key frames (1, 2, 5, 10; 3, 6, 15, 30), so that a group begins at a key frame.
LENGTHS = (30, 10)
# Groups from which a batch should draw, or more.
ENOUGH = 32
# The most bytes of decoded frames, and the most windows, from which a batch draws.
SPREAD_BYTES = 256 * 2**20
SPREAD_WINDOWS = 4096


class Groups:
    """Groups of neighbouring windows, numbered through the episodes.

    The first group of an episode begins with it. The windows of each other group begin `obs_horizon - 1` transitions
    later than its frames, so that all frames that they observe are in the group.

    Args:
        starts: (E,) first transition of each episode.
        ends: (E,) exclusive end of each episode.
        obs_horizon: observations in a window.
        frame_bytes: bytes of one transition's decoded frames, of all cameras.
    """

    def __init__(self, starts: NDArray[np.int64], ends: NDArray[np.int64], obs_horizon: int, frame_bytes: int) -> None:
        self._before = obs_horizon - 1
        spreads = {length: SPREAD_BYTES // (frame_bytes * (length + self._before)) for length in LENGTHS}
        self.length = next((length for length, spread in spreads.items() if spread >= ENOUGH), LENGTHS[-1])
        self.spread = max(4, min(spreads[self.length], SPREAD_WINDOWS // self.length))
        self._starts, self._ends = starts, ends
        self._firsts = np.cumsum([0, *(np.maximum(ends - starts - 1 - self._before, 0) // self.length + 1)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def needed(self, batch_size: int, batches: int) -> int:
        """For how many groups there should be memory, so that as many batches have theirs at once.

        A batch holds windows of the groups that are mixed there, and of those that have taken their places by its end.

        Args:
            batch_size: windows in a batch.
            batches: neighbouring batches.
        """
        windows = max(1, int((self._ends - self._starts).sum()) // len(self))  # of a group, fewer in short episodes
        return self.spread + 2 + batches * (batch_size // windows + 1)

    @property
    def rows(self) -> int:
        """The most transitions whose frames are in a group."""
        return self.length + self._before

    def of(self, episodes: NDArray[np.int64], transitions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The groups of windows.

        Args:
            episodes: (B,) the index of each window's episode, 0..E - 1.
            transitions: (B,) the transition of each window.

        Returns:
            (B,) group numbers.
        """
        later = transitions - self._starts[episodes] - self._before
        return self._firsts[episodes] + np.maximum(later, 0) // self.length

    def bounds(self, groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first transition of each group, and its exclusive end, (B,) each."""
        episodes = np.searchsorted(self._firsts, groups, side="right") - 1
        first = self._starts[episodes] + (groups - self._firsts[episodes]) * self.length
        return first, np.minimum(first + self.rows, self._ends[episodes])

    def shuffled(self, groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """Draw a permutation in which the windows of a group are never far apart.

        The groups are put into a random order. A window comes a random distance after its group, up to `spread` groups,
        so that at each place the windows of `spread` groups are mixed.

        Args:
            groups: (N,) the group of each window.
            generator: draws the permutation.

        Returns:
            (N,) window numbers.
        """
        places = generator.permutation(len(self))
        return np.argsort(places[groups] + generator.uniform(0, self.spread, len(groups)), kind="stable")
