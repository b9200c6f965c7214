"""Text files that are either whole or as they were before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Write a text file; a disk that is full, or a kill, leaves the file of before.

    Args:
        file: replaced once the new content is complete.
        text: the content; its line ends are written as they are.

    Raises:
        OSError: it cannot be written.
    """
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_text(text, encoding="utf-8", newline="")
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def json_text(data: Any, indent: int | None = None) -> str:
    """Return JSON as every program reads it: numbers that are not finite, which JSON does not have, become null.

    >>> json_text({"loss": float("nan"), "steps": 3})
    '{"loss": null, "steps": 3}'
    """
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
