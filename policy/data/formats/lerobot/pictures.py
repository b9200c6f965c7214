"""Pictures in the data files, or in files beside them, as PNG or JPEG."""

from __future__ import annotations

import io
import posixpath
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from policy.data.formats.lerobot.info import Feature

# The exceptions that Pillow raises on damaged files, depending on the place of the damage.
DAMAGE = (OSError, SyntaxError, ValueError, KeyError, IndexError, EOFError, struct.error, Image.DecompressionBombError)


def decode_pictures(cells: Sequence[Any], feature: Feature, files: Mapping[str, Path]) -> NDArray[np.uint8]:
    """Decode an episode's pictures.

    Args:
        cells: T cells {bytes, path}; the path is used if there are no bytes.
        feature: the feature, for the pictures' shape.
        files: the dataset's files; no other file is opened.

    Returns:
        The pictures, (T, H, W, C).

    Raises:
        ValueError: a picture is missing or damaged, or has another shape.
    """
    pictures = []
    for transition, cell in enumerate(cells):
        try:
            pictures.append(_decode(_content(cell, files), feature))
            if pictures[-1].shape != pictures[0].shape:
                raise ValueError(f"it has shape {pictures[-1].shape}, those before it have {pictures[0].shape}")
        except ValueError as error:
            raise ValueError(f"picture at transition {transition}: {error}") from error
    return np.stack(pictures)


def _content(cell: Any, files: Mapping[str, Path]) -> bytes:
    if not isinstance(cell, dict):
        raise ValueError("it is missing")
    content, path = cell.get("bytes"), cell.get("path")
    if isinstance(content, bytes) and content:
        return content
    name = posixpath.normpath(str(path))
    if path is None or name not in files:
        raise ValueError(f"there are no bytes, and no file {path} in the dataset's folder")
    return files[name].read_bytes()


def _decode(content: bytes, feature: Feature) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is compared before decoding
            image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        channels = {"L": 1, "RGB": 3, "RGBA": 4, "P": 3}.get(image.mode)
        if channels is not None:
            feature.check_picture((image.height, image.width, channels))
            pixels = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    except DAMAGE as error:
        raise ValueError(f"it cannot be decoded ({error})") from error
    if channels is None:
        raise ValueError(f"it is of mode {image.mode}; 8-bit gray and colour pictures are read")
    return pixels.reshape(image.height, image.width, channels)
