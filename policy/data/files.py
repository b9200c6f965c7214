"""The files of a dataset, all inside its folder, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def list_files(path: Path) -> dict[str, Path]:
    """List all files of a dataset.

    Args:
        path: a file, or a folder.

    Returns:
        Path relative to the folder, with slashes, to the file; for a single file, its name to the file.

    Raises:
        ValueError: there is no file, a file cannot be read, or a link leads out of the folder.
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
    blobs = _blobs_of(root)
    files = {}
    for folder, folders, names in os.walk(root, onerror=_unless_missing):
        for entry in (Path(folder, name) for name in (*folders, *names)):
            # Path.resolve would raise on circular links; realpath does not.
            target = Path(os.path.realpath(entry))
            if entry.is_symlink() and not any(target.is_relative_to(place) for place in (root, *blobs)):
                raise ValueError(
                    f"{path}: {entry.relative_to(root)} is a link that leaves the folder; if you trust it, copy the"
                    " dataset with its links followed (cp -rL)"
                )
            if entry.is_file():  # not a pipe or a device, where reading could hang, and not a dangling link
                files[entry.relative_to(root).as_posix()] = entry
    return dict(sorted(files.items()))


def _blobs_of(root: Path) -> list[Path]:
    """The folder that the links of a snapshot in the Hub's cache lead into; none for any other folder.

    The cache keeps each file of a repository once, as `datasets--<owner>--<name>/blobs/<hash>`, and a revision of it is
    a folder of links into there, `datasets--<owner>--<name>/snapshots/<revision>`.
    """
    repository = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and repository.name.startswith("datasets--")
    return [repository / "blobs"] if is_snapshot else []


def _unless_missing(error: OSError) -> None:
    """Raise if a folder cannot be listed, instead of taking it for empty."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def fingerprint(files: Mapping[str, Path], settings: Mapping[str, Any]) -> str:
    """Name the result of reading files with settings; the name changes when a file or a setting changes.

    Args:
        files: the result of `list_files`.
        settings: JSON data.

    Returns:
        16 hexadecimal digits.
    """
    stats = {name: (file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()}
    text = json.dumps([stats, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
