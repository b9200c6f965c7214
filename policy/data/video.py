"""Videos: their headers, and runs of their frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

# Up to about this gap, decoding the frames in between is faster than seeking the next keyframe.
SKIP_SECONDS = 2.0
# If frames are not stored in the order of their times, a keyframe's place in the file deviates from its time by up to
# about this much.
REORDER_SECONDS = 1.0


class VideoFile:
    """One video file, kept open at the frame that was decoded last, so that episodes in order need no seek.

    Args:
        name: its name, for messages.
        file: the file.
        threads: threads that decode it; 0 leaves their number to FFmpeg.
    """

    def __init__(self, name: str, file: Path, *, threads: int = 0) -> None:
        self.name = name
        try:
            # With the format named, FFmpeg cannot take the file for a playlist, which can lead to any other file.
            self._container = av.open(str(file.resolve()), format="mp4")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._damaged(error) from error
        if not self._container.streams.video:
            self._container.close()
            raise ValueError(f"{name} holds no video")
        self._stream = self._container.streams.video[0]
        if getattr(self._stream, "codec_context", None) is None:
            self._container.close()
            raise ValueError(
                f"{name} is coded in a way for which PyAV has no decoder: install a PyAV that has it (pip install -U"
                " av), or code the video again (ffmpeg -c:v libx264)"
            )
        if self._stream.time_base is None:
            raise ValueError(f"{name} does not say when its frames are shown")
        self._time_base = self._stream.time_base
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = threads
        # A frame's own to_ndarray() would make a new converter each time, which takes longer than decoding.
        self._converter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._position = -1.0  # seconds; infinite if the next frame can be reached only by a seek

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width as the header states them, before the decoder makes frames of that size; None if unknown."""
        context = self._stream.codec_context
        return (context.height, context.width) if context.height and context.width else None

    def check_length(self, start: float, fps: float, count: int, *, alone: bool = False) -> None:
        """Compare the number of frames that the header states with the end of an episode, without decoding.

        Args:
            start: time of the episode's first frame, seconds.
            fps: frames per second.
            count: number of its frames.
            alone: whether these must be the last frames of the file.

        Raises:
            ValueError: the file has too few frames, or frames after an episode that must be the last.
        """
        stated, end = self._stream.frames, round(start * fps) + count
        if stated and stated < end:
            raise ValueError(
                f"{self.name} has {stated} frames, and the episode's {count} frames end at {end}: the video is not"
                " whole, or belongs to another table"
            )
        if stated > end and alone:
            raise self._longer(count)

    def read(
        self,
        start: float,
        fps: float,
        count: int,
        check: Callable[[tuple[int, ...]], None],
        *,
        alone: bool = False,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Decode consecutive frames.

        Args:
            start: time of the first frame, seconds; rounding errors do no harm.
            fps: frames per second.
            count: number of frames.
            check: raises if a frame's shape (H, W, 3) is a wrong one.
            alone: whether these must be the last frames of the file.
            out: (count, H, W, 3), receives the frames; by default a new array.

        Returns:
            The frames, (count, H, W, 3) RGB.

        Raises:
            ValueError: the file is damaged, a frame is missing or has another shape, or there are frames after an
                episode that must be the last.
        """
        try:
            return self._read(start, fps, count, check, alone, out)
        except (av.FFmpegError, OSError) as error:
            self._position = math.inf
            raise self._damaged(error) from error
        except ValueError:
            self._position = math.inf
            raise

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _read(
        self,
        start: float,
        fps: float,
        count: int,
        check: Callable[[tuple[int, ...]], None],
        alone: bool,
        pictures: NDArray[np.uint8] | None,
    ) -> NDArray[np.uint8]:
        if self.size:
            check((*self.size, 3))
        half = 0.5 / fps
        if not self._position < start - half < self._position + SKIP_SECONDS + half:
            self._seek(start, start + half)
        expected = 0
        for frame in self._frames:
            number = round((self._seconds(frame) - start) * fps)
            if number < 0:
                continue
            if number != expected:
                raise ValueError(
                    f"{self.name}: frame {expected} of {count} is missing at {start + expected / fps:.3f} s"
                )
            if frame.is_corrupt:
                raise ValueError(f"{self.name} is damaged at {self._position:.3f} s")
            if expected == 0:
                check((frame.height, frame.width, 3))
            if pictures is None:
                pictures = np.empty((count, frame.height, frame.width, 3), np.uint8)
            if (frame.height, frame.width) != pictures.shape[1:3]:
                raise ValueError(f"{self.name} changes its size at {self._position:.3f} s")
            pictures[number] = self._converter.reformat(frame, format="rgb24").to_ndarray()
            expected += 1
            if expected == count:
                break
        if pictures is None or expected < count:
            raise ValueError(f"{self.name} ends after {expected} of {count} frames")
        if alone and next(self._frames, None) is not None:
            raise self._longer(count)
        return pictures

    def _seek(self, start: float, latest: float) -> None:
        """Seek a keyframe from which the frame at `start` can be reached."""
        for target in (latest, start - REORDER_SECONDS, 0.0):
            self._container.seek(self._ticks(target), stream=self._stream)
            frames = self._container.decode(self._stream)
            first = next(frames, None)
            if first is not None and self._seconds(first) <= latest:
                break
        self._frames = chain([] if first is None else [first], frames)

    def _ticks(self, seconds: float) -> int:
        return (self._stream.start_time or 0) + round(max(0.0, seconds) / self._time_base)

    def _seconds(self, frame: av.VideoFrame) -> float:
        if frame.pts is None:
            raise ValueError(f"{self.name} has a frame without a time")
        self._position = float((frame.pts - (self._stream.start_time or 0)) * self._time_base)
        return self._position

    def _longer(self, count: int) -> ValueError:
        return ValueError(f"{self.name} has more frames than the episode's {count}")

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.name} is damaged ({error})")
