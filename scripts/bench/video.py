"""Measure training data that stay in their videos, beside LeRobot's own dataset class on the same cores.

    python -m scripts.bench.video [lerobot=PYTHON] [folder=FOLDER] [frames=200000] [codecs=libsvtav1,libx264] [batch=32]

Writes LeRobot v3 datasets of two cameras, 640 x 480, with a key frame at every second and at every 30th frame, and
measures on each: the disk that opening it adds, the memory of all processes while batches are drawn, frames a second
beside the peer in turns, whether pixels are those of frames decoded one by one, and how long a training waits.

The peer is `lerobot=PYTHON`, the Python of an environment with LeRobot:

    python -m venv ENV
    ENV/bin/pip install torch torchvision torchcodec datasets accelerate 'av<16' einops draccus jsonlines deepdiff
    ENV/bin/pip install --no-deps lerobot==0.4.4

Without it, the peer is a DataLoader whose workers decode each frame with PyAV from the key frame before it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from policy import DiffusionPolicy, PolicyConfig
from policy.common.progress import say
from policy.data.demonstrations import Demonstrations
from policy.data.frames import Clip, Frames
from policy.data.reading import read_demonstrations
from policy.data.windows import Windows
from policy.training.loop import batches_ahead
from policy.training.preparation import fit_normalizers
from scripts.bench.arguments import given_settings
from scripts.bench.kept_rows import KeptRows, Row
from scripts.bench.report import FOLDER
from scripts.bench.video_set import CAMERAS, FPS, written

PEER = Path(__file__).with_name("video_peer.py")
WORKERS, OBS_HORIZON, ACTION_HORIZON = 2, 2, 8
KEY_INTERVALS = (2, 30)
BATCHES, TURNS = 16, 3  # batches of a turn, and turns of each side
BUFFERED = 12  # batches before a turn that are not timed: they may have been made while the other side was measured
FIRST, RANDOM = 2_000, 200  # frames that are compared
# A network of the size of experiment=pusht_image, and its training.
IMAGE_SIZE, TRAIN_BATCH, WARM_STEPS, TRAIN_STEPS = 96, 128, 15, 30


def main() -> None:
    """Run the benchmark; the same command goes on where it was stopped."""
    given = given_settings(sys.argv[1:], "video")
    folder, frames = Path(given.get("folder", FOLDER / "video")), int(given.get("frames", 200_000))
    codecs, batch = given.get("codecs", "libsvtav1,libx264").split(","), int(given.get("batch", 32))
    lerobot = given.get("lerobot")
    if lerobot is None:
        say(str(__doc__).split("The peer is ")[1])
    torch.set_num_threads(1)
    with KeptRows("video", "av", measurements=3 * len(codecs) * len(KEY_INTERVALS)) as rows:
        for codec in codecs:
            for interval in KEY_INTERVALS:
                path = written(folder, frames=frames, key_interval=interval, codec=codec)
                for name, measured in {
                    "pixels": lambda path=path: _pixel_rows(path, folder),
                    "speed": lambda path=path: _speed_rows(path, folder, batch, lerobot),
                    "training": lambda path=path: _training_rows(path, folder),
                }.items():
                    rows.measure({"name": name, "set": path.name, "batch": batch, "lerobot": lerobot}, measured)
    rows.report()


def _opened(path: Path, folder: Path, image_size: int | None = None) -> Demonstrations:
    return read_demonstrations(
        format="lerobot",
        path=path,
        decode="stream",
        decode_workers=WORKERS,
        image_size=image_size,
        cache_dir=folder / "cache",
    )


def _windows(data: Demonstrations) -> Windows:
    return Windows(data, np.arange(data.num_episodes), obs_horizon=OBS_HORIZON, action_horizon=ACTION_HORIZON)


def _pixel_rows(path: Path, folder: Path) -> Iterator[Row]:
    shutil.rmtree(folder / "cache", ignore_errors=True)  # of an earlier run
    before = _size(folder / "cache")
    began = time.perf_counter()
    data = _opened(path, folder)
    yield {"name": f"{path.name}: opening, first time", "value": time.perf_counter() - began, "unit": "s"}
    added = _size(folder / "cache") - before
    vectors = sum(values.nbytes for values in (data.observations["state"], data.actions))
    yield {"name": f"{path.name}: disk added beside the vectors", "value": (added - vectors) / 1e6, "unit": "MB"}
    some = np.random.default_rng(0).integers(0, len(data.actions), RANDOM)
    for key, frames in data.frames.items():
        different = sum(
            not np.array_equal(ours, theirs)
            for ours, theirs in zip(_rows_of(frames, range(FIRST)), _first(frames.clips[0]), strict=False)
        )
        different += sum(not np.array_equal(frames[int(row)], _alone(*_place(frames, int(row)))) for row in some)
        yield {"name": f"{path.name}: {key}: frames that differ", "value": different, "unit": f"of {FIRST + RANDOM}"}


def _rows_of(frames: Frames, rows: range) -> Iterator[NDArray[np.uint8]]:
    for start in rows[::50]:
        yield from frames[start : min(start + 50, rows.stop)]


def _first(clip: Clip) -> Iterator[NDArray[Any]]:
    """The frames of a file from its start, as PyAV itself converts each."""
    with av.open(str(clip.file)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _place(frames: Frames, row: int) -> tuple[Path, float]:
    for clip in frames.clips:
        if row < clip.count:
            return clip.file, clip.start + row / clip.fps
        row -= clip.count
    raise IndexError(row)


def _alone(file: Path, seconds: float) -> NDArray[Any]:
    """One frame, from a newly opened file."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(round(seconds / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and float(frame.pts * stream.time_base) > seconds - 0.5 / FPS:
                return frame.to_ndarray(format="rgb24")
    raise ValueError(f"{file} has no frame at {seconds:.3f} s")


class _OneByOne(Dataset[dict[str, torch.Tensor]]):
    """The pictures of a window, each decoded alone."""

    def __init__(self, data: Demonstrations) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.actions)

    def __getitem__(self, t: int) -> dict[str, torch.Tensor]:
        rows = [max(t - n, 0) for n in reversed(range(OBS_HORIZON))]
        return {
            key: torch.from_numpy(np.stack([_alone(*_place(frames, row)) for row in rows]))
            for key, frames in self.data.frames.items()
        }


# Draws some batches and returns the seconds that they took.
Draw = Callable[[int], float]


@contextmanager
def _one_by_one(data: Demonstrations, batch: int) -> Iterator[tuple[str, Draw]]:
    loader = DataLoader(
        _OneByOne(data), batch, shuffle=True, num_workers=WORKERS, generator=torch.Generator().manual_seed(0)
    )
    batches = iter(loader)
    yield f"PyAV {av.__version__}, frame by frame", lambda number: _timed(batches, number)


@contextmanager
def _lerobot(python: str, path: Path, batch: int) -> Iterator[tuple[str, Draw]]:
    command = [python, str(PEER), str(path.resolve()), *map(str, (batch, OBS_HORIZON, WORKERS, FPS)), *CAMERAS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        write, read = process.stdin, process.stdout

        def draw(number: int) -> float:
            write.write(f"{number}\n")
            write.flush()
            return float(read.readline())

        try:
            yield read.readline().strip(), draw
        finally:
            write.close()


def _timed(batches: Iterator[Any], number: int) -> float:
    for _ in range(BUFFERED):
        next(batches)
    began = time.perf_counter()
    for _ in range(number):
        next(batches)
    return time.perf_counter() - began


def _speed_rows(path: Path, folder: Path, batch: int, lerobot: str | None) -> Iterator[Row]:
    data = _opened(path, folder)
    frames = BATCHES * batch * OBS_HORIZON * len(data.frames)
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    memory = 0.0
    windows = _windows(data)
    with closing(batches_ahead(windows, range(10**6), lambda step: windows.batch_at(step, batch, 0))) as ours:
        next(ours)
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
        with _lerobot(lerobot, path, batch) if lerobot else _one_by_one(data, batch) as (peer, theirs):
            for _ in range(TURNS):
                rates["theirs"].append(frames / theirs(BATCHES))
                rates["ours"].append(frames / _timed(ours, BATCHES))
                memory = max(memory, sum(map(_memory, processes)))
    ratios = [our / their for our, their in zip(rates["ours"], rates["theirs"], strict=True)]
    for name, values in ((peer, rates["theirs"]), (f"ours, {WORKERS} workers", rates["ours"])):
        yield {"name": f"{path.name}: {name}", **_spread(values), "unit": "frames/s"}
    yield {"name": f"{path.name}: ratio", **_spread(ratios), "unit": "times the peer"}
    yield {"name": f"{path.name}: memory of all our processes, batch {batch}", "value": memory, "unit": "MB"}


def _memory(process: int) -> float:
    """Resident memory of a process in MB, its share of what it shares with others."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def _spread(values: list[float]) -> Row:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def _training_rows(path: Path, folder: Path) -> Iterator[Row]:
    """The share of its time that a training waits for batches, once the first ones are there."""
    data = _opened(path, folder, IMAGE_SIZE)
    windows = _windows(data)
    policy = DiffusionPolicy(
        PolicyConfig(
            observation_shapes=data.observation_shapes,
            action_dim=data.actions.shape[1],
            obs_horizon=OBS_HORIZON,
            action_horizon=ACTION_HORIZON,
            encoder={"name": "image"},
        )
    )
    fit_normalizers(policy, windows)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    waited, began = 0.0, time.perf_counter()
    with closing(batches_ahead(windows, range(10**6), lambda step: windows.batch_at(step, TRAIN_BATCH, 0))) as batches:
        for step in range(WARM_STEPS + TRAIN_STEPS):
            if step == WARM_STEPS:
                waited, began = 0.0, time.perf_counter()
            asked = time.perf_counter()
            _, batch = next(batches)
            waited += time.perf_counter() - asked
            policy.loss(batch, generator, timesteps_per_chunk=2).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - began
    yield {"name": f"{path.name}: a training waits", "value": 100 * waited / seconds, "unit": "% of its time"}
    yield {"name": f"{path.name}: its steps", "value": TRAIN_STEPS / seconds, "unit": "steps/s"}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
