"""Videos of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]], fps: int) -> None:
    """Write an mp4 (H.264) that browsers and phones play.

    Args:
        path: of the file.
        frames: (H, W, 3) uint8, equal shapes; an odd row or column at the edge is cut off, as H.264 needs even sizes.
        fps: pictures a second.
    """
    height, width = (size - size % 2 for size in frames[0].shape[:2])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            cropped = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(cropped, format="rgb24")))
        container.mux(stream.encode())
