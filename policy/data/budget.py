"""What reading a dataset may take of memory and disk; formats ask before they read, with sizes from headers."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from policy.common.observations import is_image

# Limit and use of a container's memory, its statistics, and the name of the cached files in them, which can be dropped:
# in versions 2 and 1 of control groups.
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)


class BudgetError(ValueError):
    """Reading would take more than the budget; leaving out one episode would not help."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The bytes that reading may take; without limits by default.

    Attributes:
        memory: largest array, or episode, in memory.
        disk: largest entry of the cache.
        max_episodes: number of episodes that will be read; None for all of them.
        image_size: height and width of the images in the cache; None for their own.
        is_transformed: whether a function of the user's changes the observations, so that only the converted episodes
            show the size of the cache entry.
    """

    memory: int = sys.maxsize
    disk: int = sys.maxsize
    max_episodes: int | None = None
    image_size: int | None = None
    is_transformed: bool = False

    def check_episodes(self, lengths: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a dataset whose episodes are too large; formats call it before they read the first one.

        Args:
            lengths: number of transitions of each episode, in the order of reading.
            shapes: shape of one transition under each key, actions included.

        Raises:
            BudgetError: the longest episode, or the whole cache entry, takes more than allowed.
        """
        lengths = lengths[: self.max_episodes]
        longest = max(lengths, default=0)
        self.check_memory(longest * _row_bytes(shapes, 8), f"its longest episode, {longest} transitions,")
        if not self.is_transformed:
            self.check_disk(self.cached_bytes(lengths, shapes), f"its {len(lengths)} episodes")

    def cached_bytes(self, lengths: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> int:
        """The bytes that episodes take in the cache; see `check_episodes`."""
        cached = {key: self._cached_shape(shape) for key, shape in shapes.items()}
        return sum(lengths[: self.max_episodes]) * _row_bytes(cached, 4)

    def check_memory(self, needed: int, what: str) -> None:
        """Refuse to read something that takes more memory than allowed.

        Args:
            needed: its bytes.
            what: its description, for the message.

        Raises:
            BudgetError: it takes more.
        """
        _check(needed, self.memory, f"{what} needs {readable(needed)} of memory", "write it in smaller parts, ")

    def check_disk(self, needed: int, what: str) -> None:
        """Refuse to write something that takes more of the cache's disk than allowed.

        Args:
            needed: its bytes.
            what: its description, for the message.

        Raises:
            BudgetError: it takes more.
        """
        _check(needed, self.disk, f"{what} need {readable(needed)} of disk", "set dataset.cache_dir to a larger disk, ")

    def _cached_shape(self, shape: Sequence[int]) -> Sequence[int]:
        return shape if self.image_size is None or not is_image(shape) else (self.image_size, self.image_size, shape[2])


def _check(needed: int, allowed: int, what: str, remedy: str) -> None:
    if needed > allowed:
        raise BudgetError(
            f"{what} as its headers say, and dataset.max_bytes allows {readable(allowed)} (by default half of what is"
            f" free): {remedy}raise dataset.max_bytes, or take less with dataset.max_episodes,"
            " dataset.observation_keys or dataset.image_size"
        )


def _row_bytes(shapes: Mapping[str, Sequence[int]], number: int) -> int:
    """Bytes of one transition: a byte for each value of an image, `number` bytes for each value of a vector."""
    return sum(math.prod(shape) * (1 if is_image(shape) else number) for shape in shapes.values())


def readable(size: int) -> str:
    """Write a number of bytes for people.

    >>> readable(1536), readable(1023 * 2**20), readable(3 * 2**40)
    ('1.5 KiB', '1023 MiB', '3 TiB')
    """
    power = min(max(size.bit_length() - 1, 0) // 10, 6)
    number = size / 2 ** (10 * power)
    return f"{number:{'.0f' if number >= 1000 else '.3g'}} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def free_memory() -> int:
    """The bytes of memory that this process can still take, within the limit of its container."""
    free = []
    with suppress(OSError, ValueError, IndexError):  # systems without it are not limited
        text = Path("/proc/meminfo").read_text()
        free.append(1024 * int(text.split("MemAvailable:")[1].split()[0]))
    for limit, used, statistics, cached in CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # the limit may be the word "max"
            said = [Path("/sys/fs/cgroup", file).read_text() for file in (limit, used, statistics)]
            lines = dict(line.split() for line in said[2].splitlines())
            free.append(int(said[0]) - int(said[1]) + int(lines[cached]))
    return max(0, min(free, default=sys.maxsize))


def free_disk(folder: Path) -> int:
    """The free bytes of the disk that holds a folder, which need not exist yet."""
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return sys.maxsize
