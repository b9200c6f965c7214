"""The files of a checkpoint: replaced as a whole, and read without trusting them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from policy.common.errors import SaveError
from policy.common.files import json_text, write_text

SCHEMA_VERSION = 4
# Name of the folder of a run's newest checkpoint.
CHECKPOINT = "checkpoint"
CONFIG, WEIGHTS, CHECKSUMS = "config.json", "policy.safetensors", "checksums.json"
TRAINING_WEIGHTS, TRAINING_RECORD = "training.safetensors", "training.json"

# Limits far above the sizes of real files; larger files are rejected before they are read.
MAX_BYTES = {CONFIG: 2**20, CHECKSUMS: 2**16, TRAINING_RECORD: 2**28, WEIGHTS: 2**34, TRAINING_WEIGHTS: 2**36}
# Limit of a safetensors file's header: enough for some 30,000 tensors.
MAX_HEADER_BYTES = 2**22
# How to use a policy that this package did not write.
OF_ANOTHER_PROJECT = "turn the policy of another project into one with ddim-import"
# Limit of an error message's length, because a message may quote text of any length from a file.
MAX_MESSAGE = 600


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A checkpoint folder whose config.json and checksums.json have been read.

    Attributes:
        path: the folder.
        root: links in `path` may not lead out of this folder.
        config: content of config.json: a known schema version, the rest unchecked.
        checksums: SHA-256 by file name; None if the folder has no checksums.json, as in schema 1.
    """

    path: Path
    root: Path
    config: dict[str, Any]
    checksums: dict[str, Any] | None

    def verify(self, name: str) -> tuple[Path, str]:
        """Verify a file, and return its path and its SHA-256.

        Raises:
            ValueError: it is missing, too large, a link out of `root`, or differs from its checksum.
        """
        file = _regular(self.path, name, self.root)
        with refusing(file), file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if self.checksums is not None and self.checksums.get(name) != digest:
            raise ValueError(
                f"{file} is damaged: its SHA-256 is not the one that {CHECKSUMS} noted when it was written; use another"
                " checkpoint"
            )
        return file, digest


def open_folder(folder: Path, root: Path | None = None) -> Folder:
    """Open a checkpoint folder, or the previous one, if a process was killed while it replaced the folder.

    Args:
        folder: the checkpoint folder.
        root: folder that its links may not lead out of; by default the checkpoint folder itself.

    Returns:
        The folder, its config.json verified.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or this version does not read its schema.
    """
    # A run killed between the two renames of `replacing` leaves its last good checkpoint under this name.
    try:
        path = folder if folder.exists() or not _beside(folder, "old").exists() else _beside(folder, "old")
    except PermissionError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}): choose another checkpoint") from error
    if path.is_file():
        raise ValueError(f"{path} is a file, and a checkpoint is a folder: {OF_ANOTHER_PROJECT} source={path}")
    if not os.path.lexists(path / CONFIG):
        inside = f", {folder / CHECKPOINT}" if os.path.lexists(folder / CHECKPOINT / CONFIG) else ""
        raise ValueError(f"no checkpoint at {folder}: give the folder that ddim-train names{inside}")
    root = Path(os.path.realpath(root or path))
    config = read_json(_regular(path, CONFIG, root))
    if "schema_version" not in config and not os.path.lexists(path / CHECKSUMS):
        raise ValueError(f"{path} is not a checkpoint of ddim-policy: {OF_ANOTHER_PROJECT} source={path}")
    schema = config.get("schema_version")
    if type(schema) is not int or not 1 <= schema <= SCHEMA_VERSION:
        newer = type(schema) is int and schema > SCHEMA_VERSION
        advice = "upgrade ddim-policy to the version that wrote it, or newer" if newer else "use another checkpoint"
        with refusing(path):
            raise ValueError(
                f"{path} has checkpoint schema {schema!r}; this version reads 1 to {SCHEMA_VERSION}: {advice}"
            )
    checksums = None
    if schema > 1 or os.path.lexists(path / CHECKSUMS):
        checksums = read_json(_regular(path, CHECKSUMS, root))
    opened = Folder(path=path, root=root, config=config, checksums=checksums)
    opened.verify(CONFIG)
    return opened


def is_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint at `folder`, including one that a killed process left half replaced."""
    return folder.exists() or _beside(folder, "old").exists()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a checkpoint folder; the old one is replaced only once the new one is complete and on disk.

    Args:
        folder: the checkpoint folder.

    Yields:
        An empty folder to write the files into.

    Raises:
        SaveError: the files cannot be written, for example because the disk is full.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        seal(new)
        # A folder cannot be replaced in one step. Between these two renames, only `old` exists, and `open_folder` finds
        # it. After a kill between them, `old` is the only checkpoint, so it is kept until the new one is in place.
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)  # an incomplete checkpoint only takes the space that the next one needs
        raise SaveError(
            f"the checkpoint {folder} could not be written ({error}); what was saved before it is whole: make room, or"
            " fix the cause named here, and give the same command again"
        ) from error


@contextmanager
def adding(folder: Path) -> Iterator[Path]:
    """Write files into a folder that may hold others; files of the same name are replaced once all are complete.

    Args:
        folder: the folder; made if need be.

    Yields:
        An empty folder to write the files into.

    Raises:
        SaveError: the files cannot be written, for example because the disk is full.
    """
    # Inside `folder`, not beside it: `folder` may be a mount point, and files cannot be renamed across file systems.
    new, is_made = folder / ".saving", not folder.exists()
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        seal(new)
        # The checksums are replaced last, so that a kill before that is noticed.
        for file in sorted(new.iterdir(), key=lambda file: file.name == CHECKSUMS):
            file.replace(folder / file.name)
        new.rmdir()
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder if is_made else new, ignore_errors=True)
        raise SaveError(
            f"the policy could not be saved to {folder} ({error}); what was there before is unchanged: make room, or"
            " fix the cause named here, and save again"
        ) from error


def discard(folder: Path) -> None:
    """Remove a checkpoint folder, so that a kill halfway leaves nothing that looks like a checkpoint."""
    gone = _beside(folder, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files beside them, and sync everything to disk.

    Args:
        folder: the folder; files in it that do not belong to a checkpoint are left alone.
    """
    digests = {}
    for name in sorted(MAX_BYTES.keys() - {CHECKSUMS}):
        if (file := folder / name).exists():
            with file.open("rb") as opened:
                digests[name] = hashlib.file_digest(opened, "sha256").hexdigest()
            shutil.copymode(folder / CONFIG, file)  # safetensors makes its files readable by their owner only
            _sync(file)
    write_json(folder / CHECKSUMS, digests)
    _sync(folder / CHECKSUMS)
    _sync(folder)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read, or does not hold a JSON object.
    """
    with refusing(file):
        try:
            data = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): use another checkpoint") from error
        if not isinstance(data, dict):
            raise ValueError(f"{file} is damaged (not a JSON object): use another checkpoint")
    return data


def read_tensors(file: Path, finite: Callable[[str], bool] = lambda key: True) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Args:
        file: the file.
        finite: whether the tensor of this name must be finite.

    Raises:
        ValueError: the file is not a safetensors file, or holds a NaN or an infinity.
    """
    with refusing(file):
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise ValueError(f"{file} is missing or damaged (a header of {header} bytes): use another checkpoint")
        tensors = load_file(file)
        for key, value in tensors.items():
            if finite(key) and not value.isfinite().all():
                raise ValueError(f"{file} is damaged ({key} holds a NaN or an infinity): use another checkpoint")
    return tensors


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON data."""
    write_text(file, json_text(data, indent=2))


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of any device as safetensors."""
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)


@contextmanager
def refusing(source: Path) -> Iterator[None]:
    """Turn every error that the content of a checkpoint causes into a ValueError of limited length.

    Args:
        source: the file or folder, for the message.

    Raises:
        ValueError: in place of the exception that a parser or a network's constructor raised.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        if len(message) > MAX_MESSAGE or isinstance(error, UnicodeDecodeError):
            raise ValueError(message[:MAX_MESSAGE] + " ...") from error
        raise
    except (
        SafetensorError,
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,  # raised by torch, and by Python for too deep a nesting
        ArithmeticError,
        MemoryError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE]
        raise ValueError(f"{source} is missing or damaged ({reason}): use another checkpoint") from error


def _regular(folder: Path, name: str, root: Path) -> Path:
    file = folder / name
    if not Path(os.path.realpath(file)).is_relative_to(root):
        raise ValueError(
            f"{file} is a link that leaves the folder: if you trust it, copy the folder with links followed (cp -rL)"
        )
    if not file.is_file():  # such as a pipe or a device, which could block
        raise ValueError(f"{file} is missing or damaged (not a regular file): use another checkpoint")
    if (size := file.stat().st_size) > MAX_BYTES[name]:
        raise ValueError(f"{file} has {size} bytes; this version reads up to {MAX_BYTES[name]}: use another checkpoint")
    return file


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
