"""The description of a LeRobot dataset in `meta/info.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INFO = "meta/info.json"
# Up to 2.1 each episode has its own files. 2.0 differs from 2.1 only in its statistics, which are not read.
ONE_FILE_PER_EPISODE = ("v2.0", "v2.1")
VERSIONS = (*ONE_FILE_PER_EPISODE, "v3.0")


# Numbers of channels of a picture.
CHANNELS = (1, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One column of the dataset.

    Attributes:
        key: the column's name, such as `observation.state`.
        dtype: a dtype of NumPy, or `video`, `image`, `string`.
        shape: shape of one transition's value, not checked yet.
        is_depth: whether the values are depth pictures, which a policy cannot take.
    """

    key: str
    dtype: str
    shape: Any
    is_depth: bool

    @property
    def is_numeric(self) -> bool:
        """Whether its values are numbers."""
        return re.fullmatch(r"bool|u?int\d+|float\d+", self.dtype) is not None

    @property
    def is_video(self) -> bool:
        """Whether its values are frames of video files."""
        return self.dtype == "video"

    @property
    def is_image(self) -> bool:
        """Whether its values are pictures in the data files."""
        return self.dtype == "image"

    @property
    def is_empty(self) -> bool:
        """Whether it has no numbers, as features of shape (0,) have not."""
        return self.is_numeric and isinstance(self.shape, list) and 0 in self.shape

    @property
    def axes_of_pixels(self) -> tuple[int, int, int] | None:
        """The axes of height, width and channels if its numbers are pictures (uint8 of rank 3); else None."""
        if self.dtype != "uint8" or not isinstance(self.shape, list) or len(self.shape) != 3:
            return None
        return next((axes for axes in ((0, 1, 2), (1, 2, 0)) if self.shape[axes[2]] in CHANNELS), None)

    @property
    def is_usable(self) -> bool:
        """Whether a policy can take it."""
        return self.is_numeric or ((self.is_video or self.is_image) and not self.is_depth)

    @property
    def kind(self) -> str:
        """A description of its values for messages."""
        return "pictures of depth" if self.is_depth else f"values of dtype {self.dtype!r}"

    @property
    def width(self) -> int:
        """The number of numbers in one value."""
        return math.prod(self.shape)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one value once it is read: that of a picture, or a vector's."""
        is_picture = self.is_video or self.is_image or self.axes_of_pixels is not None
        return tuple(self.shape) if is_picture else (self.width,)

    def check_shape(self) -> None:
        """Refuse an invalid shape.

        Raises:
            ValueError: the shape is not a list of sizes.
        """
        is_list = isinstance(self.shape, list) and len(self.shape) <= 8
        if not is_list or not all(is_count(size) and 0 < size < 10**9 for size in self.shape):
            raise ValueError(
                f"{INFO}: the shape of feature {self.key!r} must be a list of sizes; got {self.shape!r:.80}"
            )

    def check_picture(self, shape: tuple[int, ...]) -> None:
        """Compare a picture with the shape, in any order: writers disagree about height, width and channels.

        Raises:
            ValueError: the sizes differ.
        """
        if sorted(shape) != sorted(self.shape):
            raise ValueError(f"a picture has shape {shape}; {INFO} says {tuple(self.shape)}")


@dataclass(frozen=True, kw_only=True)
class Info:
    """The checked values of `meta/info.json` that reading needs.

    Attributes:
        version: version of the format.
        fps: transitions per second.
        features: the columns by key.
        data_path: template of the data files' names.
        video_path: template of the video files' names.
        chunk_size: episodes per folder, up to version 2.1.
        total_episodes: number of episodes; None if the file does not state it.
        splits: name of a subset to its range, such as `0:40`.
        robot_type: the robot; None if the file does not state it.
    """

    version: str
    fps: float
    features: Mapping[str, Feature]
    data_path: str
    video_path: str
    chunk_size: int
    total_episodes: int | None
    splits: Mapping[str, Any] = field(default_factory=dict)
    robot_type: str | None = None


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_json(name: str, text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        name: the file, or the line of a file, for messages.
        text: the text, UTF-8.

    Returns:
        The object.

    Raises:
        ValueError: the text is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object; got {value!s:.80}")
    return value


def read_info(file: Path) -> Info:
    """Read and check `meta/info.json`.

    Args:
        file: the file.

    Returns:
        Its checked values.

    Raises:
        ValueError: the file is not JSON, its version is not supported, or a value is invalid; the message names it.
    """
    raw = parse_json(INFO, file.read_bytes())
    version = raw.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{INFO}: LeRobot datasets of the versions {', '.join(VERSIONS)} are read; codebase_version is"
            f" {version!r:.80}: convert it with the convert_dataset scripts of the lerobot package"
        )
    _require(raw, "fps", "a number above 0", lambda v: isinstance(v, (int, float)) and 0 < v < 1e6)
    _require(raw, "data_path", "a template of file names", lambda v: isinstance(v, str))
    features = raw.get("features")
    if not isinstance(features, dict) or not all(
        isinstance(feature, dict) and isinstance(feature.get("dtype"), str) for feature in features.values()
    ):
        raise ValueError(f"{INFO}: features must state a dtype for each key; got {features!s:.80}")
    optional = {"video_path": "", "chunks_size": 1000, "splits": {}, **{k: v for k, v in raw.items() if v is not None}}
    _require(optional, "video_path", "a template of file names", lambda v: isinstance(v, str))
    _require(optional, "chunks_size", "1 or more", lambda v: is_count(v) and v > 0)
    _require(optional, "splits", "a JSON object", lambda v: isinstance(v, dict))
    if "total_episodes" in optional:
        _require(optional, "total_episodes", "a whole number", is_count)
    robot = raw.get("robot_type")
    return Info(
        version=version,
        fps=raw["fps"],
        features={key: _feature(key, feature) for key, feature in features.items()},
        data_path=raw["data_path"],
        video_path=optional["video_path"],
        chunk_size=optional["chunks_size"],
        total_episodes=optional.get("total_episodes"),
        splits=optional["splits"],
        robot_type=robot if isinstance(robot, str) else None,
    )


def fill_template(template: str, **values: Any) -> str:
    """Fill the numbers into the template of a file's name.

    Python's `str.format` is not used, because a template could make it do more than insert numbers.

    >>> fill_template("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", chunk_index=0, file_index=12)
    'data/chunk-000/file-012.parquet'

    Raises:
        ValueError: the template has a field that the dataset's version does not have.
    """

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"{INFO}: {template!r} has an unknown field {match[0]}; known: {', '.join(values)}")
        return str(values[match[1]]).zfill(int(match[2] or 0))

    return re.sub(r"\{([^{}:]*)(?::0(\d\d?)d)?[^{}]*\}", fill, template)


def _require(raw: Mapping[str, Any], key: str, what: str, fits: Any) -> None:
    if not fits(raw.get(key)) or isinstance(raw.get(key), bool):
        raise ValueError(f"{INFO}: {key} must be {what}; got {raw.get(key)!s:.80}")


def _feature(key: str, raw: Mapping[str, Any]) -> Feature:
    details = raw.get("info") or raw.get("video_info")
    is_depth = isinstance(details, dict) and bool(details.get("video.is_depth_map") or details.get("is_depth_map"))
    return Feature(key=key, dtype=raw["dtype"], shape=raw.get("shape"), is_depth=is_depth)
