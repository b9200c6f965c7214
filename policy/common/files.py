"""Files that are either whole or as they were before."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """Write a file under another name, which becomes its own once the content is complete.

    Args:
        file: replaced if all goes well inside, and as before otherwise.

    Yields:
        The path to write to.
    """
    new = file.with_name(f".{file.name}.new")
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file; a disk that is full, or a kill, leaves the file of before.

    Args:
        file: replaced once the new content is complete.
        text: the content; its line ends are written as they are.

    Raises:
        OSError: it cannot be written.
    """
    with replacing_file(file) as new:
        new.write_text(text, encoding="utf-8", newline="")


def json_text(data: Any, indent: int | None = None) -> str:
    """Return JSON as every program reads it: numbers that are not finite, which JSON does not have, become null.

    >>> json_text({"loss": float("nan"), "steps": 3})
    '{"loss": null, "steps": 3}'
    """
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def as_json(data: Any) -> Any:
    """Return data as a JSON file gives it back: tuples are lists, and numbers that are not finite are None.

    >>> as_json({"widths": (64, 128)})
    {'widths': [64, 128]}
    """
    return json.loads(json_text(data))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the ends of paths by which they are told apart: the last part, or as many as it takes.

    >>> distinct_names(["/data/pusht"])
    ['pusht']
    >>> distinct_names(["/data/door/human-v2", "/data/pen/human-v2"])
    ['door/human-v2', 'pen/human-v2']
    """
    parts = [Path(path).parts for path in paths]
    ends = (["/".join(part[-count:]) for part in parts] for count in range(1, max(map(len, parts), default=0) + 1))
    return next((names for names in ends if len(set(names)) == len(names)), list(paths))
