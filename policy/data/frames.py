"""Pictures that stay in their videos: arrays of frames, which are decoded when they are taken."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # PyAV would make up a fifth of a command's start
    from policy.data.video import VideoFile

# Video files that stay open, each with about 10 MB for its decoder; opening one again takes as long as a few frames.
OPEN_FILES = 24


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The frames of one episode in a video file.

    Attributes:
        name: the file's name in the dataset.
        file: the file.
        start: time of the first frame, seconds.
        fps: frames per second.
        count: number of frames.
        episode: the episode's name, for messages.
    """

    name: str
    file: Path
    start: float
    fps: float
    count: int
    episode: str


class Frames:
    """The frames of some episodes, (N, H, W, 3) uint8 RGB, in place of an array of them.

    Args:
        clips: the frames of each episode, in order.
        stored: height and width of the frames in the videos.
        size: height and width to which they are resized; None for their own.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, clips: Sequence[Clip], stored: tuple[int, int], size: int | None = None) -> None:
        self.clips = tuple(clips)
        self.stored = stored
        self.resized_to = size
        self._ends = np.cumsum([clip.count for clip in self.clips], dtype=np.int64)
        height, width = stored if size is None else (size, size)
        self.shape = (int(self._ends[-1]), height, width, 3)
        self._videos: OrderedDict[Path, VideoFile] = OrderedDict()
        self._lock = RLock()  # a video that is read by two threads would be at a wrong place for one of them

    def __reduce__(self) -> tuple[Any, ...]:
        return Frames, (self.clips, self.stored, self.resized_to)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape))

    @property
    def row_bytes(self) -> int:
        """The bytes of one decoded frame."""
        return self.size // len(self)

    def resized(self, size: int) -> Frames:
        """Return the same frames resized to (size, size)."""
        return Frames(self.clips, self.stored, size)

    def take(self, rows: NDArray[np.int64], axis: int = 0) -> NDArray[np.uint8]:
        """Decode frames, as `numpy.take` takes rows: each of them once, and neighbours in one go.

        Args:
            rows: any number of row numbers, of any shape.
            axis: 0, the axis of the rows.

        Returns:
            The frames, (*rows.shape, H, W, 3).

        Raises:
            ValueError: a frame cannot be decoded; the message names file, episode and frame.
        """
        wanted, places = np.unique(rows, return_inverse=True)
        clips = np.searchsorted(self._ends, wanted, side="right")
        breaks = np.flatnonzero((np.diff(wanted) > 1) | (np.diff(clips) > 0)) + 1
        found = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        for run in np.split(np.arange(len(wanted)), breaks) if len(wanted) else []:
            self.read(int(wanted[run[0]]), found[run[0] : run[-1] + 1])
        return found[places.reshape(np.shape(rows))]

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        return self.take(np.arange(len(self))[rows])

    def read(self, first: int, out: NDArray[np.uint8]) -> None:
        """Decode consecutive frames of one episode.

        Args:
            first: row number of the first one.
            out: (n, H, W, 3), receives the frames.

        Raises:
            ValueError: a frame cannot be decoded; the message names file, episode and frame.
        """
        number = int(np.searchsorted(self._ends, first, side="right"))
        clip = self.clips[number]
        place = first - (int(self._ends[number]) - clip.count)
        start = clip.start + place / clip.fps
        with self._lock:
            try:
                if self.resized_to is None:
                    self._opened(clip).read(start, clip.fps, len(out), self._check, out=out)
                else:
                    frames = self._opened(clip).read(start, clip.fps, len(out), self._check)
                    out[:] = resized(frames, self.resized_to)
            except ValueError as error:
                raise ValueError(
                    f"episode {clip.episode}, frames {place} to {place + len(out) - 1} of {clip.count} in"
                    f" {clip.file}: {error}; fetch the file again, or leave the episode out with dataset.decode=cache"
                    " dataset.on_bad_episode=skip, which decodes all frames before training"
                ) from error

    def _opened(self, clip: Clip) -> VideoFile:
        from policy.data.video import VideoFile

        if clip.file not in self._videos:
            self._videos[clip.file] = VideoFile(clip.name, clip.file, threads=1)
            if len(self._videos) > OPEN_FILES:
                self._videos.popitem(last=False)[1].close()
        self._videos.move_to_end(clip.file)
        return self._videos[clip.file]

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape != (*self.stored, 3):
            raise ValueError(f"a picture has shape {shape}; those before it have {(*self.stored, 3)}")


def resized(images: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """Resize (N, H, W, C) uint8 images to (N, size, size, C), by Pillow's antialiased bilinear filter."""
    from PIL import Image

    if images.shape[1:3] == (size, size):
        return images
    if images.shape[3] == 4:  # Pillow would weight the first three by the fourth, as if it were transparency
        return np.concatenate([resized(images[..., :3], size), resized(images[..., 3:], size)], axis=3)
    frames = [Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image) for image in images]
    smaller = [np.asarray(frame.resize((size, size), Image.Resampling.BILINEAR)) for frame in frames]
    return np.stack(smaller).reshape(len(images), size, size, images.shape[3])
