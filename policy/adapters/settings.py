"""Settings in another project's file, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
# The longest trajectory that is read: far more than policies have, and few enough for a sampler's memory.
MOST_ACTIONS = 10_000


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

    def count(self, name: str, most: int | None = None) -> int:
        """Return a whole number of 1 or more, and of at most `most`.

        Raises:
            ValueError: it is something else.
        """
        value = self.take(name, int)
        if value < 1 or (most is not None and value > most):
            allowed = "of 1 or more" if most is None else f"from 1 to {most}"
            raise ValueError(
                f"{self.path} must hold {self.place + name!r} as a number {allowed}; got {repr(value)[:80]}"
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
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
            raise ValueError(
                f"{self.path} must hold {self.place + name!r} as a height and a width; got {repr(value)[:80]}"
            )
        return value[0], value[1]
