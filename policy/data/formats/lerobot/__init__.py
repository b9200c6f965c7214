"""LeRobot datasets of version 3.0, and of 2.1 and 2.0, which store each episode in files of its own.

They are read without the `lerobot` package, which requires other versions of torch than this library.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.data.budget import Budget
from policy.data.episode import Episode, EpisodeReader, Request, warn_empty
from policy.data.formats.format import Format
from policy.data.formats.lerobot.episodes import (
    EpisodeEntry,
    VideoSpan,
    choose_episodes,
    read_episodes,
    read_tasks,
)
from policy.data.formats.lerobot.finding import find_lerobot
from policy.data.formats.lerobot.info import INFO, Feature, Info, read_info
from policy.data.formats.lerobot.pictures import decode_pictures
from policy.data.formats.lerobot.tables import TableFile, numbers, whole_numbers
from policy.data.frames import Clip, Frames
from policy.data.video import VideoFile

PREFIX = "observation."
# Decoded frames of more bytes than this stay in their videos.
STREAM_BYTES = 16 * 2**30
# Transitions whose frames a training that decodes them must at least have memory for.
LEAST_ROWS = 64
# Columns of every data file that state the episode and the place of each row.
PLACES = ("episode_index", "frame_index", "index")


class LeRobotReader:
    """Reads one episode at a time; in the order of the episode table, each file is read about once."""

    def __init__(
        self,
        files: Mapping[str, Path],
        info: Info,
        entries: Mapping[str, EpisodeEntry],
        held_out: Sequence[str],
        keys: Mapping[str, str],
        action_key: str,
        budget: Budget,
        *,
        streams: bool,
    ) -> None:
        self.names = list(entries)
        self.held_out = list(held_out)
        self.metadata = {
            "format": "lerobot",
            "version": info.version,
            "rate_hz": info.fps,
            "robot_type": info.robot_type,
            "tasks": read_tasks(files, info, budget),
        }
        self._files = files
        self._info = info
        self._entries = entries
        self._keys = keys
        self._action_key = action_key
        self._budget = budget
        self._streams = streams
        stored = (key for key in (*keys.values(), action_key) if not info.features[key].is_video)
        self._columns = [*dict.fromkeys((*PLACES, *stored))]
        self._table: TableFile | None = None
        self._videos: dict[str, VideoFile] = {}

    def read(self, name: str) -> Episode:
        """See `EpisodeReader`."""
        entry = self._entries[name]
        entry.check()
        table = self._open_table(entry.data_file)
        start = 0 if entry.first_index is None else entry.first_index - table.first_index
        stop = table.num_rows if entry.first_index is None else start + entry.length
        rows = table.rows(start, stop)
        _check_places(entry, {key: whole_numbers(rows.column(key)) for key in PLACES})
        return Episode(
            observations={seen: self._values(key, entry, rows) for seen, key in self._keys.items()},
            actions=self._values(self._action_key, entry, rows),
        )

    def close(self) -> None:
        """See `EpisodeReader`."""
        if self._table is not None:
            self._table.close()
        for video in self._videos.values():
            video.close()

    def _values(self, key: str, entry: EpisodeEntry, rows: Any) -> Any:
        feature = self._info.features[key]
        try:
            if feature.is_video:
                return self._streamed(feature, entry) if self._streams else self._read_video(feature, entry)
            if feature.is_image:
                return decode_pictures(rows.column(key).to_pylist(), feature, self._files)
            values = numbers(rows.column(key), feature.width)
            axes = feature.axes_of_pixels
            return values if axes is None else _pictures(values.reshape(len(values), *feature.shape), axes)
        except ValueError as error:
            raise ValueError(f"{key!r}: {error}") from error

    def _read_video(self, feature: Feature, entry: EpisodeEntry) -> NDArray[np.uint8]:
        span = entry.videos[feature.key]
        video = self._open_video(feature, span)
        return video.read(span.start, self._info.fps, entry.length, feature.check_picture, alone=span.alone)

    def _streamed(self, feature: Feature, entry: EpisodeEntry) -> Frames:
        """Leave the frames in their video, whose header is checked."""
        span, fps = entry.videos[feature.key], self._info.fps
        video = self._open_video(feature, span)
        if video.size is None:
            raise ValueError(f"{span.file} does not state the size of its pictures: add dataset.decode=cache")
        feature.check_picture((*video.size, 3))
        video.check_length(span.start, fps, entry.length, alone=span.alone)
        file = self._file(span.file)
        clip = Clip(name=span.file, file=file, start=span.start, fps=fps, count=entry.length, episode=str(entry.number))
        return Frames([clip], video.size)

    def _open_video(self, feature: Feature, span: VideoSpan) -> VideoFile:
        video = self._videos.get(feature.key)
        if video is None or video.name != span.file:
            file = self._file(span.file)
            if video is not None:
                self._videos.pop(feature.key).close()
            video = self._videos[feature.key] = VideoFile(span.file, file)
        return video

    def _open_table(self, name: str) -> TableFile:
        if self._table is None or self._table.name != name:
            file = self._file(name)
            if self._table is not None:
                self._table.close()
            self._table = None
            self._table = TableFile(name, file, self._columns, self._budget)
        return self._table

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise ValueError(f"there is no file {name} in the dataset's folder")
        return self._files[name]


def open_lerobot(path: Path, files: Mapping[str, Path], request: Request) -> EpisodeReader:
    """Open a LeRobot dataset.

    Args:
        path: the dataset's folder, for messages.
        files: the files in the folder.
        request: the user's request. By default all pictures and numbers under `observation.` are observed, and the
            actions are `action`. A subset is one of the file's splits; without one, `train` and a validation split are
            read.

    Returns:
        The dataset's reader.

    Raises:
        ValueError: it is not a LeRobot dataset, has an unknown version, or lacks a requested part.
    """
    if INFO not in files:
        raise ValueError(
            f"there is no file {INFO}: dataset.path should be the folder of a LeRobot dataset, which holds it"
        )
    info = read_info(files[INFO])
    for key in _wanted(request):
        _check_usable(info, key)
    usable = [key for key, feature in info.features.items() if feature.is_usable]
    observed = [key for key in usable if key.startswith(PREFIX)]
    if request.observation_keys is None and (empty := [key for key in observed if info.features[key].is_empty]):
        warn_empty(path, empty)
    keys = request.observations(usable, [key for key in observed if not info.features[key].is_empty], PREFIX)
    action_key = request.action([key for key in usable if info.features[key].is_numeric], "action")
    for key in (*keys.values(), action_key):
        info.features[key].check_shape()
    videos = [key for key in dict.fromkeys(keys.values()) if info.features[key].is_video]
    if videos and not info.video_path:
        raise ValueError(f"{INFO} has no video_path, which should say where the frames of {videos[0]!r} are")
    _check_inside(info)
    entries = {str(entry.number): entry for entry in read_episodes(files, info, videos, request.budget)}
    chosen, held_out = choose_episodes(info.splits, [entry.number for entry in entries.values()], request.subset)
    shapes = {seen: info.features[key].row_shape for seen, key in {**keys, "actions": action_key}.items()}
    lengths = [entries[str(number)].length for number in chosen]
    pictures = {seen: shapes[seen] for seen, key in keys.items() if info.features[key].is_video}
    streams = _streams(request, pictures, lengths)
    request.budget.check_episodes(
        lengths, {seen: shapes[seen] for seen in shapes.keys() - (pictures if streams else {})}
    )
    return LeRobotReader(
        files,
        info,
        {str(number): entries[str(number)] for number in chosen},
        [str(number) for number in held_out],
        keys,
        action_key,
        request.budget,
        streams=streams,
    )


FORMAT = Format(open=open_lerobot, find=find_lerobot, looks=lambda names: INFO in names, has_videos=True)


def _streams(request: Request, pictures: Mapping[str, Sequence[int]], lengths: Sequence[int]) -> bool:
    """Whether frames stay in their videos: if the user says so, or else if they would take much disk.

    Raises:
        ValueError: the user says so, and no observation is a video.
        BudgetError: decoding takes more memory than allowed.
    """
    if request.decode == "stream" and not pictures:
        raise ValueError("dataset.decode=stream is for videos, and no observation is one: leave it out")
    is_large = request.budget.cached_bytes(lengths, pictures) > STREAM_BYTES
    streams = is_large if request.decode is None else request.decode == "stream"
    if streams:
        frame_bytes = sum(math.prod(shape) for shape in pictures.values())
        request.budget.check_memory(LEAST_ROWS * frame_bytes, f"decoding {LEAST_ROWS} of its transitions at a time")
    return streams


def _pictures(values: NDArray[Any], axes: tuple[int, int, int]) -> NDArray[Any]:
    height, width, channels = (1 + axis for axis in axes)
    return values.transpose(0, height, width, channels)


def _wanted(request: Request) -> list[str]:
    keys = request.observation_keys or []
    return [
        *(keys.values() if isinstance(keys, Mapping) else keys),
        *([request.action_key] if request.action_key else []),
    ]


def _check_inside(info: Info) -> None:
    for template in (info.data_path, info.video_path):
        if posixpath.normpath(template).split("/")[0] in ("", ".."):
            raise ValueError(f"{INFO}: {template!r} leaves the dataset's folder, and nothing outside it is opened")


def _check_usable(info: Info, key: str) -> None:
    feature = info.features.get(key) or info.features.get(PREFIX + key)
    if feature is not None and not feature.is_usable:
        raise ValueError(f"feature {feature.key!r} holds {feature.kind}; a policy takes numbers and colour pictures")


def _check_places(entry: EpisodeEntry, places: Mapping[str, NDArray[Any]]) -> None:
    """Check that rows are those of an episode, from its first to its last; only their own columns say so."""
    length = len(places["index"])
    if length != entry.length:
        raise ValueError(f"{entry.data_file} has {length} rows, the episode table says {entry.length}")
    first = places["index"][0] if entry.first_index is None else entry.first_index
    expected = {
        "episode_index": np.full(length, entry.number),
        "frame_index": np.arange(length),
        "index": first + np.arange(length),
    }
    for key, values in places.items():
        wrong = np.flatnonzero(values != expected[key])
        if len(wrong):
            raise ValueError(
                f"{entry.data_file} disagrees with the episode table: {key!r} is {values[wrong[0]]} at transition"
                f" {wrong[0]}, expected {expected[key][wrong[0]]}"
            )
