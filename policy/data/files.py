"""The files of a dataset: what is in its folder, and nothing that lies outside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def list_files(path: Path) -> dict[str, Path]:
    """All files of a dataset.

    Args:
        path: a file, or a folder.

    Returns:
        Path relative to the folder, with slashes, to the file; a single file stands under its name.

    Raises:
        ValueError: nothing is there, a file cannot be read, or a link leads out of the folder.
    """
    try:
        files = {path.name: path} if path.is_file() else _files_under(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not files:
        raise ValueError(f"no dataset at {path}: set dataset.path to the file or folder that holds the demonstrations")
    for file in files.values():
        if not os.access(file, os.R_OK):
            raise ValueError(f"{file} cannot be read: ask its owner for permission (chmod +r)")
    return files


def _files_under(path: Path) -> dict[str, Path]:
    root = Path(os.path.realpath(path))
    files = {}
    for folder, folders, names in os.walk(root, onerror=_unless_missing):
        for entry in (Path(folder, name) for name in (*folders, *names)):
            # realpath, as Path.resolve raises on links that lead in circles.
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(root):
                raise ValueError(
                    f"{path}: {entry.relative_to(root)} is a link that leaves the folder; if you trust it, copy the"
                    " dataset with its links followed (cp -rL)"
                )
            if entry.is_file():  # not a pipe or a device, which could hang; nor a link that leads nowhere
                files[entry.relative_to(root).as_posix()] = entry
    return dict(sorted(files.items()))


def _unless_missing(error: OSError) -> None:
    """Folders that cannot be listed are no empty folders."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def fingerprint(files: Mapping[str, Path], settings: Mapping[str, Any]) -> str:
    """A short name for what is read from these files with these settings; it changes when either does.

    Args:
        files: of `list_files`.
        settings: JSON data.

    Returns:
        16 hexadecimal digits.
    """
    stats = {name: (file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()}
    text = json.dumps([stats, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
