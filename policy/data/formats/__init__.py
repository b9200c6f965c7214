"""One reader per public format of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from policy.data.episode import EpisodeReader, Request
from policy.data.formats.lerobot import open_lerobot
from policy.data.formats.minari import open_minari
from policy.data.formats.robomimic import open_robomimic
from policy.data.formats.zarr_replay import open_zarr_replay

# Each takes the dataset's path, its files by relative path (nothing else may be opened), and what the user asked for.
FORMATS: dict[str, Callable[[Path, Mapping[str, Path], Request], EpisodeReader]] = {
    "lerobot": open_lerobot,
    "minari": open_minari,
    "robomimic": open_robomimic,
    "zarr": open_zarr_replay,
}
