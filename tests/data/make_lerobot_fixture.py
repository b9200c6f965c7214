"""Cuts tests/data/lerobot_v30 and lerobot_v21 out of a dataset that the `lerobot` package wrote.

The first frames of its first episodes, with the package's own schemas, metadata and video packets (none is encoded
anew). What is not read stays as it was: the statistics are of whole episodes. `lerobot_v21` is the same content
in the layout of version 2.1, which newer packages do not write any more.

    python tests/data/make_lerobot_fixture.py ../shared/data/pusht_lerobot_v3 tests/data
"""

import json
import shutil
import sys
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq

EPISODES = 2
LENGTH = 24
VIDEO = "observation.image"
DATA_FILE = "data/chunk-000/file-000.parquet"
VIDEO_FILE = f"videos/{VIDEO}/chunk-000/file-000.mp4"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"
V21_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V21_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def main(source: Path, folder: Path) -> None:
    starts = pq.read_table(source / EPISODES_FILE).column("dataset_from_index").to_pylist()[:EPISODES]
    info = json.loads((source / "meta" / "info.json").read_text())
    info |= {"total_episodes": EPISODES, "total_frames": EPISODES * LENGTH, "splits": {"train": f"0:{EPISODES}"}}
    data = pq.read_table(source / DATA_FILE)
    pieces = [
        replace(data.slice(start, LENGTH), index=range(number * LENGTH, (number + 1) * LENGTH))
        for number, start in enumerate(starts)
    ]
    for version in ("lerobot_v30", "lerobot_v21"):
        shutil.rmtree(folder / version, ignore_errors=True)
    write_v30(source, folder / "lerobot_v30", info, pieces, starts)
    write_v21(source, folder / "lerobot_v21", info, pieces, starts)


def write_v30(source: Path, root: Path, info: dict, pieces: list[pa.Table], starts: list[int]) -> None:
    ends = [(number + 1) * LENGTH for number in range(EPISODES)]
    episodes = replace(
        pq.read_table(source / EPISODES_FILE).slice(0, EPISODES),
        length=[LENGTH] * EPISODES,
        dataset_from_index=[end - LENGTH for end in ends],
        dataset_to_index=ends,
        **{f"videos/{VIDEO}/from_timestamp": [(end - LENGTH) / info["fps"] for end in ends]},
        **{f"videos/{VIDEO}/to_timestamp": [end / info["fps"] for end in ends]},
    )
    write_json(root / "meta" / "info.json", info)
    for name in ("stats.json", "tasks.parquet"):
        shutil.copyfile(source / "meta" / name, root / "meta" / name)
    write_parquet(root / EPISODES_FILE, [episodes])
    write_parquet(root / DATA_FILE, pieces)
    copy_packets(source / VIDEO_FILE, root / VIDEO_FILE, starts)


def write_v21(source: Path, root: Path, info: dict, pieces: list[pa.Table], starts: list[int]) -> None:
    sizes = ("data_files_size_in_mb", "video_files_size_in_mb")
    write_json(
        root / "meta" / "info.json",
        {key: value for key, value in info.items() if key not in sizes}
        | {"codebase_version": "v2.1", "total_videos": EPISODES, "total_chunks": 1}
        | {"data_path": V21_DATA, "video_path": V21_VIDEO},
    )
    tasks = pq.read_table(source / "meta" / "tasks.parquet").to_pylist()
    write_lines(
        root / "meta" / "tasks.jsonl",
        [{"task_index": task["task_index"], "task": task["__index_level_0__"]} for task in tasks],
    )
    rows = pq.read_table(source / EPISODES_FILE).slice(0, EPISODES).to_pylist()
    write_lines(
        root / "meta" / "episodes.jsonl",
        [{"episode_index": row["episode_index"], "tasks": row["tasks"], "length": LENGTH} for row in rows],
    )
    write_lines(
        root / "meta" / "episodes_stats.jsonl",
        [{"episode_index": row["episode_index"], "stats": statistics(row, info["features"])} for row in rows],
    )
    for number, (piece, start) in enumerate(zip(pieces, starts, strict=True)):
        fields = {"episode_chunk": 0, "episode_index": number, "video_key": VIDEO}
        write_parquet(root / V21_DATA.format(**fields), [piece])
        copy_packets(source / VIDEO_FILE, root / V21_VIDEO.format(**fields), [start])


def statistics(row: dict, features: dict) -> dict:
    names = ("min", "max", "mean", "std", "count")
    return {key: {name: row[f"stats/{key}/{name}"] for name in names} for key in features}


def copy_packets(source: Path, target: Path, starts: list[int]) -> None:
    """Copy the compressed frames from each start on, with consecutive times."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as opened, av.open(str(target), "w", options={"fflags": "+bitexact"}) as written:
        stream = opened.streams.video[0]
        packets = [packet for packet in opened.demux(stream) if packet.pts is not None]
        copy = written.add_stream_from_template(stream, opaque=True)
        wanted = [packets[start : start + LENGTH] for start in starts]
        duration = packets[0].duration
        for number, packet in enumerate(packet for piece in wanted for packet in piece):
            if number % LENGTH == 0 and not packet.is_keyframe:
                raise ValueError(f"frame {number} cannot be decoded without those before it")
            packet.pts = packet.dts = number * duration
            packet.stream = copy
            written.mux(packet)


def replace(table: pa.Table, **columns) -> pa.Table:
    """Replace the values of some columns, and keep the schema."""
    for name, values in columns.items():
        position = table.schema.get_field_index(name)
        field = table.schema.field(position)
        table = table.set_column(position, field, pa.array(list(values), field.type))
    return table


def write_parquet(file: Path, groups: list[pa.Table]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(file, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)


def write_json(file: Path, value: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=4) + "\n")


def write_lines(file: Path, values: list[dict]) -> None:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
