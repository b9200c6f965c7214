"""Demonstrations on disk, and training windows over them."""

from policy.data.demonstrations import Demonstrations
from policy.data.episode import Episode
from policy.data.minari_writer import check_absent, dataset_name, write_minari
from policy.data.reading import read_demonstrations
from policy.data.windows import Windows, split_episodes

__all__ = [
    "Demonstrations",
    "Episode",
    "Windows",
    "check_absent",
    "dataset_name",
    "read_demonstrations",
    "split_episodes",
    "write_minari",
]
