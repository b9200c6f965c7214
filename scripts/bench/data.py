"""Measure how training copes with large demonstrations, and how fast windows are gathered, beside a PyTorch DataLoader.

Writes 10 million transitions (39-wide observations, 4-wide actions, 1.7 GB) as a zarr replay buffer, once, and opens
them the way training does.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from policy import PolicyConfig, TrainSettings
from policy.common.progress import progress
from policy.data.demonstrations import Demonstrations
from policy.data.reading import read_demonstrations
from policy.data.windows import Windows
from policy.training.loop import batches_ahead, train
from policy.training.preparation import Run, prepare_run
from scripts.bench.kept_rows import KeptRows, Row
from scripts.bench.report import FOLDER

TRANSITIONS, EPISODE, OBSERVATION, ACTION = 10_000_000, 200, 39, 4
IMAGES = 20_000
BATCH = 256
OBS_HORIZON, ACTION_HORIZON = 2, 8
REPEATS = 5


def main() -> None:
    """Run the benchmark; the same command goes on where it was stopped."""
    work: dict[str, Callable[[], Iterator[Row]]] = {
        "size": lambda: _size_rows(FOLDER / "data"),
        "state": lambda: _speed_rows("state", _states()),
        "96x96 images": lambda: _speed_rows("96x96 images", _images()),
    }
    with KeptRows("data", "zarr", measurements=len(work)) as rows:
        for name, measured in work.items():
            rows.measure({"name": name}, measured)
    rows.report()


def _size_rows(folder: Path) -> Iterator[Row]:
    large = _written(folder / "large.zarr", TRANSITIONS)
    small = _written(folder / "small.zarr", TRANSITIONS // 100)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    before = _resident()
    data, seconds = _timed(lambda: _opened(large, folder))
    yield {"name": "open 10 M transitions, first time", "value": seconds, "unit": "s"}
    _, seconds = _timed(lambda: _opened(large, folder))
    yield {"name": "open 10 M transitions, again", "value": seconds, "unit": "s"}
    run, seconds = _timed(lambda: _prepared(data, steps=10))
    yield {"name": "split, fit normalisers, build policy", "value": seconds, "unit": "s"}
    yield from _growth("before training", before)
    _, seconds = _timed(lambda: _trained(run, steps=10))
    yield {"name": "first 10 training steps", "value": seconds, "unit": "s"}
    yield from _growth("after 10 training steps", before)
    for name, held in (("0.1 M", _opened(small, folder)), ("10 M", data)):
        windows = _windows(held)
        for _ in windows.blocks():  # read every page first: then only the latency of memory and our own cost remain
            pass
        bare = _spread(lambda windows=windows: _take(windows, 300), 300)  # type: ignore[misc]
        ours = _spread(lambda windows=windows: _gather(windows, 300), 300)  # type: ignore[misc]
        yield {"name": f"{name} transitions: bare numpy.take of the rows", **bare, "unit": "windows/s"}
        ratio = ours["value"] / bare["value"]
        yield {"name": f"{name} transitions: gather", **ours, "unit": "windows/s", "ratio_to_floor": ratio}


def _growth(when: str, before: dict[str, float]) -> Iterator[Row]:
    now = _resident()
    for name, what in (("anonymous", "RssAnon"), ("page cache", "RssFile")):
        yield {"name": f"resident memory grown {when}, {name}", "value": (now[what] - before[what]) / 1e6, "unit": "MB"}


def _take(windows: Windows, batches: int) -> float:
    """The floor of `_gather`: taking as many random rows, whose numbers are known beforehand."""
    data = windows.demonstrations
    newest = np.random.default_rng(0).integers(2, len(data.actions) - ACTION_HORIZON, (batches, BATCH, 1))
    past, future = np.arange(1 - OBS_HORIZON, 1), np.arange(ACTION_HORIZON)
    begin = time.perf_counter()
    for rows in newest:
        for values in data.observations.values():
            values.take(rows + past, axis=0)
        data.actions.take(rows + future, axis=0)
    return time.perf_counter() - begin


def _written(path: Path, transitions: int) -> Path:
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    root = zarr.open_group(str(partial), mode="w")
    generator = np.random.default_rng(0)
    block = 500_000
    for key, width in (("state", OBSERVATION), ("action", ACTION)):
        array = root.create_array(
            f"data/{key}", shape=(transitions, width), chunks=(20_000, width), dtype="float32", compressors=None
        )
        for start in progress(
            range(0, transitions, block), total=transitions // block, desc=f"write {key}", unit="block"
        ):
            rows = min(block, transitions - start)
            array[start : start + rows] = generator.standard_normal((rows, width), dtype=np.float32)
    root["meta/episode_ends"] = np.arange(EPISODE, transitions + 1, EPISODE)
    partial.rename(path)
    return path


def _opened(path: Path, folder: Path) -> Demonstrations:
    return read_demonstrations(format="zarr", path=path, cache_dir=folder / "cache")


def _settings(steps: int) -> TrainSettings:
    return TrainSettings(steps=steps, batch_size=BATCH, warmup_steps=0)


def _prepared(data: Demonstrations, steps: int) -> Run:
    config = PolicyConfig(observation_shapes=data.observation_shapes, action_dim=ACTION)
    return prepare_run(config, data, _settings(steps), seed=0, device="cpu")


def _trained(run: Run, steps: int) -> None:
    train(run, _settings(steps), seed=0, tracker=_Silent(), save=lambda state: None)


class _Silent:
    def log(self, metrics: dict[str, float], step: int) -> None:
        pass


def _states() -> Demonstrations:
    generator = np.random.default_rng(0)
    rows = 200_000
    return Demonstrations(
        observations={"state": generator.standard_normal((rows, OBSERVATION), dtype=np.float32)},
        actions=generator.standard_normal((rows, ACTION), dtype=np.float32),
        episode_ends=np.arange(EPISODE, rows + 1, EPISODE),
    )


def _images() -> Demonstrations:
    generator = np.random.default_rng(0)
    return Demonstrations(
        observations={"image": generator.integers(0, 256, (IMAGES, 96, 96, 3), dtype=np.uint8)},
        actions=generator.standard_normal((IMAGES, ACTION), dtype=np.float32),
        episode_ends=np.arange(EPISODE, IMAGES + 1, EPISODE),
    )


def _speed_rows(name: str, data: Demonstrations) -> Iterator[Row]:
    windows = _windows(data)
    batches = 400 if name == "state" else 40
    peers = {
        f"DataLoader, {workers} workers": lambda workers=workers: _load(windows, workers, batches) for workers in (0, 2)
    }
    ours: dict[str, Callable[[], object]] = {
        "gather": lambda: _gather(windows, batches),
        "gather, a thread ahead": lambda: _ahead(windows, batches),
    }
    rates = {who: _spread(run, batches) for who, run in {**peers, **ours}.items()}
    fastest = max(rates[peer]["value"] for peer in peers)
    for who, rate in rates.items():
        ratio = {} if who in peers else {"ratio_to_dataloader": rate["value"] / fastest}
        yield {"name": f"{name}: {who}", **rate, "unit": "windows/s", **ratio}


class _WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """The same windows, one item each, as a DataLoader takes them."""

    def __init__(self, windows: Windows) -> None:
        self.data = windows.demonstrations
        lengths = self.data.episode_lengths
        self.starts = np.repeat(self.data.episode_starts, lengths)
        self.ends = np.repeat(self.data.episode_ends, lengths)

    def __len__(self) -> int:
        return len(self.data.actions)

    def __getitem__(self, t: int) -> dict[str, torch.Tensor]:
        past = np.maximum(np.arange(t - OBS_HORIZON + 1, t + 1), self.starts[t])
        future = np.arange(t, t + ACTION_HORIZON)
        item = {key: torch.from_numpy(values[past]) for key, values in self.data.observations.items()}
        item["actions"] = torch.from_numpy(self.data.actions[np.minimum(future, self.ends[t] - 1)])
        item["mask"] = torch.from_numpy(future < self.ends[t])
        return item


def _load(windows: Windows, workers: int, batches: int) -> float:
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(_WindowDataset(windows), BATCH, shuffle=True, num_workers=workers, generator=generator)
    batch_stream = iter(loader)
    next(batch_stream)  # wait until the workers have started
    begin = time.perf_counter()
    done = 0
    while done < batches and next(batch_stream, None) is not None:
        done += 1
    return (time.perf_counter() - begin) * batches / done


def _gather(windows: Windows, batches: int) -> float:
    windows.batch_at(0, BATCH, 0)  # draws the epoch's order
    begin = time.perf_counter()
    for step in range(batches):
        windows.gather(windows.batch_at(step % (len(windows) // BATCH), BATCH, 0))
    return time.perf_counter() - begin


def _ahead(windows: Windows, batches: int) -> float:
    windows.batch_at(0, BATCH, 0)
    begin = time.perf_counter()
    for _ in batches_ahead(
        windows, range(min(batches, len(windows) // BATCH)), lambda step: windows.batch_at(step, BATCH, 0)
    ):
        pass
    return (time.perf_counter() - begin) * batches / min(batches, len(windows) // BATCH)


def _windows(data: Demonstrations) -> Windows:
    return Windows(data, np.arange(data.num_episodes), obs_horizon=OBS_HORIZON, action_horizon=ACTION_HORIZON)


def _spread(run: Callable[[], Any], batches: int) -> Row:
    rates = sorted(batches * BATCH / run() for _ in range(REPEATS))
    return {"value": statistics.median(rates), "low": rates[0], "high": rates[-1]}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def _resident() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: 1e3 * float(line.split()[1]) for line in lines if line.startswith("Rss")}


if __name__ == "__main__":
    main()
