"""Settings in another project's file, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Far above real pictures, vectors and horizons; a larger one in a file would take any amount of memory.
MOST_SIZE = 10_000


def is_size(value: Any) -> bool:
    """Whether a value can be the size of a picture or a vector."""
    return type(value) is int and 0 < value <= MOST_SIZE


class Settings:
    """Settings by name.

    Args:
        data: the settings.
        path: the file that holds them, for messages.
        place: where in the file they are, for messages.
    """

    def __init__(self, data: Mapping[str, Any], path: Path, place: str = "") -> None:
        self.data, self.path, self.place = data, path, place

    def take(self, name: str, kind: type[T], default: Any = ...) -> T:
        """Return a setting of this type.

        Raises:
            ValueError: it is missing and has no default, or it is of another type.
        """
        value = self.data.get(name, default)
        wanted = (int, float) if kind is float else kind
        if value is ... or not isinstance(value, wanted) or (kind in (int, float) and isinstance(value, bool)):
            got = "nothing" if value is ... else repr(value)[:80]
            raise ValueError(f"{self.path} must hold {self.place + name!r} as {kind.__name__}; got {got}")
        return value  # type: ignore[return-value]

    def count(self, name: str) -> int:
        """Return a whole number within 1..`MOST_SIZE`.

        Raises:
            ValueError: it is something else.
        """
        if not is_size(value := self.take(name, int)):
            raise ValueError(
                f"{self.path} must hold {self.place + name!r} as a number from 1 to {MOST_SIZE}; got {repr(value)[:80]}"
            )
        return value

    def within(self, name: str) -> Settings:
        """Return the settings that lie under a name."""
        return Settings(self.take(name, dict), self.path, f"{self.place}{name}.")

    def pair(self, name: str, default: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Return a height and a width, or None.

        Raises:
            ValueError: it is something else.
        """
        value = self.data.get(name, default)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(is_size, value)):
            raise ValueError(
                f"{self.path} must hold {self.place + name!r} as a height and a width; got {repr(value)[:80]}"
            )
        return value[0], value[1]
