"""Videos of rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from policy.common.control_rate import stated_rate
from policy.common.files import replacing_file
from policy.common.progress import progress
from policy.rollout.episodes import Controller, MakeEnv, record_episode
from policy.statistics.results import EpisodeResult

# Frames per second for an environment that does not state its control rate; 10 Hz is common for robot arms.
DEFAULT_FPS = 10


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int) -> None:
    """Write an mp4 (H.264) that browsers and phones play.

    Args:
        path: the file.
        frames: (H, W, 3) uint8, all of one shape; an odd last row or column is cut off, because H.264 needs even sizes.
        fps: frames per second.
    """
    height, width = (size - size % 2 for size in frames[0].shape[:2])
    with replacing_file(path) as new, av.open(str(new), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            cropped = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(cropped, format="rgb24")))
        container.mux(stream.encode())


def record_videos(
    make_env: MakeEnv,
    takes: Sequence[tuple[Controller, int]],
    file_of: Callable[[int, EpisodeResult], Path],
) -> Iterator[tuple[EpisodeResult, Path]]:
    """Run episodes and write a video of each.

    Args:
        make_env: makes an environment; accepts `render_mode`.
        takes: the controller and the seed of each episode.
        file_of: returns the path of a video, given the index of its take and the result.

    Yields:
        The result and the video file of each episode.

    Raises:
        RuntimeError: rendering is not possible on this machine.
    """
    with (
        closing(make_env(render_mode="rgb_array")) as env,
        progress(total=len(takes), desc="video", unit="episode") as bar,
    ):
        for number, (controller, seed) in enumerate(takes):
            result, frames = record_episode(controller, env, seed)
            file = file_of(number, result)
            write_video(file, frames, fps=max(1, round(stated_rate(env.metadata.get("render_fps")) or DEFAULT_FPS)))
            bar.update()
            yield result, file
