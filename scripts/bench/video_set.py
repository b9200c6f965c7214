"""Write a LeRobot v3 dataset of two cameras for the video benchmark, in the layout and the codec of LeRobot.

A few episodes are drawn and encoded, and their compressed frames are copied for all the others: decoding is the same
work for each of them, and encoding 400,000 frames would take an hour.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from policy.common.progress import progress

WIDTH, HEIGHT, FPS = 640, 480, 30
CAMERAS = ("observation.images.front", "observation.images.wrist")
EPISODE = 400
DRAWN = 12  # episodes that are encoded for each camera
FILE_BYTES = 200 * 10**6  # LeRobot starts another video file after about this size
# LeRobot's codec as LeRobot sets it (but for the fastest preset), and H.264.
CODECS = {"libsvtav1": {"preset": "12", "crf": "30"}, "libx264": {"preset": "ultrafast", "crf": "23"}}
TABLE = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def written(folder: Path, *, frames: int, key_interval: int, codec: str = "libsvtav1") -> Path:
    """Write the dataset, unless it is there.

    Args:
        folder: the folder of all datasets.
        frames: number of transitions, a multiple of the episodes' 400.
        key_interval: frames from one key frame to the next.
        codec: name of the encoder.

    Returns:
        The dataset's folder.
    """
    path = folder / f"{codec}-{frames}-key{key_interval}"
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    count = frames // EPISODE
    places = {}
    for camera, key in enumerate(CAMERAS):
        sources = [_encoded(folder, camera, n, key_interval, codec) for n in range(min(DRAWN, count))]
        places[key] = list(_copied(partial, key, sources, count))
    _write_tables(partial, count, places, codec)
    partial.rename(path)
    return path


def _pictures(camera: int, episode: int) -> Iterator[NDArray[np.uint8]]:
    """A textured table, a moving arm and a moving box, with the noise of a sensor."""
    generator = np.random.default_rng((camera, episode))
    coarse = generator.integers(60, 200, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    table = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
    grain = generator.integers(0, 6, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    speed = generator.uniform(0.02, 0.06, 4)
    for time in range(EPISODE):
        picture = table + grain[time % 8]
        for part, (size, color) in enumerate(((90, 230), (50, 30))):
            y = int((HEIGHT - size) * (0.5 + 0.5 * np.sin(speed[2 * part] * time)))
            x = int((WIDTH - size) * (0.5 + 0.5 * np.cos(speed[2 * part + 1] * time)))
            picture[y : y + size, x : x + size] = color - 20 * part + grain[time % 8, :size, :size]
        yield picture


def _encoded(folder: Path, camera: int, episode: int, key_interval: int, codec: str) -> Path:
    file = folder / "drawn" / f"{codec}-key{key_interval}-camera{camera}-{episode}.mp4"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.mp4")
    with av.open(str(partial), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS, options={"g": str(key_interval), **CODECS[codec]})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in progress(_pictures(camera, episode), total=EPISODE, desc=file.stem, unit="frame"):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    partial.rename(file)
    return file


def _copied(root: Path, key: str, sources: list[Path], count: int) -> Iterator[tuple[int, int]]:
    """Copy the packets of `count` episodes into files, and yield each episode's file and first frame in it."""
    file, first, size = -1, 0, FILE_BYTES
    target: Any = None
    for _, source in zip(range(count), cycle(sources)):
        if size >= FILE_BYTES:
            if target is not None:
                target.close()
            file, first, size = file + 1, 0, 0
            path = root / VIDEO.format(video_key=key, chunk_index=0, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            target = av.open(str(path), "w")
            stream = None
        with av.open(str(source)) as opened:
            original = opened.streams.video[0]
            stream = stream or target.add_stream_from_template(original, opaque=True)
            for packet in opened.demux(original):
                if packet.pts is None or packet.dts is None or original.time_base is None:
                    continue
                shift = round(first / FPS / original.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = stream
                size += packet.size
                target.mux(packet)
        yield file, first
        first += EPISODE
    target.close()


def _write_tables(root: Path, count: int, places: dict[str, list[tuple[int, int]]], codec: str) -> None:
    generator = np.random.default_rng(0)
    frames, numbers = count * EPISODE, np.arange(count)
    vectors = {"observation.state": 14, "action": 14}
    values = {key: generator.standard_normal((frames, width)).astype(np.float32) for key, width in vectors.items()}
    columns: dict[str, Any] = {
        key: pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), vectors[key]) for key, rows in values.items()
    }
    frame = np.tile(np.arange(EPISODE), count)
    columns |= {"timestamp": (frame / FPS).astype(np.float32), "frame_index": frame, "index": np.arange(frames)}
    columns |= {"episode_index": np.repeat(numbers, EPISODE), "task_index": np.zeros(frames, np.int64)}
    _write(root / DATA, pa.table(columns))

    table: dict[str, Any] = {"episode_index": numbers, "tasks": [["look"]] * count, "length": np.full(count, EPISODE)}
    table |= {
        f"{part}/{kind}_index": np.zeros(count, np.int64)
        for part in ("data", "meta/episodes")
        for kind in ("chunk", "file")
    }
    table |= {"dataset_from_index": numbers * EPISODE, "dataset_to_index": (numbers + 1) * EPISODE}
    for key, found in places.items():
        files, firsts = np.array(found).T
        table |= {f"videos/{key}/chunk_index": np.zeros(count, np.int64), f"videos/{key}/file_index": files}
        table |= {f"videos/{key}/from_timestamp": firsts / FPS, f"videos/{key}/to_timestamp": (firsts + EPISODE) / FPS}
    _write(root / TABLE, pa.table(table))
    tasks = pa.table({"task_index": [0], "__index_level_0__": ["look"]})
    kinds = {"task_index": ("task_index", "int64", "int64"), "__index_level_0__": (None, "unicode", "str")}
    described = [
        {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for field, (name, kind, numpy) in kinds.items()
    ]
    pandas = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": described}
    pandas["pandas_version"] = "2.2.0"
    _write(root / "meta/tasks.parquet", tasks.replace_schema_metadata({"pandas": json.dumps(pandas)}))

    video: dict[str, Any] = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
    video["info"] = {"video.fps": FPS, "video.height": HEIGHT, "video.width": WIDTH, "video.channels": 3}
    video["info"] |= {"video.codec": codec, "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "has_audio": False}
    features: dict[str, Any] = {
        key: {"dtype": "float32", "shape": [width], "names": None} for key, width in vectors.items()
    }
    features |= dict.fromkeys(places, video)
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    info = {"codebase_version": "v3.0", "robot_type": "made_up", "fps": FPS, "features": features}
    info |= {"total_episodes": count, "total_frames": frames, "total_tasks": 1, "chunks_size": 1000}
    info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "splits": {"train": f"0:{count}"}}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "video_path": VIDEO}
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))
    each = {"min": [0.0], "max": [1.0], "mean": [0.5], "std": [0.3], "count": [frames]}
    (root / "meta/stats.json").write_text(json.dumps(dict.fromkeys(features, each)))


def _write(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
