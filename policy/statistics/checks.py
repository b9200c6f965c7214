"""Argument checks that the statistics share; every message says what came and what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def cells_by_episodes(values: Any, name: str, kind: type) -> Array:
    """Check a matrix of one row per cell and one column per episode, and convert it.

    Args:
        values: (K, N) finite numbers, K and N 1 or more.
        name: the argument's name, for messages.
        kind: type of the elements to return, `float` or `bool`.

    Returns:
        (K, N) array of `kind`.

    Raises:
        ValueError: rows of different lengths, another shape, values that are not finite numbers, or, for `bool`, values
            other than 0 and 1.
    """
    try:
        matrix = np.asarray(values)
        lengths = None
    except ValueError:
        lengths = [np.size(row) for row in values]
    if lengths is not None:
        raise ValueError(
            f"{name} must have the same episodes in every cell; got {lengths} episodes: use those that all cells ran"
        )
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} must be cells x episodes, one or more of each; got shape {matrix.shape}")
    if matrix.dtype == object or not np.all(np.isfinite(matrix.astype(float))):
        raise ValueError(f"{name} must be finite numbers; got NaN, infinity or something else: leave such episodes out")
    if kind is bool and not np.all((matrix == 0) | (matrix == 1)):
        raise ValueError(f"{name} must be true or false (1 or 0); got {matrix.min()} to {matrix.max()}")
    return matrix.astype(kind)


def check_bounds(values: Array, bounds: tuple[float, float]) -> None:
    """Reject values outside their stated bounds."""
    if not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise ValueError(f"values must lie within the bounds {bounds}; got {values.min():g} to {values.max():g}")


def check_fraction(name: str, value: float, above: float = 0) -> None:
    """Reject a value outside the open interval from `above` to 1."""
    if not above < value < 1:
        raise ValueError(f"{name} must be above {above:g} and below 1; got {value}")


def check_reference(reference: int, cells: int) -> None:
    """Reject a cell to compare with that is not one of the cells."""
    if not 0 <= reference < cells:
        raise ValueError(f"reference must be the index of a cell, 0 to {cells - 1}; got {reference}")
