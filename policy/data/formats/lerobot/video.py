"""Videos, decoded one episode after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from policy.data.formats.lerobot.info import Feature

# Up to about this gap, decoding the frames in between is faster than seeking the next keyframe.
SKIP_SECONDS = 2.0
# If frames are not stored in the order of their times, a keyframe's place in the file deviates from its time by up to
# about this much.
REORDER_SECONDS = 1.0


class VideoFile:
    """One video file, kept open at the frame that was decoded last, so that episodes in order need no seek."""

    def __init__(self, name: str, file: Path) -> None:
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
        # A frame's own to_ndarray() would make a new converter each time, which takes longer than decoding.
        self._converter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._position = -1.0  # seconds; infinite if the next frame can be reached only by a seek

    def read(self, start: float, fps: float, count: int, feature: Feature, *, alone: bool) -> NDArray[np.uint8]:
        """Decode an episode.

        Args:
            start: time of the first frame, seconds; rounding errors do no harm.
            fps: frames per second.
            count: number of frames.
            feature: the feature, for the frames' shape.
            alone: whether these must be the last frames of the file.

        Returns:
            The frames, (count, H, W, 3) RGB.

        Raises:
            ValueError: the file is damaged, a frame is missing or has another shape, or there are frames after an
                episode that must be the last.
        """
        try:
            return self._read(start, fps, count, feature, alone)
        except (av.FFmpegError, OSError) as error:
            self._position = math.inf
            raise self._damaged(error) from error
        except ValueError:
            self._position = math.inf
            raise

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _read(self, start: float, fps: float, count: int, feature: Feature, alone: bool) -> NDArray[np.uint8]:
        context = self._stream.codec_context
        # The header's size, before the decoder makes frames of it; some files state none.
        if context.height and context.width:
            feature.check_picture((context.height, context.width, 3))
        half = 0.5 / fps
        if not self._position < start - half < self._position + SKIP_SECONDS + half:
            self._seek(start, start + half)
        pictures: NDArray[np.uint8] | None = None
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
            if pictures is None:
                feature.check_picture((frame.height, frame.width, 3))
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
            raise ValueError(f"{self.name} has more frames than the episode's {count}")
        return pictures

    def _seek(self, start: float, latest: float) -> None:
        """Seek a keyframe from which the frame at `start` can be reached."""
        for target in (start - REORDER_SECONDS, 0.0):
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

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.name} is damaged ({error})")
