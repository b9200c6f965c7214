"""Demonstrations on disk, and training windows over them."""

from policy.data.demonstrations import Demonstrations
from policy.data.minari_format import check_absent, dataset_name, read_minari, write_minari
from policy.data.windows import Windows, split_episodes
from policy.data.zarr_replay import read_zarr_replay

__all__ = [
    "Demonstrations",
    "Windows",
    "check_absent",
    "dataset_name",
    "read_minari",
    "read_zarr_replay",
    "split_episodes",
    "write_minari",
]
