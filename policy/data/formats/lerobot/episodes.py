"""The table of a LeRobot dataset's episodes: the place of each episode's rows and frames, and the splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.common.arguments import check_choice
from policy.data.budget import Budget
from policy.data.formats.lerobot.info import INFO, ONE_FILE_PER_EPISODE, Info, fill_template, is_count, parse_json
from policy.data.formats.lerobot.tables import read_columns

EPISODES_FOLDER = "meta/episodes/"
EPISODES_LINES = "meta/episodes.jsonl"
TASKS_TABLE = "meta/tasks.parquet"
TASKS_LINES = "meta/tasks.jsonl"
# A dataset with more tasks is not described by a list of them.
MAX_TASKS = 100
VALIDATION = ("val", "valid", "validation")


@dataclass(frozen=True, kw_only=True)
class VideoSpan:
    """The part of a video that holds an episode's frames.

    Attributes:
        file: the video's file.
        start: time of the first frame, seconds.
        end: time at which the last frame ends, seconds; None if the file holds nothing else.
        alone: whether the file holds nothing else.
    """

    file: str
    start: float = 0.0
    end: float | None = None
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class EpisodeEntry:
    """One row of the table.

    Attributes:
        number: the episode's index.
        length: number of transitions.
        data_file: name of the file that holds the transitions.
        first_index: index of the first transition in the whole dataset; None if the data file holds nothing else.
        problem: a contradiction within the row; empty if there is none.
        videos: the frames of each feature.
    """

    number: int
    length: int
    data_file: str
    first_index: int | None
    videos: Mapping[str, VideoSpan]
    problem: str = ""

    def check(self) -> None:
        """Refuse an episode whose row contradicts itself, or that is empty.

        Raises:
            ValueError: the message states the contradiction.
        """
        if self.problem:
            raise ValueError(f"the episode table contradicts itself: {self.problem}")
        if self.length == 0:
            raise ValueError("it has no transitions")


def read_episodes(files: Mapping[str, Path], info: Info, videos: Sequence[str], budget: Budget) -> list[EpisodeEntry]:
    """Read the table of episodes.

    Args:
        files: the dataset's files.
        info: the dataset's info.
        videos: the features whose frames are requested.
        budget: the memory that the table may take.

    Returns:
        All episodes, in the table's order.

    Raises:
        ValueError: the table is missing, damaged or incomplete, or names an episode twice.
    """
    separate = info.version in ONE_FILE_PER_EPISODE
    entries = list(
        _entries_of_lines(files, info, videos) if separate else _entries_of_tables(files, info, videos, budget)
    )
    table = EPISODES_LINES if separate else EPISODES_FOLDER.rstrip("/")
    seen: set[int] = set()
    for entry in entries:
        if entry.number in seen:
            raise ValueError(f"{table} holds episode_index {entry.number} twice")
        seen.add(entry.number)
    if info.total_episodes not in (None, len(entries)):
        raise ValueError(
            f"{table} holds {len(entries)} episodes, {INFO} says total_episodes={info.total_episodes}: the dataset is"
            " not complete, fetch it again"
        )
    return entries


def read_tasks(files: Mapping[str, Path], info: Info, budget: Budget) -> list[str]:
    """Read the instructions of the tasks.

    Args:
        files: the dataset's files.
        info: the dataset's info.
        budget: the memory that their file may take.

    Returns:
        The instructions; empty if the dataset has none, or more than `MAX_TASKS`.

    Raises:
        ValueError: their file is damaged.
    """
    if info.version in ONE_FILE_PER_EPISODE:
        tasks = [line.get("task") for line in _lines(files, TASKS_LINES)] if TASKS_LINES in files else []
    elif TASKS_TABLE in files:
        # pandas writes the text as its index; older writers wrote it as a column.
        columns = read_columns(TASKS_TABLE, files[TASKS_TABLE], ["__index_level_0__", "task"], budget, optional=True)
        tasks = next(iter(columns.values()), [])
    else:
        tasks = []
    return [str(task) for task in tasks] if len(tasks) <= MAX_TASKS else []


def choose_episodes(
    splits: Mapping[str, Any], numbers: Sequence[int], subset: str | None
) -> tuple[list[int], list[int]]:
    """Choose the episodes to read.

    Args:
        splits: the dataset's splits.
        numbers: numbers of the dataset's episodes.
        subset: the requested split. None selects `train` and a validation split, but no test split; if `train` is the
            only split, it selects all episodes, because lerobot itself writes that split with an end that may be wrong.

    Returns:
        The numbers of the chosen episodes, in order, and of those among them that are for validation.

    Raises:
        ValueError: a split is unknown, unreadable or empty, or training and validation episodes overlap.
    """
    if subset is not None:
        check_choice("split", subset, splits)
        return _members(splits, subset, numbers), []
    if "train" not in splits or len(splits) == 1:
        return list(numbers), []
    train = _members(splits, "train", numbers)
    validation = next((name for name in VALIDATION if name in splits), None)
    held_out = [] if validation is None else _members(splits, validation, numbers)
    if both := sorted({*train} & {*held_out}):
        raise ValueError(f"{INFO}: episode {both[0]} is in the splits 'train' and {validation!r}: correct one of them")
    return train + held_out, held_out


def _members(splits: Mapping[str, Any], name: str, numbers: Sequence[int]) -> list[int]:
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(splits[name]))
    if match is None:
        raise ValueError(f"{INFO}: split {name!r} must be a range of episodes such as '0:40'; got {splits[name]!s:.80}")
    members = [number for number in numbers if int(match[1]) <= number < int(match[2])]
    if not members:
        raise ValueError(f"{INFO}: split {name!r} ({match[0]}) has none of the dataset's {len(numbers)} episodes")
    return members


def _entries_of_lines(files: Mapping[str, Path], info: Info, videos: Sequence[str]) -> Iterator[EpisodeEntry]:
    for row in _lines(files, EPISODES_LINES):
        number, length = (_count(EPISODES_LINES, row, key) for key in ("episode_index", "length"))
        fields = {"episode_chunk": number // info.chunk_size, "episode_index": number}
        yield EpisodeEntry(
            number=number,
            length=length,
            data_file=fill_template(info.data_path, **fields),
            first_index=None,
            videos={
                key: VideoSpan(file=fill_template(info.video_path, **fields, video_key=key), alone=True)
                for key in videos
            },
        )


def _entries_of_tables(
    files: Mapping[str, Path], info: Info, videos: Sequence[str], budget: Budget
) -> Iterator[EpisodeEntry]:
    tables = [name for name in files if name.startswith(EPISODES_FOLDER) and name.endswith(".parquet")]
    if not tables:
        raise ValueError(f"there is no file {EPISODES_FOLDER}chunk-000/file-000.parquet: the dataset is not complete")
    counts = [
        "episode_index",
        "length",
        "data/chunk_index",
        "data/file_index",
        "dataset_from_index",
        "dataset_to_index",
    ]
    counts += [f"videos/{key}/{part}_index" for key in videos for part in ("chunk", "file")]
    times = [f"videos/{key}/{part}_timestamp" for key in videos for part in ("from", "to")]
    for name in tables:
        columns = read_columns(name, files[name], [*counts, *times], budget)
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            for key in counts:
                _count(name, row, key)
            for key in times:
                if not isinstance(row[key], float) or not 0 <= row[key] < 1e9:
                    raise ValueError(f"{name}: {key!r} must be a time in seconds; got {row[key]!r}")
            yield _entry_of_row(info, row, videos)


def _entry_of_row(info: Info, row: Mapping[str, Any], videos: Sequence[str]) -> EpisodeEntry:
    length, first, end = row["length"], row["dataset_from_index"], row["dataset_to_index"]
    spans = {key: _span_of_row(info, row, key) for key in videos}
    problem = f"length is {length}, transitions {first} to {end} are {end - first}" if end - first != length else ""
    for key, span in spans.items():
        frames = round((span.end - span.start) * info.fps) if span.end is not None else length
        if frames != length:
            problem = problem or f"length is {length}, its time in the video of {key!r} is that of {frames} frames"
    return EpisodeEntry(
        number=row["episode_index"],
        length=length,
        data_file=fill_template(info.data_path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]),
        first_index=first,
        videos=spans,
        problem=problem,
    )


def _span_of_row(info: Info, row: Mapping[str, Any], key: str) -> VideoSpan:
    at = {part: row[f"videos/{key}/{part}"] for part in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")}
    return VideoSpan(
        file=fill_template(info.video_path, video_key=key, chunk_index=at["chunk_index"], file_index=at["file_index"]),
        start=at["from_timestamp"],
        end=at["to_timestamp"],
    )


def _lines(files: Mapping[str, Path], name: str) -> list[dict[str, Any]]:
    if name not in files:
        raise ValueError(f"there is no file {name}: the dataset is not complete, fetch it again")
    lines = files[name].read_bytes().splitlines()
    return [parse_json(f"{name}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _count(table: str, row: Mapping[str, Any], key: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or not is_count(value) or value >= 2**53:
        raise ValueError(f"{table}: {key!r} must be a whole number of 0 or more; got {value!r:.80}")
    return value
