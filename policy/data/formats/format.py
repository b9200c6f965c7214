"""What a format of demonstrations is: how its datasets are found and opened."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy would make up a fifth of a command's start
    from policy.data.episode import EpisodeReader, Request


@dataclass(frozen=True, kw_only=True)
class Format:
    """How demonstrations of one format are read.

    Attributes:
        open: Opens a dataset. It takes the dataset's path, its files by relative path (it must open no others), and
            the user's request.
        find: Maps `dataset.path` to the dataset's file or folder. A format whose datasets have names besides paths
            replaces it.
        looks: Tells by the names of its files whether a dataset may be of this format, for messages; None says nothing.
        has_videos: whether frames may be in videos, which `dataset.decode` is for.
    """

    open: Callable[[Path, Mapping[str, Path], Request], EpisodeReader]
    find: Callable[[Path], Path] = Path.expanduser
    looks: Callable[[Collection[str]], bool] | None = None
    has_videos: bool = False
