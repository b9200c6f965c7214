"""Arrays one after the other, as one: their rows are copied when they are taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class JoinedArray:
    """The rows of some arrays (N_i, *shape), one array after the other, in place of their concatenation (N, *shape).

    Args:
        parts: one array or more, each of a row or more and of two axes or more, of the same
            shape besides their rows and of the same dtype.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self.parts = tuple(parts)
        self.dtype = self.parts[0].dtype
        self.ndim = self.parts[0].ndim
        self._ends: list[int] = np.cumsum([len(part) for part in self.parts]).tolist()
        self.shape = (self._ends[-1], *self.parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def take(self, rows: NDArray[np.int64], axis: int = 0) -> NDArray[Any]:
        """Copy rows, as `numpy.take` does.

        Args:
            rows: any number of row numbers, 0..N - 1, of any shape.
            axis: 0, the axis of the rows.

        Returns:
            The rows, (*rows.shape, *shape).

        Raises:
            IndexError: there is no such row.
        """
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must be within 0..{len(self) - 1}; got {rows.min()} to {rows.max()}")
        # The rows of other parts are clipped to the ends of the first one, and replaced by their own below.
        found = self.parts[0].take(rows, axis=0, mode="clip")
        for start, end, part in zip(self._ends[:-1], self._ends[1:], self.parts[1:], strict=True):
            inside = (rows >= start) & (rows < end)
            found[inside] = part.take(rows[inside] - start, axis=0)
        return found

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        if not isinstance(rows, slice):
            return self.take(np.arange(len(self))[rows])
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self.take(np.arange(start, stop, step))
        starts = [0, *self._ends[:-1]]
        pieces = [
            part[max(start - first, 0) : max(stop - first, 0)] for first, part in zip(starts, self.parts, strict=True)
        ]
        filled = [piece for piece in pieces if len(piece)]
        return filled[0] if len(filled) == 1 else np.concatenate(pieces)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(np.concatenate(self.parts), dtype)
